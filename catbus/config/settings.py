"""Everything that can be set, with its default, and what its value may be."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_type_hints

from msgspec import Struct, field, structs

from ..errors import ConfigError
from .network_addresses import is_loopback, redact, split_address
from .value_types import (
    Address,
    Count,
    DatabaseUrl,
    Duration,
    Failover,
    File,
    Format,
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
    convert,
    mistake,
)


class Section(Struct, frozen=True, kw_only=True):
    """Settings that belong together, checked and converted as if a file had them. Secrets never show in `repr`.

    Making one raises `ConfigError`, which says which setting, what was expected and what was found.
    """

    hidden: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for setting in settings_of(type(self)):
            self._take(setting)

    def _take(self, setting: Setting) -> None:
        given = getattr(self, setting.field)
        try:
            structs.force_setattr(self, setting.field, convert(setting.hint, given))
        except ValueError:
            raise ConfigError(f"{setting.name}: {mistake(setting.hint, given, hidden=setting.hidden)}") from None

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self._show(name)}" for name in self.__struct_fields__)
        return f"{type(self).__name__}({shown})"

    def _show(self, name: str) -> str:
        value = getattr(self, name)
        return "***" if name in self.hidden and value else repr(value)


class Database(Section, frozen=True, kw_only=True):
    """Where the log is kept: "memory", "embedded" (a private PostgreSQL in the state directory), or postgres://."""

    hidden = frozenset({"url", "listen_url"})

    url: DatabaseUrl = "memory"
    listen_url: PostgresUrl | None = None
    """A way to the same database past a connection pooler, through which no notifications come."""
    synchronous_commit: SynchronousCommit = "on"
    failover: Failover = "lossy"
    """Whether a standby that takes over can lack what was committed; "lossless" where commits wait for it."""
    publish_timeout: Timeout = 5.0
    """How long a publish waits for a database that is away before it is refused."""
    connect_timeout: Timeout = 5.0

    def _show(self, name: str) -> str:
        value = getattr(self, name)
        return repr(redact(value)) if value and name in self.hidden else super()._show(name)


class Retention(Section, frozen=True, kw_only=True):
    """How much of the log stays in PostgreSQL. What is more than `size` goes, however young it is."""

    age: Timeout = 86_400.0
    """The log keeps so much at least, and 8/7 of it at the most."""
    size: LogSize = 10 << 30
    """What its tables may take up, with their indexes."""


class Auth(Section, frozen=True, kw_only=True, rename={"secrets": "secret"}):
    """Who may come in. `secrets`: the first signs, all of them verify. `jwt`: files with public keys or key sets."""

    hidden = frozenset({"secrets", "admin_key"})

    secrets: tuple[Secret, ...] = ()
    admin_key: Secret | None = None
    jwt: tuple[File, ...] = ()
    leeway: Duration = 30.0
    """By how much the clock of whoever makes tokens may differ from this one."""
    allow_weak_secrets: Switch = False
    """Whether others may reach a broker whose secret can be guessed; for trying it."""


class WebSocket(Section, frozen=True, kw_only=True):
    """The port for WebSocket and plain HTTP. Without an address there is none."""

    bind: tuple[Address, ...] = ("0.0.0.0:8080",)
    tls: Switch = False
    """Whether it speaks TLS, with the same certificate as WebTransport, instead of leaving that to a proxy."""
    allowed_origins: tuple[Text, ...] = ()
    """Pages on other origins are refused, when this names any."""
    send_buffer: Size = 131_072
    """How much the kernel may hold for one client that reads slowly."""
    ping_interval: Timeout = 20.0
    silence: Timeout = 60.0
    """A client that was not heard for so long is gone."""
    trusted_proxies: tuple[Network, ...] = ()
    """Addresses of proxies: what these say of where a client is, is believed; what others say is not."""


class WebTransport(Section, frozen=True, kw_only=True):
    """The port for WebTransport. Without a certificate it is served to this machine only, with one made for it."""

    bind: tuple[Address, ...] = ("0.0.0.0:4433",)
    cert: File | None = None
    key: File | None = None


class Limits(Section, frozen=True, kw_only=True):
    """What one client, or all of them, may ask of this replica."""

    message_size: Size = 65_536
    subscriptions: Count = 1000
    """Of one session."""
    subscriptions_total: Count = 1_000_000
    """Of all sessions together; one client may have as many as there is room left."""
    pending_publishes: Count = 1000
    """Of one session: publishes that are not answered yet."""
    pending_total: Count = 100_000
    """Of all sessions together."""
    mailbox: Size = 524_288
    """What may wait for one client before it is served from the log, later."""
    mailbox_total: Size = 268_435_456
    """What may wait for all of them; over it, those for whom most is waiting are served from the log first."""
    recent: Size = 67_108_864
    """How much of the newest part of the log stays in memory."""
    auth_timeout: Timeout = 10.0
    token_grace: Duration = 30.0
    """How long a session outlives its token."""
    connections: Count = 10_000
    address_connections: Count = 5_000
    """Of one address, or /64 of IPv6, that is not this machine's and no trusted proxy's."""
    sessions: Count = 10_000
    """Of one client: a client_id, or a token without one in one network."""
    client_id: Size = 256
    """Bytes that a client_id may have."""
    publish_rate: Count = 100_000
    """Messages that one client may publish in a second."""
    publish_bytes: Size = 134_217_728
    """Bytes of them."""


