"""The URL of a database, in libpq's format: its parameters, and the hosts that it leads to."""

from __future__ import annotations

import difflib
import os
import pwd
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ...errors import ConfigError
from .tls import CERTIFICATES, make_context

PORT = 5432
_SOCKETS = "/run/postgresql", "/var/run/postgresql", "/tmp"  # noqa: S108 (PostgreSQL's own default)
"""The directories of the server's socket, by distribution."""
_BAD_ESCAPE = re.compile(r"%(?![0-9a-fA-F]{2})|%00")
_MODES = "disable", "allow", "prefer", "require", "verify-ca", "verify-full"
_VERSIONS = "TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"


@dataclass(frozen=True, slots=True)
class UrlParameter:
    """A parameter: `text` says what it does, or what to do instead. `values`: None allows any value, () allows none."""

    text: str
    values: tuple[str, ...] | None = None


_KEEPALIVE = UrlParameter("leave it out: a broker sets its own, so that it notices a dead database within 5 s", ())
_OAUTH = UrlParameter("leave it out: the driver has no OAuth; give a password or a client certificate", ())
_SCRAM_KEY = UrlParameter("leave it out: the driver derives the key itself; give the password", ())

PARAMETERS: Mapping[str, UrlParameter] = {
    "host": UrlParameter("a name, an address, or the directory of a Unix socket; several with commas, tried in order"),
    "hostaddr": UrlParameter("give the address as the host", ()),
    "port": UrlParameter("one for all hosts, or as many as hosts, with commas"),
    "dbname": UrlParameter("the database; the user's name when it is left out"),
    "database": UrlParameter("the same"),
    "user": UrlParameter("the role; the operating system's user when it is left out"),
    "password": UrlParameter("better in a file (`passfile`) or in `PGPASSWORD`"),
    "passfile": UrlParameter("a password file, of which nobody else may read; `~/.pgpass` is not looked for"),
    "require_auth": UrlParameter(
        "leave it out: the driver cannot; sslmode=verify-full keeps the password from another server", ()
    ),
    "channel_binding": UrlParameter(
        "leave it out: the driver cannot; sslmode=verify-full keeps others from standing in between as well",
        ("disable", "prefer"),
    ),
    "connect_timeout": UrlParameter("seconds for each host; `[database] connect_timeout` is for all of them together"),
    "client_encoding": UrlParameter("always UTF8", ("UTF8", "utf8", "UTF-8", "utf-8", "auto")),
    "options": UrlParameter("settings of the server, like `-c%20work_mem=8MB`; most poolers refuse them"),
    "application_name": UrlParameter("`catbus` when it is left out"),
    "fallback_application_name": UrlParameter("the same, where `application_name` is left out"),
    "keepalives": _KEEPALIVE,
    "keepalives_idle": _KEEPALIVE,
    "keepalives_interval": _KEEPALIVE,
    "keepalives_count": _KEEPALIVE,
    "tcp_user_timeout": _KEEPALIVE,
    "replication": UrlParameter("leave it out: a broker reads tables", ("false", "off", "no", "0")),
    "gssencmode": UrlParameter("leave it out: the driver encrypts with TLS only", ("disable", "prefer")),
    "sslmode": UrlParameter("`prefer` when it is left out; nothing for a Unix socket", _MODES),
    "ssl": UrlParameter("true is sslmode=require", ("true",)),
    "requiressl": UrlParameter("1 is sslmode=require, 0 is sslmode=prefer", ("0", "1")),
    "sslnegotiation": UrlParameter("`direct` takes PostgreSQL 17, and sslmode=require or more", ("postgres", "direct")),
    "sslcompression": UrlParameter("leave it out: compression under TLS gives secrets away", ("0",)),
    "sslcert": UrlParameter("the client's certificate; `~/.postgresql` is not looked at"),
    "sslkey": UrlParameter("its key"),
    "sslkeylogfile": UrlParameter("where the secrets of TLS connections are written, for debugging"),
    "sslpassword": UrlParameter("the password of `sslkey`"),
    "sslcertmode": UrlParameter(
        "`disable` sends no certificate; leave `require` out: a server asks for one in its pg_hba.conf",
        ("disable", "allow"),
    ),
    "sslrootcert": UrlParameter("who may have signed the server's certificate: a file, or `system`"),
    "sslcrl": UrlParameter("certificates that were revoked: a file"),
    "sslcrldir": UrlParameter("the same in a directory"),
    "sslsni": UrlParameter("leave it out: the host's name is always sent", ("1",)),
    "requirepeer": UrlParameter("leave it out: choose a socket directory that only PostgreSQL's user can write to", ()),
    "ssl_min_protocol_version": UrlParameter("`TLSv1.2` when it is left out", _VERSIONS),
    "ssl_max_protocol_version": UrlParameter("the newest that both know when it is left out", _VERSIONS),
    "min_protocol_version": UrlParameter("leave it out: the driver speaks 3.0", ("3.0",)),
    "max_protocol_version": UrlParameter(
        "the driver speaks 3.0, which is within all of them", ("3.0", "3.2", "latest")
    ),
    "krbsrvname": UrlParameter("the service's name for Kerberos, which takes the package `gssapi`"),
    "gsslib": UrlParameter("leave it out: there is only gssapi", ("gssapi",)),
    "gssdelegation": UrlParameter("leave it out: credentials are not passed on", ("0",)),
    "scram_client_key": _SCRAM_KEY,
    "scram_server_key": _SCRAM_KEY,
    "service": UrlParameter("write what the service file says into the URL", ()),
    "servicefile": UrlParameter("write what the service file says into the URL", ()),
    "target_session_attrs": UrlParameter(
        "`primary` when there are several hosts, otherwise `any`; a broker writes, so a standby is of no use to it",
        ("any", "read-write", "primary"),
    ),
    "load_balance_hosts": UrlParameter("`random` tries the hosts in another order each time", ("disable", "random")),
    "oauth_issuer": _OAUTH,
    "oauth_client_id": _OAUTH,
    "oauth_client_secret": _OAUTH,
    "oauth_scope": _OAUTH,
}
"""All parameters of libpq in PostgreSQL 18, and `database`, as other drivers call `dbname`."""

