"""Try Catbus with every setting of a role or a database, at values other than its default.

    python -m tests.postgres.every_setting --postgres 15 --alone

tries them on the database and on the roles, with direct connections and through a PgBouncer in transaction mode. It
tries groups, and halves a group that fails until the failing settings are known, or tries each setting alone. The exit
status is 1 if a setting fails that is not listed here. The tests try a part of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, groupby
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]
import trio

from catbus.auth.grants import Grants
from catbus.auth.role_tokens import role_key
from catbus.config import DatabaseSettings, RetentionSettings
from catbus.log import Committed, Entry, Rejected, Resumption, conflict
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import leaf_exceptions, open_bridge
from catbus.postgres.access.database_checks import CheckResult, check_database
from catbus.postgres.access.migrations import begin_epoch, init
from catbus.postgres.embedded import installations
from catbus.postgres.embedded import server as embedded_server
from catbus.postgres.maintenance.log_retention import LogRetention
from catbus.postgres.roles.role_store import open_roles
from tests.log.harness import TEST_TIMEOUT, read_all, running
from tests.postgres import server
from tests.postgres.bouncer import open_bouncer
from tests.postgres.server import execute, serve, server_major, to_database

OWNER, APP, PASSWORD = "catbus_settings_owner", "catbus_settings_app", "sesame"
ACCESS_METHOD = "catbus_settings_heap"

QUERY = """
SELECT name, vartype, setting, min_val, max_val, enumvals FROM pg_settings
WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend') ORDER BY name
"""

VALUES: Mapping[str, Sequence[str]] = {
    "DateStyle": ("SQL, DMY", "German", "Postgres, YMD"),
    "TimeZone": ("Asia/Kathmandu", "America/St_Johns"),
    "application_name": ("an 'application'",),
    "backtrace_functions": ("exec_simple_query",),
    "client_encoding": ("LATIN1", "SJIS"),
    "createrole_self_grant": ("set, inherit",),
    "default_table_access_method": (ACCESS_METHOD,),
    "default_tablespace": ("nowhere",),
    "default_text_search_config": ("pg_catalog.simple",),
    "dynamic_library_path": ("/nowhere",),
    "extension_control_path": ("/nowhere",),
    "extension_destdir": ("/nowhere",),
    "idle_session_timeout": ("1000", "2147483647"),
    "lc_messages": ("POSIX",),
    "lc_monetary": ("POSIX",),
    "lc_numeric": ("POSIX",),
    "lc_time": ("POSIX",),
    "local_preload_libraries": ("nowhere",),
    "log_connections": ("all",),
    "output_plugin_libraries": ("nowhere",),
    "plpgsql.extra_errors": ("all",),
    "plpgsql.extra_warnings": ("all",),
    "restrict_nonsystem_relation_kind": ("view, foreign-table",),
    "search_path": ("public, pg_catalog", "nowhere"),
    "session_preload_libraries": ("auto_explain", "nowhere"),
    "temp_tablespaces": ("nowhere",),
    "timezone_abbreviations": ("India",),
    "transaction_timeout": ("20", "2147483647"),
    "wal_consistency_checking": ("all",),
}
"""Values of text settings, which cannot be generated, and of some others. A new text setting needs a line here."""

LISTS = {"search_path"}
"""Settings whose value is written as a list, without quotation marks around the whole."""


class Trial(NamedTuple):
    """A setting and a value for it."""

    name: str
    value: str


LISTED: Mapping[Trial, str] = {
    Trial("dynamic_library_path", "/nowhere"): "PL/pgSQL itself is not found",
    Trial("local_preload_libraries", "nowhere"): "no session can begin, for any user",
    Trial("session_preload_libraries", "nowhere"): "no session can begin, for any user",
}
"""Settings that fail with some or all versions of PostgreSQL, and why."""
LISTED_POOLED: Mapping[Trial, str] = {
    Trial("statement_timeout", "1"): "the time has begun before a statement does; `catbus check` names it",
    Trial("transaction_timeout", "20"): "the time has begun before a statement does; `catbus check` names it",
}
"""Settings that fail only behind a pooler, and why."""


def values_of(name: str, kind: str, setting: str, low: str, high: str, words: Sequence[str] | None) -> Sequence[str]:
    """The values to try for a row of `QUERY`."""
    if name in VALUES:
        return VALUES[name]
    match kind:
        case "bool":
            return ("off" if setting == "on" else "on",)
        case "enum":
            assert words is not None
            return [word for word in words if word != setting]
        case "integer":
            found = [int(low), int(low) + 1, int(high)]
            return [str(number) for number in dict.fromkeys(found) if number not in (int(setting), int(high) + 1)]
        case "real":
            least, most = float(low), float(high)
            return [f"{number:g}" for number in (least, least / 2 + most / 2, most) if number != float(setting)]
    raise AssertionError(f"{name} is not known: give it values in VALUES")


# Operations that must succeed


async def exercise(url: str, user: str) -> None:
    """Do once each operation of a broker on its database. `user` is the URL of an application that publishes."""
    with trio.fail_after(4 * TEST_TIMEOUT):
        await _exercise(url, user)


async def _exercise(url: str, user: str) -> None:
    settings = DatabaseSettings(url=url, publish_timeout=TEST_TIMEOUT)
    await init(settings)
    log, other = PostgresLog(settings), PostgresLog(settings, recent=0)
    async with running(log) as (follower, publisher), running(other) as (reader, _):
        for texts in (["1"], ["2", "3"], ['{"a":\n4}', "5"]):
            await publisher.wait(*[publisher.submit("a.b", text.encode(), sender="me") for text in texts])
        known = {"producer": b"p" * 16, "number": 1}
        assert await publisher.publish_seq("a.b", b"6", **known) == await publisher.publish_seq("a.b", b"6", **known)
        assert isinstance(await publisher.publish("a.b", b"7", **known), Rejected)
        await publish_from_sql(user)
        for recorder in (follower, reader):
            await recorder.wait_for(6 + len(PUBLISHED))
            assert recorder.texts == ["1", "2", "3", '{"a":\n4}', "5", "6", *PUBLISHED]
        assert other.resume(2, other.epoch) == Resumption(2)
        assert [entry.payload for entry in await read_all(other, 2)] == [text.encode() for text in reader.texts[2:]]
        for pattern in ("*", "a.*", "a.b"):
            found, more = await other.history(pattern, before=None, limit=3)
            assert [entry.seq for entry in found] == [entry.seq for entry in reader.entries[-3:]]
            assert more
        if log.report()["news"] == "notifications":
            other.broadcast(Entry(0, 1, "a", b'"ephemeral"'))
            await follower.wait_until(lambda self: bool(self.messages))
        seq = await publisher.publish_seq("r.b", b"1", retain=True, expect=0)
        assert await publisher.publish("r.b", b"2", retain=True, expect=0) == conflict(seq)
        await reader.wait_for(seq)
        page = await other.retained("r.*", after=None, until=seq)
        assert ([entry.seq for entry in page.entries], page.complete) == ([seq], True)
        await change_roles(settings, log)
        await drop_all(url)
        assert isinstance(await publisher.publish("a.b", b"8"), Committed)
        await begin_epoch(settings)
        await follower.wait_until(lambda self: len(self.restarts) > 1)
        statistics = log.statistics(), other.statistics()
        assert [(s.failures, s.stray_errors) for s in statistics] == [(0, 0)] * 2
    findings: list[CheckResult] = []
    await check_database(settings, findings.append)
    errors = [finding for finding in findings if finding.level == "error"]
    assert not errors, errors


PUBLISHED = (
    '{"text":"\\u00e9\\ud83d\\ude8c \\"\\\\ é"}',
    "[" * 40 + '"]["' + "]" * 40 + "",
    "[" + ",".join(["[]"] * 50) + "]",
)
"""Messages that cover every branch of `catbus.check_message`."""


REFUSED = ('"\\ud83d"', "[" * 65 + "]" * 65, "nothing", '"\\"')
"""Messages that `catbus.check_message` rejects."""


async def publish_from_sql(user: str) -> None:
    """Publish in an application's session, with its settings except its own timeouts."""
    await trio.to_thread.run_sync(lambda: asyncio.run(_publish(user)))


