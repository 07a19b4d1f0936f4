"""All settings, with their defaults and the types of their values."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_type_hints

from msgspec import Struct, field, structs

from ..errors import ConfigError
from .network_addresses import is_loopback, redact_url, split_address
from .value_types import (
    Address,
    Count,
    DatabaseUrl,
    Duration,
    Failover,
    File,
    Format,
    KeySource,
    Levels,
    LogSize,
    Network,
    PostgresUrl,
    Secret,
    Size,
    Switch,
    SynchronousCommit,
    Text,
    Timeout,
    Workers,
    convert_value,
    describe_mismatch,
)


class Section(Struct, frozen=True, kw_only=True):
    """A section of settings, checked and converted in the same way as those of a file. `repr` never shows secrets.

    The constructor raises `ConfigError` with the setting, the expected value and the found value.
    """

    hidden: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for setting in settings_of(type(self)):
            self._take(setting)

    def _take(self, setting: Setting) -> None:
        given = getattr(self, setting.field)
        try:
            structs.force_setattr(self, setting.field, convert_value(setting.hint, given))
        except ValueError:
            raise ConfigError(
                f"{setting.name}: {describe_mismatch(setting.hint, given, hidden=setting.hidden)}"
            ) from None

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self._show(name)}" for name in self.__struct_fields__)
        return f"{type(self).__name__}({shown})"

    def _show(self, name: str) -> str:
        value = getattr(self, name)
        return "***" if name in self.hidden and value else repr(value)


class RunSettings(Section, frozen=True, kw_only=True):
    """The processes of `catbus run`. A program that embeds the broker has one, whatever this says."""

    workers: Workers = 1
    """Processes that share the ports, each a replica. "auto": one for each core. They need a log in PostgreSQL."""


class DatabaseSettings(Section, frozen=True, kw_only=True):
    """The database of the log: "memory", "embedded" (a private PostgreSQL in the state directory), or postgres://."""

    hidden = frozenset({"url", "listen_url"})

    url: DatabaseUrl = "memory"
    listen_url: PostgresUrl | None = None
    """A direct URL of the same database, for LISTEN: connection poolers do not pass on notifications."""
    synchronous_commit: SynchronousCommit = "on"
    failover: Failover = "lossy"
    """Whether a promoted standby can lack committed messages. "lossless" if commits wait for the standby."""
    publish_timeout: Timeout = 5.0
    """Time that a publish waits for an unreachable database before it is rejected."""
    connect_timeout: Timeout = 5.0

    def _show(self, name: str) -> str:
        value = getattr(self, name)
        return repr(redact_url(value)) if value and name in self.hidden else super()._show(name)


class RetentionSettings(Section, frozen=True, kw_only=True):
    """The part of the log that is kept in PostgreSQL. Messages above `size` are deleted, whatever their age.

    Retained messages are kept apart from it, in PostgreSQL or in memory.
    """

    age: Timeout = 86_400.0
    """Messages are kept for this time at least, and for 8/7 of it at most."""
    size: LogSize = 10 << 30
    """The maximum size of its tables with their indexes."""
    retained: Size = 256 << 20
    """The maximum size of the channels, payloads and senders of all retained messages."""


class AuthSettings(Section, frozen=True, kw_only=True, rename={"secrets": "secret"}):
    """Authentication. `secrets`: the first signs, all verify. `jwt`: files with public keys or key sets, or URLs of key
    sets."""

    hidden = frozenset({"secrets", "admin_key"})

    secrets: tuple[Secret, ...] = ()
    admin_key: Secret | None = None
    jwt: tuple[KeySource, ...] = ()
    issuer: tuple[Text, ...] = ()
    """If not empty, JWTs of other issuers are rejected."""
    audience: tuple[Text, ...] = ()
    """If not empty, JWTs that are for none of these are rejected."""
    leeway: Duration = 30.0
    """The tolerated difference between the clock of the token issuer and this one."""
    allow_weak_secrets: Switch = False
    """Whether a broker that other machines can reach may have a weak secret, for a trial."""


class WebSocketSettings(Section, frozen=True, kw_only=True):
    """The listener for WebSocket and HTTP. It is disabled without an address."""

    bind: tuple[Address, ...] = ("0.0.0.0:8080",)
    tls: Switch = False
    """Whether the listener uses TLS, with WebTransport's certificate. Otherwise a proxy can terminate TLS."""
    allowed_origins: tuple[Text, ...] = ()
    """If not empty, pages of other origins are refused."""
    send_buffer: Size = 131_072
    """Size of the kernel's send buffer (SO_SNDBUF) of one connection."""
    ping_interval: Timeout = 20.0
    silence: Timeout = 60.0
    """Time without data from a client, after which its connection is closed."""
    trusted_proxies: tuple[Network, ...] = ()
    """Addresses of proxies whose forwarded headers about a client's address are trusted."""


