"""The events that a WebTransport connection reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionRequested:
    """A client requests a session: `accept()` or `refuse(status)`. `origin` is None if the client is not a browser."""

    path: str
    authority: str
    origin: str | None


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The server has accepted the session."""


@dataclass(frozen=True, slots=True)
class SessionRefused:
    """The server has refused the session with a status other than 2xx. The connection closes."""

    status: int


@dataclass(frozen=True, slots=True)
class StreamData:
    """The next bytes of a stream, in order. `ended` marks the last ones. Report processed bytes with `consumed`."""

    stream: int
    data: bytes
    ended: bool


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The peer has reset its sending side of a stream. `code` is None if it is not an application error code."""

    stream: int
    code: int | None


@dataclass(frozen=True, slots=True)
class StreamStopped:
    """The peer has stopped reading a stream (STOP_SENDING). Nothing more can be sent on it."""

    stream: int
    code: int | None


@dataclass(frozen=True, slots=True)
class Datagram:
    """A datagram of the session."""

    data: bytes


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The peer has closed the session. `code` is None if it did so without a valid close capsule."""

    code: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The connection is lost or closed, by either side. Reported once; only events about connection IDs can follow.

    `fault` is the exception, if an internal error ended the connection.
    """

    reason: str
    fault: Exception | None = None


@dataclass(frozen=True, slots=True)
class ConnectionIdIssued:
    """Packets for this connection ID belong to this connection from now on."""

    connection_id: bytes


@dataclass(frozen=True, slots=True)
class ConnectionIdRetired:
    """The peer no longer sends packets to this connection ID."""

    connection_id: bytes


@dataclass(frozen=True, slots=True)
class Terminated:
    """The last event: the connection and its connection IDs can be forgotten."""


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
    | ConnectionIdIssued
    | ConnectionIdRetired
    | Terminated
)
