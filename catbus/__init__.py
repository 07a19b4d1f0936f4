"""A real-time message broker on Trio: WebTransport and WebSocket clients, one durable log in PostgreSQL.

`serve` runs a broker, `open_broker` one without endpoints for this process alone, `connect` is the client,
and `consume` a worker that processes each message exactly once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .broker import Broker, open_broker, serve
    from .client import (
        Backoff,
        Bus,
        Change,
        Changes,
        Ended,
        Gap,
        GoAway,
        Head,
        Live,
        LiveMap,
        MemberKey,
        Membership,
        Message,
        Messages,
        Page,
        PresentMember,
        Reconnected,
        Reconnecting,
        State,
        connect,
    )
    from .close_codes import CloseCode
    from .config import Config, load
    from .error_codes import ErrorCode
    from .errors import (
        CatbusError,
        ConfigError,
        ConflictError,
        ConsumerError,
        Disconnected,
        PeerError,
        Refused,
        Unavailable,
    )
    from .in_process import LocalMessage, LocalPage, LocalSnapshot
    from .session.hooks import AuthenticatedClient, ClientInfo, Replacement
    from .session.session_report import SessionReport
    from .worker import ConsumerMessage, WorkStatistics, consume, consume_blocking
    from .worker.trio_session import TrioConnection

_HOMES = {
    "broker": ("Broker", "open_broker", "serve"),
    "client": (
        "Backoff",
        "Bus",
        "Change",
        "Changes",
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
        "State",
        "connect",
    ),
    "config": ("Config", "load"),
    "close_codes": ("CloseCode",),
    "error_codes": ("ErrorCode",),
    "errors": (
        "CatbusError",
        "ConfigError",
        "ConflictError",
        "ConsumerError",
        "Disconnected",
        "PeerError",
        "Refused",
        "Unavailable",
    ),
    "in_process": ("LocalMessage", "LocalPage", "LocalSnapshot"),
    "session.hooks": ("AuthenticatedClient", "ClientInfo", "Replacement"),
    "session.session_report": ("SessionReport",),
    "worker": ("ConsumerMessage", "WorkStatistics", "consume", "consume_blocking"),
    "worker.trio_session": ("TrioConnection",),
}

__all__ = [
    "AuthenticatedClient",
    "Backoff",
    "Broker",
    "Bus",
    "CatbusError",
    "Change",
    "Changes",
    "ClientInfo",
    "CloseCode",
    "Config",
    "ConfigError",
    "ConflictError",
    "ConsumerError",
    "ConsumerMessage",
    "Disconnected",
    "Ended",
    "ErrorCode",
    "Gap",
    "GoAway",
    "Head",
    "Live",
    "LiveMap",
    "LocalMessage",
    "LocalPage",
    "LocalSnapshot",
    "MemberKey",
    "Membership",
    "Message",
    "Messages",
    "Page",
    "PeerError",
    "PresentMember",
    "Reconnected",
    "Reconnecting",
    "Refused",
    "Replacement",
    "SessionReport",
    "State",
    "TrioConnection",
    "Unavailable",
    "WorkStatistics",
    "connect",
    "consume",
    "consume_blocking",
    "load",
    "open_broker",
    "serve",
]


def __getattr__(name: str) -> Any:
    # A client need not wait for what only a broker is made of: that takes a second to import.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
