"""The checks of `catbus check`: whether a database suits Catbus, and what to do if not."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import trio

from ...config import DatabaseSettings, redact_url
from ...errors import ConfigError
from .asyncpg_bridge import DATABASE_ERRORS, Bridge, DatabaseConnection, open_bridge
from .migrations import OLDEST_SERVER, read_version, schema_files

Level = Literal["ok", "warning", "error"]

NOTIFICATION_TIMEOUT = 3.0
"""Seconds that a notification may take."""
MAX_CLOCK_SKEW = 1.0
"""Seconds by which two clocks may differ without a warning."""
REPLICA_CONNECTIONS = 10
"""The highest number of connections of a replica."""
SHORTEST_TIMEOUT = 1000
"""Milliseconds that a statement needs at least. The broker waits for up to 4.5 s."""
MAX_QUEUE_USAGE = 0.25
"""Use of the notification queue above which some session does not read its notifications."""

_SERVER = """
SELECT current_setting('server_version'), current_setting('server_encoding'), pg_is_in_recovery(),
       current_setting('fsync')::boolean,
       current_setting('full_page_writes')::boolean, current_setting('synchronous_standby_names'),
       current_setting('max_connections')::integer, pg_notification_queue_usage(),
       extract(epoch FROM clock_timestamp())::double precision, current_user, current_database(),
       inet_server_addr() IS NULL
"""
_SCHEMA = """
SELECT EXISTS (
           SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
           WHERE n.nspname = 'catbus' AND c.relname = 'schema_version'
       ),
       to_regnamespace('catbus') IS NOT NULL,
       has_database_privilege(current_database(), 'CREATE'),
       coalesce((SELECT pg_has_role(n.nspowner, 'USAGE') FROM pg_namespace AS n WHERE n.nspname = 'catbus'), true)
"""
_TIMEOUT_SETTINGS = "statement_timeout", "transaction_timeout"
# The initial values of a session. Behind a pooler they are those of the role or the database.
_TIMEOUTS = """
SELECT s.name, s.reset_val::bigint,
       format('ALTER ROLE %I IN DATABASE %I SET %s = 0', current_user, current_database(), s.name)
FROM pg_settings AS s
WHERE CASE WHEN s.name = ANY ($1::text[]) THEN s.reset_val::bigint BETWEEN 1 AND 4999 END
ORDER BY s.name
"""
_IDENTITY = """
SELECT d.oid::bigint, pg_postmaster_start_time() FROM pg_database AS d WHERE d.datname = current_database()
"""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check. An error prevents a broker from serving; a warning does not."""

    level: Level
    name: str
    text: str
    advice: str = ""
    """What to do, if anything."""


ReportResult = Callable[[CheckResult], None]


async def check_database(settings: DatabaseSettings, report: ReportResult) -> None:
    """Check the database at `url` and at `listen_url`, and report each result as it comes.

    Nothing in the database is changed.
    """
    async with open_bridge() as bridge:
        shown_url = redact_url(settings.url)
        try:
            connection = await bridge.connect(settings.url, settings.connect_timeout)
        except (ConfigError, *DATABASE_ERRORS) as error:
            report(
                CheckResult(
                    "error", "database", f"{shown_url} cannot be reached: {_error_text(error)}", _advice_for(error)
                )
            )
            return
        with connection:
            try:
                await _check(bridge, connection, settings, shown_url, report)
            except DATABASE_ERRORS as error:
                report(CheckResult("error", "database", f"{shown_url} did not answer: {_error_text(error)}"))


