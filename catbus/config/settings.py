"""Everything that can be set, with its default, and what its value may be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct

from ..errors import ConfigError
from .addresses import is_loopback, redact, split_address

# What a value may be. The description is what an error says was expected.

_TEN_YEARS = 315_360_000.0
_DURATION = 'a duration: seconds, or text like "30s", "5m" or "1h"'

Text = Annotated[str, Meta(min_length=1, description="text")]
Duration = Annotated[float, Meta(ge=0, le=_TEN_YEARS, description=_DURATION)]
Timeout = Annotated[float, Meta(gt=0, le=_TEN_YEARS, description=f"{_DURATION}, above 0")]
Size = Annotated[int, Meta(gt=0, le=2**53, description='a size above 0: bytes, or text like "64KiB" or "1MiB"')]
LogSize = Annotated[int, Meta(ge=64 << 20, le=2**53, description='a size of 64 MiB at least, like "10GiB"')]
Count = Annotated[int, Meta(gt=0, le=2**53, description="a whole number above 0")]
Switch = Annotated[bool, Meta(description="true or false")]
File = Annotated[str, Meta(min_length=1, description="a path")]
Secret = Annotated[str, Meta(min_length=1, description="a secret: text that is not empty")]
Address = Annotated[str, Meta(description='an address with a port, like "127.0.0.1:8080" or "[::1]:8080"')]
DatabaseUrl = Annotated[str, Meta(description='"embedded", "memory" or a URL that begins with postgres://')]
PostgresUrl = Annotated[str, Meta(description="a URL that begins with postgres://")]
Levels = Annotated[str, Meta(description='log levels, like "info" or "catbus=info,aioquic=warning"')]
Format = Literal["auto", "json", "text"]
SynchronousCommit = Literal["on", "off", "local", "remote_write", "remote_apply"]
Failover = Literal["lossy", "lossless"]


class Section(Struct, frozen=True, kw_only=True):
    """Settings that belong together. What is secret never shows in `repr`."""

    hidden: ClassVar[frozenset[str]] = frozenset()

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


class Drain(Section, frozen=True, kw_only=True):
    """How a broker leaves: not ready for `delay`, sends its clients away over `window`, closes after `deadline`."""

    delay: Duration = 5.0
    window: Duration = 5.0
    deadline: Duration = 10.0


class Logging(Section, frozen=True, kw_only=True):
    """What `catbus run` writes to its output: `auto` is text on a terminal and JSON elsewhere."""

    levels: Levels = "catbus=info"
    format: Format = "auto"


class Config(Section, frozen=True, kw_only=True):
    """The whole of it. Without arguments: a log in memory, the ports of the deployment guide, no secret."""

    state: File | None = None
    """Where a broker keeps what is its own; see `state_directory`."""
    database: Database = Database()
    retention: Retention = Retention()
    auth: Auth = Auth()
    websocket: WebSocket = WebSocket()
    webtransport: WebTransport = WebTransport()
    limits: Limits = Limits()
    drain: Drain = Drain()
    logging: Logging = Logging()

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
