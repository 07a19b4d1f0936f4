"""HTTP/3 as aioquic speaks it, for all but the streams of a WebTransport session: those go past it."""

from __future__ import annotations

from aioquic.h3.connection import H3Connection, SettingsError

from .quic_connection import Quic

EXTENDED_CONNECT = 0x08
WEBTRANSPORT_DRAFT_02 = 0x2B603742
WEBTRANSPORT_MAX_SESSIONS = 0xC671706A
WEBTRANSPORT_DRAFT_14 = 0x14E9CD29
WEBTRANSPORT_ENABLED = 0x2C7CF000
WEBTRANSPORT = (WEBTRANSPORT_DRAFT_02, WEBTRANSPORT_MAX_SESSIONS, WEBTRANSPORT_DRAFT_14, WEBTRANSPORT_ENABLED)
"""Each draft has its own setting that says "I speak this": 02 to 06, 07 to 12, 13 and 14, 15 and 16. Browsers look for
different ones of them."""
H3_DATAGRAM = 0x33

TOKEN = b"webtransport"
"""The `:protocol` of a request for a session, up to draft 14."""
NEW_TOKEN = b"webtransport-h3"
"""The same from draft 15 on, where the other one means WebTransport inside a single stream of HTTP."""

MAX_BUFFERED = 16 * 1024
"""The largest frame that is kept until it is whole, such as a request's headers."""


class Http3(H3Connection):
    """The control streams and the requests of one connection.

    No dynamic table: one byte that stands for an entry of kilobytes would make large headers of small ones.
    """

    _quic: Quic

    def __init__(self, quic: Quic) -> None:
        super().__init__(quic, enable_webtransport=True)
        self._decoder = type(self._decoder)(0, 0)

    def _init_connection(self) -> None:
        self._max_table_capacity = self._blocked_streams = 0
        self._max_push_id = None
        super()._init_connection()

    def _get_local_settings(self) -> dict[int, int]:
        settings = super()._get_local_settings()
        settings[EXTENDED_CONNECT] = 1
        settings.update(dict.fromkeys(WEBTRANSPORT, 1))
        return settings

    @property
    def meets_requirements(self) -> bool:
        """Whether the peer's settings and transport parameters allow a session of the newest drafts.

        Of a client they also want `reset_stream_at`. One that lacks it gets RESET_STREAM, as from a broker of the
        older drafts, and loses nothing else.
        """
        settings = self.received_settings or {}
        return settings.get(H3_DATAGRAM) == 1 and bool(self._quic.max_datagram_frame)

    def choose_token(self) -> bytes | None:
        """By which name to ask this server for a session; None when it has none. Its settings must have come.

        Raises SettingsError when they cannot be meant.
        """
        settings = self.received_settings
        assert settings is not None
        newest = settings.get(WEBTRANSPORT_ENABLED, 0)
        if newest > 1:
            raise SettingsError("WT_ENABLED setting must be 0 or 1")
        if not settings.get(EXTENDED_CONNECT):
            return None
        if newest and self.meets_requirements and self._quic.peer_takes_reset_at:
            return NEW_TOKEN
        return TOKEN if any(settings.get(one) for one in WEBTRANSPORT) else None

    def forget(self, stream_id: int) -> None:
        """This request has been answered, and what still comes of it is not passed on to here."""
        self._stream.pop(stream_id, None)

    def buffered(self, stream_id: int) -> int:
        """What is kept of a frame that is not whole."""
        stream = self._stream.get(stream_id)
        return len(stream.buffer) if stream else 0