async def _publish(user: str) -> None:
    own = (
        "exit_on_error",
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
        "idle_session_timeout",
    )
    connection = await asyncpg.connect(user, server_settings=dict.fromkeys(own, "0"))
    try:
        if connection.get_server_version().major >= 17:
            await connection.execute("SET transaction_timeout = 0")
        for payload in (*PUBLISHED, *REFUSED):
            await connection.execute("BEGIN READ WRITE")
            try:
                await connection.execute("SELECT catbus.publish('a.b', $1::text)", payload)
                assert payload in PUBLISHED, f"{payload} was taken"
            except asyncpg.DataError:
                assert payload in REFUSED, f"{payload} was refused"
            await connection.execute("COMMIT")
    finally:
        connection.terminate()


async def change_roles(settings: DatabaseSettings, log: PostgresLog) -> None:
    """Create a role, look it up, revoke a grant, and delete it; the log learns of each change."""
    async with open_roles(settings) as roles:
        token, role = await roles.create("ci", Grants(("a.*", "b"), ("a.c",)))
        key = role_key(token)
        assert key is not None
        assert (await log.roles.find([key]))[key].grants == role.grants
        for change in (roles.revoke(role.handle, Grants(("b",), ())), roles.delete(role.handle)):
            before = log.roles.changes
            await change
            with trio.fail_after(TEST_TIMEOUT):
                while log.roles.changes == before:
                    await log.roles.wait_changes()
        assert await log.roles.find([key]) == {}
        assert await roles.list() == []