class Drain(Section, frozen=True, kw_only=True):
    """How a broker stops. Each of the three ends early when no client is left, but for `delay`."""

    delay: Duration = 0.0
    """How long it is not ready and goes on, for a load balancer that has to see it."""
    window: Duration = 5.0
    """Over how long clients are told to leave, at most; few clients need less."""
    deadline: Duration = 10.0
    """How long what clients have sent may take to be answered, and connections to close."""


class Logging(Section, frozen=True, kw_only=True):
    """What `catbus run` writes to its output: `auto` is text on a terminal and JSON elsewhere."""

    levels: Levels = "catbus=info"
    format: Format = "auto"


class Config(Section, frozen=True, kw_only=True):
    """The whole of it. Without arguments: a log in memory, the ports of the deployment guide, no secret."""

    state: File | None = None
    """Where a broker keeps what is its own; see `state_directory`."""
    database: Database = field(default_factory=Database)
    retention: Retention = field(default_factory=Retention)
    auth: Auth = field(default_factory=Auth)
    websocket: WebSocket = field(default_factory=WebSocket)
    webtransport: WebTransport = field(default_factory=WebTransport)
    limits: Limits = field(default_factory=Limits)
    drain: Drain = field(default_factory=Drain)
    logging: Logging = field(default_factory=Logging)

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
        """Whether nobody but this machine can reach the ports that a broker opens with this configuration."""
        return _all_loopback(self.websocket.bind + (self.webtransport.bind if self.webtransport_served else ()))

    @property
    def webtransport_served(self) -> bool:
        """Whether there is a certificate for it, or nobody but this machine comes, for whom one is made."""
        settings = self.webtransport
        return bool(settings.bind) and (settings.cert is not None or _all_loopback(settings.bind))

    @property
    def certificate_needed(self) -> bool:
        """Whether anything that is served has a certificate."""
        return self.webtransport_served or (self.websocket.tls and bool(self.websocket.bind))


def _check_together(config: Config) -> None:
    database, transport, socket = config.database, config.webtransport, config.websocket
    if database.failover == "lossless" and database.synchronous_commit in ("off", "local"):
        raise ConfigError(
            'database.failover is "lossless", and with database.synchronous_commit = '
            f'"{database.synchronous_commit}" no commit waits for a standby'
        )
    if (transport.cert is None) != (transport.key is None):
        given, missing = ("cert", "key") if transport.cert else ("key", "cert")
        raise ConfigError(
            f"webtransport.{given} is set without webtransport.{missing}: set both (CATBUS_CERT and CATBUS_KEY)"
        )
    if socket.tls and transport.cert is None and not config.loopback:
        raise ConfigError(
            "websocket.tls is true, and there is no certificate: set webtransport.cert and webtransport.key "
            "(CATBUS_CERT and CATBUS_KEY), or leave TLS to a proxy"
        )
    if socket.silence <= socket.ping_interval:
        raise ConfigError(
            f"websocket.silence ({socket.silence:g} s) has to be longer than "
            f"websocket.ping_interval ({socket.ping_interval:g} s)"
        )


class Setting(NamedTuple):
    """One setting: its dotted name as a file has it, the field that holds it, and what its value may be."""

    name: str
    field: str
    hint: Any
    hidden: bool


@cache
def sections() -> dict[str, type[Section]]:
    """The sections of a configuration by name."""
    hints = get_type_hints(Config)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Section)}


@cache
def settings_of(kind: type[Section]) -> tuple[Setting, ...]:
    """The settings of a section, or of `Config` those that stand in none."""
    prefix = "" if kind is Config else f"{kind.__name__.lower()}."
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        Setting(prefix + each.encode_name, each.name, hints[each.name], each.name in kind.hidden)
        for each in structs.fields(kind)
        if prefix or each.name not in sections()
    )


@cache
def settings() -> dict[str, Setting]:
    """All settings by name."""
    return {setting.name: setting for kind in (Config, *sections().values()) for setting in settings_of(kind)}


def unknown(name: str) -> str:
    """Say that no setting has this name, and which have one like it."""
    section, _, key = name.rpartition(".")
    prefix = f"{section}." if section else ""
    known = [other.removeprefix(prefix) for other in settings() if other.rpartition(".")[0] == section]
    if not section:
        known += [f"[{each}]" for each in sections()]
    close = difflib.get_close_matches(key, known, n=1)
    guess = f' (did you mean "{close[0]}"?)' if close else ""
    return f"unknown key{guess}; known are {', '.join(sorted(known))}"


def _section(name: str, kind: type[Section], given: object) -> Section:
    """A section that is given as such, or as a table with the names that a file has."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}: expected a table, or a {kind.__name__}; found a {type(given).__name__}")
    fields = {}
    for key, value in given.items():
        setting = settings().get(f"{name}.{key}")
        if setting is None:
            raise ConfigError(f"{name}.{key}: {unknown(f'{name}.{key}')}")
        fields[setting.field] = value
    return kind(**fields)


def _all_loopback(addresses: tuple[str, ...]) -> bool:
    return all(is_loopback(split_address(address)[0]) for address in addresses)


def default_state_directory(environ: Mapping[str, str]) -> Path:
    """Where state is kept when nothing says where.

    For root it is where the unprivileged user of the embedded database can get to: a home may be closed to others.
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
        raise ConfigError("there is no home directory to keep state in: set CATBUS_STATE to a directory") from None