ENVIRONMENT_VARIABLES: Mapping[str, str] = {
    "host": "PGHOST",
    "port": "PGPORT",
    "dbname": "PGDATABASE",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "passfile": "PGPASSFILE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslcrl": "PGSSLCRL",
}
"""Environment variables for parameters that the URL leaves out. Those for TLS do not apply to a Unix socket.

None of them applies to an embedded server: its URL has all other parameters, and leads to a Unix socket.
"""

_TRANSLATED = {
    ("ssl", "true"): ("sslmode", "require"),
    ("requiressl", "1"): ("sslmode", "require"),
    ("requiressl", "0"): ("sslmode", "prefer"),
}

Given = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class ConnectionTarget:
    """One host: the arguments of `asyncpg.connect`, and the values of `ssl` to try, in order.

    `timeout`: the seconds that a connection may take, if the URL says so.
    """

    arguments: Mapping[str, Any] = field(repr=False)
    ways: Sequence[Any]
    timeout: float | None


def find_targets(url: str, environ: Mapping[str, str] = os.environ) -> list[ConnectionTarget]:
    """The hosts of a URL, in the order in which to try them.

    Call it for each connection, as files may change while a broker runs. Raises `ConfigError` for an invalid URL or an
    unusable file. The error text contains no part of the URL that might be secret.
    """
    found = parse_url(url)

    def given(name: str) -> str | None:
        if name in found:
            return found[name]
        value = environ.get(ENVIRONMENT_VARIABLES.get(name, ""), "")
        if value:
            _check(name, value, ENVIRONMENT_VARIABLES[name])
        return value or None

    hosts = _hosts(given)
    user = given("user") or _system_user()
    database = given("dbname") or user
    seconds = _number("connect_timeout", given("connect_timeout") or "0")
    settings = {"application_name": given("application_name") or given("fallback_application_name") or "catbus"}
    if options := given("options"):
        settings["options"] = options
    ways = _ways(given) if any(not host.startswith("/") for host, _ in hosts) else [False]
    targets = [
        ConnectionTarget(
            {
                "host": host,
                "port": port,
                "user": user,
                # With an empty value, asyncpg does not look elsewhere.
                "password": given("password") or _password_in_file(given("passfile"), host, port, database, user),
                "database": database,
                "direct_tls": given("sslnegotiation") == "direct",
                "server_settings": settings,
                "target_session_attrs": given("target_session_attrs") or ("primary" if len(hosts) > 1 else "any"),
                "krbsrvname": given("krbsrvname") or "postgres",
                "gsslib": "gssapi",
            },
            [False] if host.startswith("/") else ways,
            seconds if seconds > 0 else None,
        )
        for host, port in hosts
    ]
    if given("load_balance_hosts") == "random":
        random.shuffle(targets)
    return targets


# The URL