async def drop_all(url: str) -> None:
    """Run the retention step that is due once all entries are old."""
    retention = LogRetention(RetentionSettings(age=0.001))
    async with open_bridge() as bridge:
        with await bridge.connect(url) as connection:
            with trio.fail_after(TEST_TIMEOUT):
                while not retention.dropped:
                    await retention.run_due_steps(connection)


# Trials


class Place(NamedTuple):
    """The owner of the settings (database or roles), and whether a pooler stands in front of the database."""

    where: Literal["database", "role"]
    pooled: bool


PLACES = [Place(where, pooled) for where in ("database", "role") for pooled in (False, True)]


class Laboratory:
    """The databases of one server: a new one for each trial, used by two roles without superuser rights."""

    def __init__(self, url: str) -> None:
        self.server = to_database(url, "postgres")
        self._numbers = count(1)
        for role in (OWNER, APP):
            self._execute(f"DROP ROLE IF EXISTS {role}", f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")

    def close(self) -> None:
        for role in (OWNER, APP):
            self._execute(f"DROP ROLE {role}")

    def find_trials(self) -> tuple[list[Trial], list[Trial]]:
        """The settings that a database can have, sorted by name, and those that PostgreSQL rejects."""
        return asyncio.run(self._find_trials())

    async def _find_trials(self) -> tuple[list[Trial], list[Trial]]:
        carried: list[Trial] = []
        refused: list[Trial] = []
        connection = await asyncpg.connect(self.server)
        try:
            await connection.execute("DO $$ BEGIN END $$")  # loads PL/pgSQL, which defines settings of its own
            trials = [Trial(row["name"], value) for row in await connection.fetch(QUERY) for value in values_of(*row)]
            for trial in trials:
                try:
                    await connection.execute(f"BEGIN; ALTER ROLE {APP} {_set(trial)}")
                    carried.append(trial)
                except asyncpg.PostgresError:
                    refused.append(trial)
                await connection.execute("ROLLBACK")
        finally:
            connection.terminate()
        return carried, refused

    async def try_out(self, trials: Sequence[Trial], place: Place) -> str:
        """The error with all these settings together, or an empty text."""
        name = f"catbus_settings_{os.getpid()}_{next(self._numbers)}"
        url, app = (self._url(name, role) for role in (OWNER, APP))
        try:
            await trio.to_thread.run_sync(self._prepare, name, trials, place)
            if not place.pooled:
                await exercise(url, app)
                return ""
            async with open_bouncer(url) as bouncer:
                await exercise(bouncer.url, app)
            return ""
        except Exception as error:  # noqa: BLE001
            return "; ".join(map(_described, leaf_exceptions(error)))
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._execute, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    async def find_failures(self, trials: Sequence[Trial], place: Place) -> list[tuple[Sequence[Trial], str]]:
        """The smallest sets of settings that fail, each with its error."""
        error = await self.try_out(trials, place)
        if not error:
            return []
        if len(trials) > 1:
            half = len(trials) // 2
            parts = [await self.find_failures(part, place) for part in (trials[:half], trials[half:])]
            if found := [failure for part in parts for failure in part]:
                return found
        return [(trials, error)]

    def _prepare(self, name: str, trials: Sequence[Trial], place: Place) -> None:
        strategy = "STRATEGY file_copy" if server_major(self.server) >= 15 else ""
        self._execute(f"CREATE DATABASE {name} OWNER {OWNER} TEMPLATE template0 ENCODING 'UTF8' {strategy}")
        database = to_database(self.server, name)
        execute(
            database,
            f"CREATE ACCESS METHOD {ACCESS_METHOD} TYPE TABLE HANDLER heap_tableam_handler",
            f"SET ROLE {OWNER}",
            "CREATE SCHEMA catbus",
            f"GRANT USAGE ON SCHEMA catbus TO {APP}",
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA catbus GRANT EXECUTE ON FUNCTIONS TO {APP}",
        )
        carriers = [f"DATABASE {name}"]
        if place.where == "role":
            carriers = [f"ROLE {role} IN DATABASE {name}" for role in (OWNER, APP)]
        self._execute(*[f"ALTER {carrier} {_set(trial)}" for trial in trials for carrier in carriers])

    def _url(self, database: str, role: str) -> str:
        parts = urlsplit(to_database(self.server, database))
        return parts._replace(netloc=f"{role}:{PASSWORD}@{parts.netloc.rpartition('@')[2]}").geturl()

    def _execute(self, *statements: str) -> None:
        execute(self.server, *statements)


def _described(error: BaseException) -> str:
    """The error, and the line that raised it."""
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}: {error} ({line})"