async def _check(
    bridge: Bridge, connection: DatabaseConnection, settings: DatabaseSettings, shown_url: str, report: ReportResult
) -> None:
    (
        version,
        encoding,
        standby,
        fsync,
        full_pages,
        standbys,
        most,
        queue,
        clock,
        user,
        name,
        local,
    ) = await connection.fetchrow(_SERVER)
    skew = clock - time.time()
    report(CheckResult("ok", "database", f"{name} on PostgreSQL {version} as {user}, {shown_url}"))
    if connection.version < OLDEST_SERVER:
        report(
            CheckResult(
                "error", "version", f"PostgreSQL {version}", f"Catbus needs PostgreSQL {OLDEST_SERVER} or newer"
            )
        )
    if encoding != "UTF8":
        report(
            CheckResult("error", "encoding", encoding, "create the database with ENCODING 'UTF8' TEMPLATE template0")
        )
    if standby:
        report(CheckResult("error", "writing", "it is a standby", "give the URL of the primary"))
    for limit, milliseconds, advice in await connection.fetch(
        _TIMEOUTS, list(_TIMEOUT_SETTINGS) if connection.pooled else []
    ):
        level: Level = "error" if milliseconds < SHORTEST_TIMEOUT else "warning"
        text = f"{limit} is {milliseconds} ms, which nothing overrides behind a pooler"
        report(CheckResult(level, "settings", text, advice))
    if connection.encrypted:
        report(CheckResult("ok", "encryption", "the connection goes through TLS"))
    elif local or not connection.remote:
        report(CheckResult("ok", "encryption", "none, and none needed: the connection stays on this machine"))
    else:
        report(
            CheckResult("warning", "encryption", "the connection is not encrypted", "add ?sslmode=require to the URL")
        )
    if not (fsync and full_pages):
        text = f"fsync is {_on_off(fsync)}, full_page_writes is {_on_off(full_pages)}"
        report(
            CheckResult(
                "warning", "durability", text, "turn both on: a crash of the server loses acknowledged messages"
            )
        )
    elif settings.synchronous_commit == "off":
        text = "database.synchronous_commit is off: a crash can lose the messages of the last moments"
        report(CheckResult("warning", "durability", text, "leave it on, unless that is intended"))
    else:
        report(CheckResult("ok", "durability", f"fsync is on, synchronous_commit is {settings.synchronous_commit}"))
    if settings.failover == "lossless" and not standbys:
        text = "no commit waits for a standby: synchronous_standby_names is empty"
        advice = 'set it, or leave database.failover at "lossy"'
        report(CheckResult("error", "failover", text, advice))
    if most < 3 * REPLICA_CONNECTIONS:
        text = f"max_connections is {most}, and a replica has up to {REPLICA_CONNECTIONS}"
        report(CheckResult("warning", "connections", text, "raise it, or put a pooler in between"))
    else:
        report(
            CheckResult("ok", "connections", f"max_connections is {most}; a replica has up to {REPLICA_CONNECTIONS}")
        )
    if queue > MAX_QUEUE_USAGE:
        text = f"{queue:.0%} of the notification queue is in use"
        report(
            CheckResult("warning", "queue", text, "a session that listens stays in a transaction: see pg_stat_activity")
        )
    if abs(skew) > MAX_CLOCK_SKEW:
        text = f"the database's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
        advice = "keep both right (NTP): tokens expire by ours, messages are stamped by its"
        report(CheckResult("warning", "clock", text, advice))
    schema = await _check_schema(connection)
    report(schema)
    if schema.text == f"version {schema_files()[-1][0]}":
        await _check_log(connection, report)
    report(await _check_notifications(bridge, connection, settings))


async def _check_schema(connection: DatabaseConnection) -> CheckResult:
    there, schema, may_create, ours = await connection.fetchrow(_SCHEMA)
    newest = schema_files()[-1][0]
    if not ours:
        return CheckResult("error", "schema", "the schema catbus belongs to another user", "connect as that user")
    if not there:
        if not (schema or may_create):
            return CheckResult(
                "error", "schema", "there is none, and this user may not create it",
                "GRANT CREATE ON DATABASE to it, or run `catbus init` as a user that may",
            )  # fmt: skip
        return CheckResult("ok", "schema", "there is none yet: `catbus run` or `catbus init` creates it")
    try:
        version = await read_version(connection)
    except ConfigError as error:
        return CheckResult("error", "schema", f"{error}")
    if version > newest:
        return CheckResult("error", "schema", f"version {version}, and this release knows {newest}", "upgrade Catbus")
    behind = "" if version == newest else f"; `catbus run` or `catbus init` brings it to {newest}"
    return CheckResult("ok", "schema", f"version {version}{behind}")


