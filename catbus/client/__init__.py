"""The client, for asyncio and Trio: `connect` to a broker, publish, subscribe.

`conversation` is one connection's protocol without I/O; `ledger` (what has no answer yet), `switchboard`, `feed` and
`inbox` (the subscriptions) outlive it. `link` is the tasks that carry its bytes, `supervisor` makes one connection
after the other, as `coming_back` says; `websocket` and `webtransport` are the transports, `racing` is the way to a host
with several addresses. `bus` and `subscription` are what an application holds in its hands.
"""

from ..errors import Disconnected, Refused
from .bus import Bus
from .coming_back import Backoff, Ended, Reconnected, Reconnecting, State
from .connecting import connect, open_bus
from .messages import Gap, GoAway, Head, Live, Message, Page
from .subscription import Messages
from .transport import Transport

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
