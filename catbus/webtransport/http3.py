"""HTTP/3 as aioquic speaks it, for all but the streams of a WebTransport session: those go past it."""

from __future__ import annotations

from aioquic.h3.connection import H3Connection
from aioquic.quic.connection import QuicConnection

EXTENDED_CONNECT = 0x08
WEBTRANSPORT_DRAFT_02 = 0x2B603742
WEBTRANSPORT_MAX_SESSIONS = 0xC671706A
WEBTRANSPORT_DRAFT_14 = 0x14E9CD29
WEBTRANSPORT_ENABLED = 0x2C7CF000
WEBTRANSPORT = (WEBTRANSPORT_DRAFT_02, WEBTRANSPORT_MAX_SESSIONS, WEBTRANSPORT_DRAFT_14, WEBTRANSPORT_ENABLED)
"""Each draft has its own setting that says "I speak this"; browsers look for different ones of them."""

MAX_BUFFERED = 16 * 1024
"""The largest frame that is kept until it is whole, such as a request's headers."""


class Http3(H3Connection):
    """The control streams and the requests of one connection.

    No dynamic table: one byte that stands for an entry of kilobytes would make large headers of small ones.
    """

    def __init__(self, quic: QuicConnection) -> None:
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
    def peer_speaks_webtransport(self) -> bool | None:
        """None before the peer's settings are there."""
        settings = self.received_settings
        if settings is None:
            return None
        return bool(settings.get(EXTENDED_CONNECT)) and any(settings.get(one) for one in WEBTRANSPORT)

    def forget(self, stream_id: int) -> None:
        """This request has been answered, and what still comes of it is not passed on to here."""
        self._stream.pop(stream_id, None)

    def buffered(self, stream_id: int) -> int:
        """What is kept of a frame that is not whole."""
        stream = self._stream.get(stream_id)
        return len(stream.buffer) if stream else 0
