"""How a broker is set up: built-in defaults, then a TOML file, then the environment, then the command line."""

from .addresses import is_loopback, join_address, redact, split_address
from .levels import parse_levels
from .reading import ENVIRONMENT, keys, load
from .settings import (
    Auth,
    Config,
    Database,
    Drain,
    Limits,
    Logging,
    Retention,
    WebSocket,
    WebTransport,
    default_state_directory,
)
from .values import parse_duration

__all__ = [
    "ENVIRONMENT",
    "Auth",
    "Config",
    "Database",
    "Drain",
    "Limits",
    "Logging",
    "Retention",
    "WebSocket",
    "WebTransport",
    "default_state_directory",
    "is_loopback",
    "join_address",
    "keys",
    "load",
    "parse_duration",
    "parse_levels",
    "redact",
    "split_address",
]