class WebTransportSettings(Section, frozen=True, kw_only=True):
    """The listener for WebTransport. Without a certificate it serves only loopback addresses, with a generated one."""

    bind: tuple[Address, ...] = ("0.0.0.0:4433",)
    cert: File | None = None
    key: File | None = None


class LimitSettings(Section, frozen=True, kw_only=True):
    """Limits on what one client, or all clients together, may use of this replica."""

    message_size: Size = 65_536
    subscriptions: Count = 1000
    """Subscriptions of one session."""
    subscriptions_total: Count = 1_000_000
    """Subscriptions of all sessions together. One client can use at most the same number as remains free."""
    joined_channels: Count = 100
    """Channels of which one session is a member."""
    pending_publishes: Count = 1000
    """Unacknowledged publishes of one session."""
    pending_total: Count = 100_000
    """Unacknowledged publishes of all sessions together."""
    send_queue: Size = 524_288
    """Bytes that may wait in the send queue of one session. Above it, subscriptions lag and read from the log."""
    send_queue_total: Size = 268_435_456
    """Bytes in all send queues. Above it, subscriptions with the longest send queues lag and read from the log."""
    recent: Size = 67_108_864
    """Bytes of the newest messages that are kept in memory."""
    auth_timeout: Timeout = 10.0
    token_grace: Duration = 30.0
    """Time that a session continues after its token has expired."""
    connections: Count = 10_000
    address_connections: Count = 5_000
    """Connections of one IPv4 address or IPv6 /64, except loopback addresses and trusted proxies."""
    sessions: Count = 10_000
    """Sessions of one client: a client_id, or a token without client_id in one network."""
    client_id: Size = 256
    """Bytes of a client_id."""
    publish_rate: Count = 100_000
    """Messages per second that one client may publish."""
    publish_bytes: Size = 134_217_728
    """Bytes per second that one client may publish."""


class EventsSettings(Section, frozen=True, kw_only=True):
    """What the broker publishes of itself, on reserved channels."""

    sessions: Switch = False
    """Whether each session that opens or closes is published on `_catbus.sessions.CLIENT`."""


class PresenceSettings(Section, frozen=True, kw_only=True):
    """Who is in which channel."""

    grace: Duration = 10.0
    """Time for which a member whose session has ended may come back before it is announced as gone."""
    sessions: Switch = False
    """Whether each session is a member of `_catbus.sessions`."""


class WebhookSettings(Section, frozen=True, kw_only=True):
    """Deliveries of the messages of consumers to URLs, which the replicas share."""

    enabled: Switch = True
    """Whether this replica delivers. Another one can deliver instead."""
    timeout: Timeout = 15.0
    """Time for one request, until the response."""
    batch: Count = 100
    """Messages of one request at most."""
    batch_size: Size = 262_144
    """Bytes of the messages of one request. A single message may have more."""
    attempts: Count = 20
    """Failed attempts after which a message becomes a dead letter."""
    deliveries: Count = 100
    """Requests at the same time. One consumer uses at most half of them."""
    allow: tuple[Network, ...] = ()
    """Private networks to which this replica delivers, also without TLS."""


class DrainSettings(Section, frozen=True, kw_only=True):
    """The graceful shutdown. `window` and `deadline` end early when no client is connected; `delay` does not."""

    delay: Duration = 0.0
    """Time to serve while not ready, so that load balancers notice."""
    window: Duration = 5.0
    """Maximum time over which clients are told to reconnect elsewhere. Few clients take less."""
    deadline: Duration = 10.0
    """Time for pending requests to be answered and connections to close."""


class LoggingSettings(Section, frozen=True, kw_only=True):
    """The log output of `catbus run`. The format `auto` is text on a terminal and JSON elsewhere."""

    levels: Levels = "catbus=info"
    format: Format = "auto"


