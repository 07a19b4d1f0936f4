"""WebTransport over HTTP/3 and QUIC, for servers and clients, without I/O: datagrams and times in, events out."""

from .events import (
    ConnectionLost,
    Datagram,
    Event,
    IdIssued,
    IdRetired,
    SessionClosed,
    SessionOpened,
    SessionRefused,
    SessionRequested,
    StreamData,
    StreamReset,
    StreamStopped,
    Terminated,
)
from .quic_configuration import Configuration, Limits, client_configuration, server_configuration
from .webtransport_connection import Connection

__all__ = [
    "Configuration",
    "Connection",
    "ConnectionLost",
    "Datagram",
    "Event",
    "IdIssued",
    "IdRetired",
    "Limits",
    "SessionClosed",
    "SessionOpened",
    "SessionRefused",
    "SessionRequested",
    "StreamData",
    "StreamReset",
    "StreamStopped",
    "Terminated",
    "client_configuration",
    "server_configuration",
]
