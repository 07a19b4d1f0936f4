"""The client, for asyncio and Trio: `connect` to a broker, publish, subscribe.

| Module | |
|---|---|
| `bus`, `bus_factory`, `messages`, `live_map`, `membership`, `argument_checks` | the public API |
| `connection_supervisor`, `reconnect_policy`, `token_source`, `token_renewal` | one connection after the other |
| `active_connection`, `signals` | the tasks of one connection |
| `protocol_connection`, `server_messages` | the protocol of one connection, without I/O |
| `in_flight_requests`, `channel_memberships` | requests and memberships that outlive a connection, without I/O |
| `subscription_manager`, `shared_subscription`, `message_queue` | subscriptions that outlive it, without I/O |
| `retained_queue`, `presence_queue`, `state_queue`, `live_state` | the state of a live map, without I/O |
| `transport_interface`, `websocket_transport`, `webtransport_transport` | the transports |
| `broker_address`, `happy_eyeballs` | the address of a broker, and which of several transports is used |
"""

from ..errors import ConflictError, Disconnected, Refused
from .bus import Bus
from .bus_factory import connect, open_bus
from .live_map import Changes, LiveMap
from .live_state import Change
from .membership import Membership
from .messages import Messages
from .reconnect_policy import Backoff, Ended, Reconnected, Reconnecting, State
from .server_messages import Gap, GoAway, Head, Live, MemberKey, Message, Page, PresentMember
from .transport_interface import Transport

__all__ = [
    "Backoff",
    "Bus",
    "Change",
    "Changes",
    "ConflictError",
    "Disconnected",
    "Ended",
    "Gap",
    "GoAway",
    "Head",
    "Live",
    "LiveMap",
    "MemberKey",
    "Membership",
    "Message",
    "Messages",
    "Page",
    "PresentMember",
    "Reconnected",
    "Reconnecting",
    "Refused",
    "State",
    "Transport",
    "connect",
    "open_bus",
]
