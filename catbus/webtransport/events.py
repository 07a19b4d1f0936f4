"""What a connection tells whoever drives it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionRequested:
    """A client asks for a session: `accept()` or `refuse(status)`. `origin` is None when the client is no browser."""

    path: str
    authority: str
    origin: str | None


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The server has accepted our session."""


@dataclass(frozen=True, slots=True)
class SessionRefused:
    """The server has answered our request for a session with another status than 2xx; the connection closes."""

    status: int


@dataclass(frozen=True, slots=True)
class StreamData:
    """The next bytes of a stream, in order; `ended` with the last of them. To be given back by `consumed`."""

    stream: int
    data: bytes
    ended: bool


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The peer gave up sending on a stream. `code` is None when it was not the peer's application that said so."""

    stream: int
    code: int | None


@dataclass(frozen=True, slots=True)
class StreamStopped:
    """The peer does not want the rest of what we send on a stream; nothing more can be sent on it."""

    stream: int
    code: int | None


@dataclass(frozen=True, slots=True)
class Datagram:
    """A datagram of the session."""

    data: bytes


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The peer has ended the session. `code` is None when it broke off without closing."""

    code: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The connection serves nothing more, whoever ended it. Comes once; only events of routing can follow.

    `fault` is the exception that ended it, where a mistake of ours did.
    """

    reason: str
    fault: Exception | None = None


@dataclass(frozen=True, slots=True)
class IdIssued:
    """Packets to this connection ID belong to this connection from now on."""

    connection_id: bytes


@dataclass(frozen=True, slots=True)
class IdRetired:
    """Packets to this connection ID do not come any more."""

    connection_id: bytes


@dataclass(frozen=True, slots=True)
class Terminated:
    """The last event: the connection can be forgotten, with all its connection IDs."""


Event = (
    SessionRequested
    | SessionOpened
    | SessionRefused
    | StreamData
    | StreamReset
    | StreamStopped
    | Datagram
    | SessionClosed
    | ConnectionLost
    | IdIssued
    | IdRetired
    | Terminated
)
