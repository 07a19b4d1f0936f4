"""The client, for asyncio and Trio: `connect` to a broker, publish, subscribe.

| Module | |
|---|---|
| `bus`, `bus_factory`, `argument_checks` | the public API |
| `connection_supervisor`, `reconnect_policy`, `token_renewal` | one connection after the other |
| `active_connection`, `signals` | the tasks of one connection |
| `protocol_connection`, `server_messages` | the protocol of one connection, without I/O |
| `in_flight_requests`, `subscription_manager`, `message_queue` | state that outlives a connection, without I/O |
| `transport_interface`, `websocket_transport`, `webtransport_transport` | the transports |
| `broker_address`, `happy_eyeballs` | the address of a broker, and which of several transports is used |
"""

from ..errors import Disconnected, Refused
from .bus import Bus, Messages
from .bus_factory import connect, open_bus
from .reconnect_policy import Backoff, Ended, Reconnected, Reconnecting, State
from .server_messages import Gap, GoAway, Head, Live, Message, Page
from .transport_interface import Transport

__all__ = [
    "Backoff",
    "Bus",
    "Disconnected",
    "Ended",
    "Gap",
    "GoAway",
    "Head",
    "Live",
    "Message",
    "Messages",
    "Page",
    "Reconnected",
    "Reconnecting",
    "Refused",
    "State",
    "Transport",
    "connect",
    "open_bus",
]