def parse_url(url: str) -> dict[str, str]:
    """The parameters of a URL, by their libpq names. Raises `ConfigError`."""
    head, _, query = url.partition("://")[2].partition("?")
    place, _, database = head.partition("/")
    login, at, hosts = place.rpartition("@")
    if not at and ("@" in database or ("@" in query and ":" in place)):
        raise ConfigError("a / is %2F and a ? is %3F in a password; elsewhere an @ is %40")
    user, _, password = login.partition(":")
    found = {"user": _decode("user", user), "password": _decode("password", password)}
    found["dbname"] = _decode("dbname", database)
    if hosts:
        found["host"], found["port"] = _split_hosts(hosts)
    found = {name: value for name, value in found.items() if value}
    for item in query.split("&") if query else ():
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError("a parameter is name=value, and & stands between two; an & in a value is %26")
        name = _decode("a parameter", name)
        if name not in PARAMETERS:
            raise ConfigError(f"unknown parameter {name[:40]!r} ({_hint(name)})")
        value = _decode(name, value)
        _check(name, value, name)
        name, value = _TRANSLATED.get((name, value), (name, value))
        found["dbname" if name == "database" else name] = value
    return found


def _split_hosts(text: str) -> tuple[str, str]:
    """Split into the formats of the parameters `host` and `port`."""
    hosts, ports = [], []
    for item in text.split(","):
        match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::([0-9]*))?", item)
        if match is None:
            raise ConfigError("a host is name:port or [address]:port; a : is %3A in a password, and a / is %2F")
        hosts.append(_decode("host", match[1] or match[2] or ""))
        ports.append(match[3] or "")
    return ",".join(hosts), ",".join(ports) if any(ports) else ""


def _decode(name: str, text: str) -> str:
    if _BAD_ESCAPE.search(text):
        raise ConfigError(f"{name}: a % begins an escape like %2F; the sign itself is %25")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: what is escaped is not UTF-8") from None


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), PARAMETERS, 1, 0.7)
    meant = f'did you mean "{close[0]}"? ' if close else ""
    return f"{meant}settings of the server go into options, like options=-c%20work_mem=8MB"


def _check(name: str, value: str, label: str) -> None:
    """Raise `ConfigError` unless the parameter may have the value. `label` names it in the error."""
    parameter = PARAMETERS[name]
    if parameter.values is None or value in parameter.values:
        return
    choice = f" (it may be {', '.join(parameter.values)})" if parameter.values else ""
    raise ConfigError(f"{label}: {parameter.text.replace('`', '')}{choice}")


# Hosts


def _hosts(given: Given) -> list[tuple[str, int]]:
    hosts = (given("host") or "").split(",")
    ports = (given("port") or "").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise ConfigError(f"port: {len(ports)} for {len(hosts)} hosts")
    found = []
    for host, text in zip(hosts, ports, strict=True):
        port = _number("port", text or str(PORT))
        if not 0 < port < 65_536:
            raise ConfigError("port: a number from 1 to 65535")
        found.append((host or _local_host(port), port))
    return found


def _local_host(port: int) -> str:
    """The host of a local server: the directory of its socket, or `localhost`."""
    return next((place for place in _SOCKETS if Path(place, f".s.PGSQL.{port}").exists()), "localhost")


def _system_user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise ConfigError("user: there is none in the URL, and this process's user has no name") from None


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}: a whole number") from None


def _ways(given: Given) -> list[Any]:
    """The values of `ssl` to try for a TCP host, in order."""
    certificates = {name: given(name) for name in CERTIFICATES}
    mode = given("sslmode") or ("verify-full" if certificates["sslrootcert"] == "system" else "prefer")
    if certificates["sslrootcert"] == "system" and mode != "verify-full":
        # https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-SSLROOTCERT
        raise ConfigError("sslrootcert=system is safe with sslmode=verify-full only")
    if given("sslnegotiation") == "direct" and mode in ("disable", "allow", "prefer"):
        raise ConfigError("sslnegotiation=direct takes sslmode=require, verify-ca or verify-full")
    match mode:
        case "disable":
            return [False]
        case "allow":
            return [False, make_context(mode, certificates)]
        case "prefer":
            return [make_context(mode, certificates), False]
        case _:
            return [make_context(mode, certificates)]


def _password_in_file(path: str | None, host: str, port: int, database: str, user: str) -> str:
    """The password in a password file; empty if there is no file or no matching line."""
    if path is None:
        return ""
    try:
        if Path(path).stat().st_mode & 0o077:
            raise ConfigError(f"passfile: {path}: others may read it: chmod 600")
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"passfile: {path}: {getattr(error, 'strerror', 'not text')}") from None
    wanted = "localhost" if host.startswith("/") else host, str(port), database, user
    for line in lines:
        if line.startswith("#"):
            continue
        fields = [re.sub(r"\\(.)", r"\1", part) for part in re.findall(r"((?:[^:\\]|\\.)*)(?::|$)", line)[:5]]
        if len(fields) == 5 and all(a in ("*", b) for a, b in zip(fields, wanted, strict=False)):
            return fields[4]
    return ""
