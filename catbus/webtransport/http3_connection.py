"""HTTP/3 by aioquic, for everything except the streams of a WebTransport session, which bypass it."""

from __future__ import annotations

from aioquic.h3.connection import H3Connection, SettingsError

from .quic_connection import BoundedQuicConnection

EXTENDED_CONNECT = 0x08
WEBTRANSPORT_DRAFT_02 = 0x2B603742
WEBTRANSPORT_MAX_SESSIONS = 0xC671706A
WEBTRANSPORT_DRAFT_14 = 0x14E9CD29
WEBTRANSPORT_ENABLED = 0x2C7CF000
WEBTRANSPORT_SETTINGS = (WEBTRANSPORT_DRAFT_02, WEBTRANSPORT_MAX_SESSIONS, WEBTRANSPORT_DRAFT_14, WEBTRANSPORT_ENABLED)
"""The settings that announce WebTransport: of drafts 02 to 06, 07 to 12, 13 and 14, and 15 and 16. Different browsers
require different ones."""
H3_DATAGRAM = 0x33

PROTOCOL_TOKEN = b"webtransport"
"""The `:protocol` of a session request, up to draft 14."""
PROTOCOL_TOKEN_DRAFT_15 = b"webtransport-h3"
"""The `:protocol` from draft 15 on, where the earlier token means WebTransport inside a single HTTP stream."""

MAX_BUFFERED_FRAME = 16 * 1024
"""The largest frame, in bytes, that is buffered until it is complete, such as a request's headers."""


class Http3Connection(H3Connection):
    """The control streams and the requests of one connection.

    QPACK's dynamic table is disabled: a header of one byte could refer to an entry of kilobytes, and so expand to large
    headers.
    """

    _quic: BoundedQuicConnection

    def __init__(self, quic: BoundedQuicConnection) -> None:
        super().__init__(quic, enable_webtransport=True)
        self._decoder = type(self._decoder)(0, 0)

    def _init_connection(self) -> None:
        self._max_table_capacity = self._blocked_streams = 0
        self._max_push_id = None
        super()._init_connection()

    def _get_local_settings(self) -> dict[int, int]:
        settings = super()._get_local_settings()
        settings[EXTENDED_CONNECT] = 1
        settings.update(dict.fromkeys(WEBTRANSPORT_SETTINGS, 1))
        return settings

    @property
    def meets_draft_15_requirements(self) -> bool:
        """Whether the peer's settings and transport parameters allow a session of draft 15 or later.

        The drafts also require `reset_stream_at` of a client. This is not checked: a client without it gets
        RESET_STREAM, as in earlier drafts, with no other loss.
        """
        settings = self.received_settings or {}
        return settings.get(H3_DATAGRAM) == 1 and bool(self._quic.peer_max_datagram_frame_size)

    def choose_protocol_token(self) -> bytes | None:
        """Return the `:protocol` to request a session with, or None if the server does not support WebTransport.

        The server's SETTINGS must have arrived. Raises SettingsError if they are invalid.
        """
        settings = self.received_settings
        assert settings is not None
        newest = settings.get(WEBTRANSPORT_ENABLED, 0)
        if newest > 1:
            raise SettingsError("WT_ENABLED setting must be 0 or 1")
        if not settings.get(EXTENDED_CONNECT):
            return None
        if newest and self.meets_draft_15_requirements and self._quic.peer_supports_reset_stream_at:
            return PROTOCOL_TOKEN_DRAFT_15
        return PROTOCOL_TOKEN if any(settings.get(one) for one in WEBTRANSPORT_SETTINGS) else None

    def forget_request(self, stream_id: int) -> None:
        """Drop the state of a request that has its reply. Its further data must not be passed to HTTP/3."""
        self._stream.pop(stream_id, None)

    def buffered_bytes(self, stream_id: int) -> int:
        """Bytes buffered of an incomplete frame."""
        stream = self._stream.get(stream_id)
        return len(stream.buffer) if stream else 0
