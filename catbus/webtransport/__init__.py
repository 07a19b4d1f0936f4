"""WebTransport over HTTP/3 and QUIC, for servers and clients, without I/O.

Datagrams and times go in, datagrams and events come out.
"""

from .events import (
    ConnectionIdIssued,
    ConnectionIdRetired,
    ConnectionLost,
    Datagram,
    Event,
    SessionClosed,
    SessionOpened,
    SessionRefused,
    SessionRequested,
    StreamData,
    StreamReset,
    StreamStopped,
    Terminated,
)
from .quic_configuration import ConnectionLimits, WebTransportConfiguration, client_configuration, server_configuration
from .stream_demultiplexer import CERTIFICATE_HASH_MISMATCH
from .webtransport_connection import WebTransportConnection

__all__ = [
    "CERTIFICATE_HASH_MISMATCH",
    "ConnectionIdIssued",
    "ConnectionIdRetired",
    "ConnectionLimits",
    "ConnectionLost",
    "Datagram",
    "Event",
    "SessionClosed",
    "SessionOpened",
    "SessionRefused",
    "SessionRequested",
    "StreamData",
    "StreamReset",
    "StreamStopped",
    "Terminated",
    "WebTransportConfiguration",
    "WebTransportConnection",
    "client_configuration",
    "server_configuration",
]