async def _check_log(connection: DatabaseConnection, report: ReportResult) -> None:
    (missing,) = await connection.fetchrow("SELECT missing FROM catbus.deleted_range_report()")
    if missing:
        text = f"{missing:,} messages were deleted by hand, and subscriptions that have to read them stop before them"
        report(
            CheckResult("warning", "log", text, "`catbus repair` says which, and has subscriptions go on behind them")
        )


async def _check_notifications(
    bridge: Bridge, connection: DatabaseConnection, settings: DatabaseSettings
) -> CheckResult:
    """Send a notification through `url` and receive it through `listen_url`, as replicas do."""
    if settings.listen_url is None:
        if connection.pooled:
            return CheckResult(
                "warning", "notifications", "a pooler passes none on: replicas poll, some 10 to 100 ms later",
                "set database.listen_url (CATBUS_LISTEN_URL) to a URL that leads past the pooler",
            )  # fmt: skip
        return await _check_delivery(connection, connection, "database.url")
    shown_url = redact_url(settings.listen_url)
    try:
        with await bridge.connect(settings.listen_url, settings.connect_timeout, setting="listen_url") as listening:
            if listening.pooled:
                text = f"database.listen_url, {shown_url}, leads to a pooler too"
                return CheckResult("error", "notifications", text, "give it the address of PostgreSQL itself")
            if tuple(await listening.fetchrow(_IDENTITY)) != tuple(await connection.fetchrow(_IDENTITY)):
                text = f"database.listen_url, {shown_url}, leads to another database than database.url"
                return CheckResult("error", "notifications", text, "both have to lead to the same database")
            return await _check_delivery(listening, connection, "database.listen_url")
    except (ConfigError, *DATABASE_ERRORS) as error:
        text = f"database.listen_url, {shown_url}, cannot be reached: {_error_text(error)}"
        return CheckResult("error", "notifications", text, _advice_for(error))


async def _check_delivery(listening: DatabaseConnection, notifying: DatabaseConnection, name: str) -> CheckResult:
    channel, received = f"catbus_check_{secrets.token_hex(4)}", trio.Event()
    await listening.listen(channel, lambda pid, payload: received.set())
    began = trio.current_time()
    await notifying.fetch("SELECT pg_notify($1, '')", channel)
    with trio.move_on_after(NOTIFICATION_TIMEOUT):
        await received.wait()
        return CheckResult("ok", "notifications", f"they come through {name} ({trio.current_time() - began:.3f} s)")
    text = f"none came through {name} within {NOTIFICATION_TIMEOUT:g} s"
    return CheckResult("error", "notifications", text, "whatever is in between has to pass them on")


def _on_off(on: bool) -> str:
    return "on" if on else "off"


def _error_text(error: BaseException) -> str:
    text = re.sub(r"^\[database\] \w+: ", "", str(error))
    return (text or type(error).__name__).splitlines()[0]


_ADVICE = (
    ("rejected SSL upgrade", "the server has no TLS: turn it on there, or leave sslmode out"),
    ("SSL required", "the server wants TLS: add ?sslmode=require"),
    ("no encryption", "the server wants TLS: add ?sslmode=require"),
    ("CERTIFICATE_VERIFY_FAILED", "sslrootcert has to name the authority that signed the server's certificate"),
    ("password authentication failed", "check user and password in the URL"),
    ("does not exist", "create it, or correct the URL"),
    ("Name or service not known", "check the host in the URL"),
    ("Connect call failed", "is PostgreSQL running there, and may this machine come in?"),
    ("no connection within", "something in between drops packets: check firewalls and network policies"),
)


def _advice_for(error: BaseException) -> str:
    said = str(error)
    return next((advice for text, advice in _ADVICE if text in said), "")
