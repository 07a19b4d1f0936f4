"""The session's own stream: the request for it, the answer, and its last words."""

from __future__ import annotations

from enum import Enum, auto

from . import capsules
from .http3_connection import Http3
from .http3_error_codes import H3Code
from .quic_connection import Quic
from .stream_table import Streams


class State(Enum):
    """NONE -> REQUESTED -> OPEN -> CLOSING -> OVER; each may be the last but one."""

    NONE = auto()
    REQUESTED = auto()
    OPEN = auto()
    CLOSING = auto()
    """We end it, and wait for our words to arrive."""
    OVER = auto()

    @property
    def opening(self) -> bool:
        """Whether there is no session yet."""
        return self in (State.NONE, State.REQUESTED)


class Session:
    """One session, requested with extended CONNECT (RFC 9220, draft-ietf-webtrans-http3 section 3)."""

    def __init__(self, quic: Quic, streams: Streams) -> None:
        self.state = State.NONE
        self.id: int | None = None
        self.capsules = capsules.CapsuleReader()
        self.said = False
        """Whether our last words are on their way."""
        self.http3: Http3 | None = None
        self._goodbye = b""
        self._quic = quic
        self._streams = streams

    def request(self, token: bytes, authority: str, path: str, origin: str | None) -> None:
        """Ask the server for a session."""
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
        self._streams.adopt(self.id)
        self.state = State.REQUESTED

    def accept(self) -> bool:
        if self.state is not State.REQUESTED or not self._can_answer:
            return False
        assert self.http3 is not None and self.id is not None
        headers = [(b":status", b"200"), (b"sec-webtransport-http3-draft", b"draft02")]
        self.http3.send_headers(self.id, headers)
        self.state = State.OPEN
        return True

    def refuse(self, status: int) -> bool:
        if self.state is not State.REQUESTED or not self._can_answer:
            return False
        assert self.http3 is not None and self.id is not None
        self.http3.send_headers(self.id, [(b":status", b"%d" % status)], end_stream=True)
        self.state = State.CLOSING
        self.said = True
        return True

    @property
    def _can_answer(self) -> bool:
        stream = None if self.id is None else self._streams.get(self.id)
        return stream is not None and stream.sender is not None

    def close(self, code: int, reason: str) -> None:
        """Have these last words ready; `say_goodbye` says them."""
        self._goodbye = capsules.encode_close(code, reason)
        self.state = State.CLOSING

    def say_goodbye(self) -> None:
        """CLOSE_WEBTRANSPORT_SESSION and the end of the stream (draft-ietf-webtrans-http3 section 6)."""
        self.said = True
        if self._can_answer:
            assert self.http3 is not None and self.id is not None
            self.http3.send_data(self.id, self._goodbye, end_stream=True)

    @property
    def heard(self) -> bool:
        """Whether the peer has acknowledged all of our last words, or does not listen."""
        stream = None if self.id is None else self._streams.get(self.id)
        return stream is None or stream.sender is None or stream.sender.is_finished

    def reject(self) -> None:
        """The peer's capsules make no sense."""
        stream = None if self.id is None else self._streams.get(self.id)
        if stream is not None:
            self._streams.abandon(stream, H3Code.MESSAGE_ERROR)