class Config(Section, frozen=True, kw_only=True):
    """A complete configuration. Without arguments: a log in memory, the default ports, no secret."""

    state: File | None = None
    """The directory of the broker's own files; see `state_directory`."""
    run: RunSettings = field(default_factory=RunSettings)
    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
    websocket: WebSocketSettings = field(default_factory=WebSocketSettings)
    webtransport: WebTransportSettings = field(default_factory=WebTransportSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    events: EventsSettings = field(default_factory=EventsSettings)
    presence: PresenceSettings = field(default_factory=PresenceSettings)
    webhooks: WebhookSettings = field(default_factory=WebhookSettings)
    drain: DrainSettings = field(default_factory=DrainSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def __post_init__(self) -> None:
        for name, kind in sections().items():
            structs.force_setattr(self, name, _section(name, kind, getattr(self, name)))
        super().__post_init__()
        _check_together(self)

    @property
    def state_directory(self) -> Path:
        """The directory for the embedded database and the development secret. It need not exist yet."""
        return Path(self.state) if self.state else default_state_directory(os.environ)

    @property
    def loopback(self) -> bool:
        """Whether all ports of the broker are bound to loopback addresses, so that only this machine can reach them."""
        return _all_loopback(self.websocket.bind + (self.webtransport.bind if self.webtransport_served else ()))

    @property
    def webtransport_served(self) -> bool:
        """Whether WebTransport is served: with a certificate, or on loopback addresses only, with a generated one."""
        settings = self.webtransport
        return bool(settings.bind) and (settings.cert is not None or _all_loopback(settings.bind))

    @property
    def certificate_needed(self) -> bool:
        """Whether a listener uses a certificate."""
        return self.webtransport_served or (self.websocket.tls and bool(self.websocket.bind))


def _check_together(config: Config) -> None:
    database, transport, socket = config.database, config.webtransport, config.websocket
    if database.failover == "lossless" and database.synchronous_commit in ("off", "local"):
        raise ConfigError(
            'database.failover is "lossless", but with database.synchronous_commit = '
            f'"{database.synchronous_commit}" no commit waits for a standby'
        )
    if (transport.cert is None) != (transport.key is None):
        given, missing = ("cert", "key") if transport.cert else ("key", "cert")
        raise ConfigError(
            f"webtransport.{given} is set without webtransport.{missing}: set both (CATBUS_CERT and CATBUS_KEY)"
        )
    if socket.tls and transport.cert is None and not config.loopback:
        raise ConfigError(
            "websocket.tls is true without a certificate: set webtransport.cert and webtransport.key "
            "(CATBUS_CERT and CATBUS_KEY), or terminate TLS in a proxy"
        )
    if socket.silence <= socket.ping_interval:
        raise ConfigError(
            f"websocket.silence ({socket.silence:g} s) must be longer than "
            f"websocket.ping_interval ({socket.ping_interval:g} s)"
        )


RENAMED = {"limits.mailbox": "limits.send_queue", "limits.mailbox_total": "limits.send_queue_total"}
"""Earlier names of settings. Using one is an error that names the present one."""


class Setting(NamedTuple):
    """One setting: its dotted name in a file, its field, its type, and whether it is secret."""

    name: str
    field: str
    hint: Any
    hidden: bool


@cache
def sections() -> dict[str, type[Section]]:
    """Return the sections of a configuration by name."""
    hints = get_type_hints(Config)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Section)}


@cache
def settings_of(kind: type[Section]) -> tuple[Setting, ...]:
    """Return the settings of a section, or for `Config` those outside of sections."""
    prefix = next((f"{name}." for name, section in sections().items() if section is kind), "")
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        Setting(prefix + each.encode_name, each.name, hints[each.name], each.name in kind.hidden)
        for each in structs.fields(kind)
        if prefix or each.name not in sections()
    )


@cache
def settings() -> dict[str, Setting]:
    """Return all settings by name."""
    return {setting.name: setting for kind in (Config, *sections().values()) for setting in settings_of(kind)}


def explain_unknown_key(name: str) -> str:
    """Return the error text for an unknown setting, with the setting that was probably meant."""
    if name in RENAMED:
        return f"unknown key; its name is {RENAMED[name]} now"
    section, _, key = name.rpartition(".")
    prefix = f"{section}." if section else ""
    known = [other.removeprefix(prefix) for other in settings() if other.rpartition(".")[0] == section]
    if not section:
        known += [f"[{each}]" for each in sections()]
    close = difflib.get_close_matches(key, known, n=1)
    guess = f' (did you mean "{close[0]}"?)' if close else ""
    return f"unknown key{guess}; known are {', '.join(sorted(known))}"


def _section(name: str, kind: type[Section], given: object) -> Section:
    """Return a section that is given as an object, or as a table with the names of a file."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}: expected a table, or a {kind.__name__}; found a {type(given).__name__}")
    fields = {}
    for key, value in given.items():
        setting = settings().get(f"{name}.{key}")
        if setting is None:
            raise ConfigError(f"{name}.{key}: {explain_unknown_key(f'{name}.{key}')}")
        fields[setting.field] = value
    return kind(**fields)


def _all_loopback(addresses: tuple[str, ...]) -> bool:
    return all(is_loopback(split_address(address)[0]) for address in addresses)


def default_state_directory(environ: Mapping[str, str]) -> Path:
    """Return the default state directory.

    For root, the unprivileged user of the embedded database must be able to reach it, and a home directory may be
    closed to other users.
    """
    if chosen := environ.get("CATBUS_STATE", "").strip():
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/catbus")
    if base := environ.get("XDG_STATE_HOME", "").strip():
        return Path(base) / "catbus"
    try:
        return Path.home() / ".local" / "state" / "catbus"
    except RuntimeError:
        raise ConfigError("there is no home directory for the state: set CATBUS_STATE to a directory") from None