def _set(trial: Trial) -> str:
    quoted = "'" + trial.value.replace("'", "''") + "'"
    return f"SET {trial.name} = {trial.value if trial.name in LISTS else quoted}"


def rounds(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Divide the trials into as few lists as possible, of similar lengths, with each setting at most once per list."""
    found: list[list[Trial]] = []
    for _, group in groupby(trials, lambda trial: trial.name):
        for trial in group:
            free = [some for some in found if some[-1].name != trial.name]
            if not free:
                free = [[]]
                found += free
            min(free, key=len).append(trial)
    return found


def listed(place: Place) -> Mapping[Trial, str]:
    """The known failures at a place, and why they fail."""
    return {**LISTED, **(LISTED_POOLED if place.pooled else {})}


def report(place: Place, trials: Sequence[Trial], verdict: str) -> None:
    pooled = ", pooled" if place.pooled else ""
    print(f"{', '.join(f'{name} = {value}' for name, value in trials)} ({place.where}{pooled}): {verdict}", flush=True)


async def go_through(laboratory: Laboratory, trials: Sequence[Trial], *, alone: bool) -> int:
    """Run all trials at all places, print the results, and return the number of unexpected ones."""
    wrong = 0
    for place in PLACES:
        reasons = listed(place)
        groups = rounds([trial for trial in trials if trial not in reasons])
        for group in [[trial] for some in groups for trial in some] if alone else groups:
            failures = await laboratory.find_failures(group, place)
            wrong += len(failures)
            for failed, error in failures:
                report(place, failed, f"FAILS: {error}")
            if not failures:
                report(place, group, "works")
        for trial in reasons:
            if trial in trials:
                works = not await laboratory.try_out([trial], place)
                report(place, [trial], "works here, though it is listed" if works else f"fails: {reasons[trial]}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--postgres", type=int, metavar="MAJOR", help="its major version; else the one that tests take")
    parser.add_argument("--only", default="", help="a part of a setting's name")
    parser.add_argument("--alone", action="store_true", help="try one after the other, not in groups")
    options = parser.parse_args()
    if options.postgres:
        for module in (embedded_server, server):
            module.find_binaries = lambda _=None: installations.find_installation(options.postgres)  # type: ignore[attr-defined]
    with contextmanager(serve)() as url:
        laboratory = Laboratory(url)
        carried, refused = laboratory.find_trials()
        trials = [trial for trial in carried if options.only in trial.name]
        for name, value in refused:
            print(f"{name} = {value}: PostgreSQL does not let a role or a database carry it")
        wrong = trio.run(partial(go_through, laboratory, trials, alone=options.alone))
    print(f"{len({trial.name for trial in trials})} settings, {len(trials)} values, {wrong} surprises")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
