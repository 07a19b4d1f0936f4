"""The configuration of a broker: defaults, then a TOML file, then environment variables, then the command line."""

from .environment_variables import variable_name
from .loader import (
    VARIABLES,
    LoadedConfig,
    changed_settings,
    load,
    load_with_sources,
    setting_descriptions,
    show_setting,
)
from .log_levels import parse_levels
from .network_addresses import is_loopback, is_url, join_address, redact_url, split_address
from .settings import (
    AuthSettings,
    Config,
    DatabaseSettings,
    DrainSettings,
    EventsSettings,
    LimitSettings,
    LoggingSettings,
    PresenceSettings,
    RetentionSettings,
    RunSettings,
    WebhookSettings,
    WebSocketSettings,
    WebTransportSettings,
    default_state_directory,
)
from .value_types import parse_duration, parse_size
from .weak_secrets import SECRET_COMMAND, find_weak_secrets, find_weakness

__all__ = [
    "SECRET_COMMAND",
    "VARIABLES",
    "AuthSettings",
    "Config",
    "DatabaseSettings",
    "DrainSettings",
    "EventsSettings",
    "LimitSettings",
    "LoadedConfig",
    "LoggingSettings",
    "PresenceSettings",
    "RetentionSettings",
    "RunSettings",
    "WebSocketSettings",
    "WebTransportSettings",
    "WebhookSettings",
    "changed_settings",
    "default_state_directory",
    "find_weak_secrets",
    "find_weakness",
    "is_loopback",
    "is_url",
    "join_address",
    "load",
    "load_with_sources",
    "parse_duration",
    "parse_levels",
    "parse_size",
    "redact_url",
    "setting_descriptions",
    "show_setting",
    "split_address",
    "variable_name",
]
