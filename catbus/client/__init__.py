"""The client, for asyncio and Trio: `connect` to a broker, publish, subscribe.

`conversation` is the protocol without I/O, `inbox` what one subscription holds, `link` the tasks that carry bytes,
`websocket` and `webtransport` the transports, `racing` the way to a host with several addresses; `bus` and
`subscription` are what an application holds in its hands.
"""

from ..errors import Disconnected, Refused
from .bus import Bus
from .connecting import connect, open_bus
from .messages import Gap, GoAway, Head, Live, Message, Page
from .subscription import Messages
from .transport import Transport

__all__ = [
    "Bus",
    "Disconnected",
    "Gap",
    "GoAway",
    "Head",
    "Live",
    "Message",
    "Messages",
    "Page",
    "Refused",
    "Transport",
    "connect",
    "open_bus",
]
