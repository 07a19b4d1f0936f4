"""A real-time message broker on Trio: WebTransport and WebSocket clients, one durable log in PostgreSQL.

`serve` runs a broker, `open_broker` one without endpoints for this process alone, `connect` is the client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .broker import Broker, open_broker, serve
    from .client import (
        Backoff,
        Bus,
        Ended,
        Gap,
        GoAway,
        Head,
        Live,
        Message,
        Messages,
        Page,
        Reconnected,
        Reconnecting,
        State,
        connect,
    )
    from .close_codes import CloseCode
    from .config import Config, load
    from .error_codes import ErrorCode
    from .errors import CatbusError, ConfigError, Disconnected, PeerError, Refused, Unavailable
    from .in_process import LocalMessage, LocalPage
    from .session.hooks import AuthenticatedClient, ClientInfo, Replacement
    from .session.session_report import SessionReport

_HOMES = {
    "broker": ("Broker", "open_broker", "serve"),
    "client": (
        "Backoff",
        "Bus",
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
        "State",
        "connect",
    ),
    "config": ("Config", "load"),
    "close_codes": ("CloseCode",),
    "error_codes": ("ErrorCode",),
    "errors": (
        "CatbusError",
        "ConfigError",
        "Disconnected",
        "PeerError",
        "Refused",
        "Unavailable",
    ),
    "in_process": ("LocalMessage", "LocalPage"),
    "session.hooks": ("AuthenticatedClient", "ClientInfo", "Replacement"),
    "session.session_report": ("SessionReport",),
}

__all__ = [
    "AuthenticatedClient",
    "Backoff",
    "Broker",
    "Bus",
    "CatbusError",
    "ClientInfo",
    "CloseCode",
    "Config",
    "ConfigError",
    "Disconnected",
    "Ended",
    "ErrorCode",
    "Gap",
    "GoAway",
    "Head",
    "Live",
    "LocalMessage",
    "LocalPage",
    "Message",
    "Messages",
    "Page",
    "PeerError",
    "Reconnected",
    "Reconnecting",
    "Refused",
    "Replacement",
    "SessionReport",
    "State",
    "Unavailable",
    "connect",
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
