"""The CONNECT stream, which carries a session's request, the reply to it, and the session's close."""

from __future__ import annotations

from enum import Enum, auto

from . import capsules
from .http3_connection import Http3Connection
from .http3_error_codes import Http3ErrorCode
from .quic_connection import BoundedQuicConnection
from .stream_table import Stream, StreamTable


class ConnectState(Enum):
    """The states of a session: NONE -> REQUESTED -> OPEN -> CLOSING -> CLOSED. Any state can go to CLOSED."""

    NONE = auto()
    REQUESTED = auto()
    OPEN = auto()
    CLOSING = auto()
    """This side closes the session, and waits for the acknowledgement of the close capsule."""
    CLOSED = auto()

    @property
    def before_open(self) -> bool:
        """Whether the session is not open yet."""
        return self in (ConnectState.NONE, ConnectState.REQUESTED)


class ConnectStream:
    """One session's stream, opened with extended CONNECT (RFC 9220, draft-ietf-webtrans-http3 section 3)."""

    def __init__(self, quic: BoundedQuicConnection, streams: StreamTable) -> None:
        self.state = ConnectState.NONE
        self.id: int | None = None
        self.capsules = capsules.CapsuleReader()
        self.close_sent = False
        """Whether the close capsule, or the status that refuses the session, was sent."""
        self.http3: Http3Connection | None = None
        self._close_capsule = b""
        self._quic = quic
        self._streams = streams

    def request(self, token: bytes, authority: str, path: str, origin: str | None) -> None:
        """Send the client's request for a session."""
        assert self.http3 is not None
        self.id = self._quic.get_next_available_stream_id()
        headers = [
            (b":method", b"CONNECT"),
            (b":scheme", b"https"),
            (b":authority", authority.encode()),
            (b":path", path.encode()),
            (b":protocol", token),
            (b"sec-webtransport-http3-draft02", b"1"),
        ]
        if origin is not None:
            headers.append((b"origin", origin.encode()))
        self.http3.send_headers(self.id, headers)
        self._streams.register(self.id)
        self.state = ConnectState.REQUESTED

    def accept(self) -> bool:
        if self.state is not ConnectState.REQUESTED or not self._can_send:
            return False
        assert self.http3 is not None and self.id is not None
        headers = [(b":status", b"200"), (b"sec-webtransport-http3-draft", b"draft02")]
        self.http3.send_headers(self.id, headers)
        self.state = ConnectState.OPEN
        return True

    def refuse(self, status: int) -> bool:
        if self.state is not ConnectState.REQUESTED or not self._can_send:
            return False
        assert self.http3 is not None and self.id is not None
        self.http3.send_headers(self.id, [(b":status", b"%d" % status)], end_stream=True)
        self.state = ConnectState.CLOSING
        self.close_sent = True
        return True

    @property
    def _stream(self) -> Stream | None:
        return None if self.id is None else self._streams.get(self.id)

    @property
    def _can_send(self) -> bool:
        stream = self._stream
        return stream is not None and stream.sender is not None

    def close(self, code: int, reason: str) -> None:
        """Prepare the close capsule. `send_close` sends it."""
        self._close_capsule = capsules.encode_close(code, reason)
        self.state = ConnectState.CLOSING

    def send_close(self) -> None:
        """Send CLOSE_WEBTRANSPORT_SESSION and finish the stream (draft-ietf-webtrans-http3 section 6)."""
        self.close_sent = True
        if self._can_send:
            assert self.http3 is not None and self.id is not None
            self.http3.send_data(self.id, self._close_capsule, end_stream=True)

    @property
    def close_acknowledged(self) -> bool:
        """Whether the peer has acknowledged the whole stream, or has stopped reading it."""
        stream = self._stream
        return stream is None or stream.sender is None or stream.sender.is_finished

    def reset_as_malformed(self) -> None:
        """Reset the stream: the peer's capsules are malformed."""
        stream = self._stream
        if stream is not None:
            self._streams.abandon(stream, Http3ErrorCode.MESSAGE_ERROR)
