"""How a broker is set up: built-in defaults, then a TOML file, then the environment, then the command line."""

from .environment_variables import variable
from .loader import ENVIRONMENT, Reading, differences, keys, load, read, show
from .log_levels import parse_levels
from .network_addresses import is_loopback, join_address, redact, split_address
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
from .value_types import parse_duration, parse_size
from .weak_secrets import MAKE_ONE, find_weak_secrets, weakness

__all__ = [
    "ENVIRONMENT",
    "MAKE_ONE",
    "Auth",
    "Config",
    "Database",
    "Drain",
    "Limits",
    "Logging",
    "Reading",
    "Retention",
    "WebSocket",
    "WebTransport",
    "default_state_directory",
    "differences",
    "find_weak_secrets",
    "is_loopback",
    "join_address",
    "keys",
    "load",
    "parse_duration",
    "parse_levels",
    "parse_size",
    "read",
    "redact",
    "show",
    "split_address",
    "variable",
    "weakness",
]
