"""Settings of a role, a database or a session change nothing, and no foreign function replaces PostgreSQL's."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
import trio

from catbus.config import DatabaseSettings
from catbus.errors import Unavailable
from catbus.postgres.access.asyncpg_bridge import open_bridge
from catbus.postgres.access.migrations import init, schema_files, version_update
from catbus.postgres.access.session_settings import NEWER_SETTINGS, STARTUP_SETTINGS, STATEMENT_SETTINGS
from tests.postgres.bouncer import open_bouncer
from tests.postgres.every_setting import exercise
from tests.postgres.planted_functions import MALLORY, plant
from tests.postgres.sql import open_sql

PINS = {"search_path=pg_catalog, pg_temp", "standard_conforming_strings=on"}

# A procedure that ends transactions cannot have settings, so it may only call functions that have them.
_CALLS = (
    r"(?:SELECT (?:\w+\.\w+(?:, )?)+\s+INTO (?:\w+(?:, )?)+|PERFORM)\s+(?:FROM )?catbus\.\w+\([\w,\s]*\)(?: AS \w)?;"
)
BODY = re.compile(
    r"\s*(?:DECLARE\s+(?:\w+ \w+;\s+)+)?BEGIN\s+ROLLBACK;\s+"
    r"SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;\s+"
    rf"(?:(?:IF (?:catbus\.\w+\(\w+\)|\w+) THEN|END IF;|{_CALLS})\s+)+END\s*"
)


async def test_every_function_has_the_settings_that_it_relies_on(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        functions = await sql.fetch(
            "SELECT oid::regprocedure::text, prokind = 'p', coalesce(proconfig, '{}'), prosrc FROM pg_proc "
            "WHERE pronamespace = 'catbus'::regnamespace"
        )
    assert len(functions) >= 20
    for name, procedure, settings, source in functions:
        if procedure:
            assert BODY.fullmatch(source), name
        else:
            assert set(settings) >= PINS, name
            assert "geqo=off" in settings or "enable_hashjoin=off" not in settings, name


async def test_every_trigger_fires_whatever_the_replication_role_is(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        triggers = await sql.fetch(
            "SELECT t.tgname, t.tgenabled FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid "
            "WHERE c.relnamespace = 'catbus'::regnamespace AND NOT t.tgisinternal"
        )
    assert len(triggers) >= 5
    assert {enabled for _, enabled in triggers} == {b"A"}


async def test_only_the_owner_may_call_private_functions(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        assert not await sql.fetch(
            "SELECT p.oid::regprocedure FROM pg_proc AS p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) "
            "AS a WHERE p.pronamespace = 'catbus'::regnamespace AND a.grantee = 0"
        )


@asynccontextmanager
async def led(url: str, *, pooled: bool) -> AsyncIterator[str]:
    """A URL of the database, direct or through a pooler."""
    if not pooled:
        yield url
        return
    async with open_bouncer(url) as bouncer:
        yield bouncer.url


async def alter(url: str, settings: Mapping[str, str]) -> None:
    """Change a setting of the database for all later sessions."""
    async with open_sql(url) as sql:
        for name, value in settings.items():
            await sql.execute(f'ALTER DATABASE "{urlsplit(url).path[1:]}" SET {name} = {value}')


@pytest.fixture
async def planted(empty_database_url: str) -> AsyncIterator[str]:
    """A database in which `MALLORY` created functions before the schema was applied."""
    async with open_sql(empty_database_url) as sql:
        assert await plant(sql) > 100
        yield empty_database_url
        await sql.execute(f"DROP OWNED BY {MALLORY}; DROP ROLE {MALLORY}")


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
@pytest.mark.parametrize("path", ['"$user", public', "public, pg_catalog"])
async def test_functions_of_another_role_never_run_with_our_rights(planted: str, path: str, pooled: bool) -> None:
    await alter(planted, {"search_path": path})
    async with led(planted, pooled=pooled) as url:
        await exercise(url, planted)
    async with open_sql(planted) as sql:
        assert await sql.fetch("SELECT DISTINCT taken, by, application FROM public.loot") == []


async def test_functions_of_another_role_never_run_within_the_schema_functions(planted: str) -> None:
    """The session's settings have no effect in the schema's functions, even if these are called by hand."""
    await init(DatabaseSettings(url=planted))
    async with open_sql(planted) as sql:
        await sql.execute('SET search_path = "$user", public; SET standard_conforming_strings = off')
        (epoch,) = await sql.fetchrow("SELECT epoch FROM catbus.head")
        await sql.execute(
            f"""
            SELECT catbus.publish('a.b', '{{"text":1}}'::text);
            SELECT FROM catbus.append('on', '{epoch}', ARRAY['a.b'], ARRAY['1'], ARRAY['x'::bytea], ARRAY[1::bigint],
                                      ARRAY['me'], ARRAY[NULL::bytea], ARRAY[NULL::bigint]);
            SELECT FROM catbus.append('on', '{epoch}', ARRAY['a.b', 'a.b'], ARRAY['1', '2'], ARRAY['x', 'x']::bytea[],
                                      ARRAY[2, 3], ARRAY['me', 'me'], ARRAY[NULL, NULL]::bytea[],
                                      ARRAY[NULL, -1]::bigint[], NULL, ARRAY[true, true], ARRAY[0, 7]);
            SELECT catbus.publish('a.b', '3', true);
            SELECT FROM catbus.measure_retained(1);
            SELECT FROM catbus.measure_retained(1000);
            SELECT FROM catbus.retained('a.*');
            SELECT FROM catbus.move_outbox('on', '{epoch}', NULL);
            SELECT catbus.erase('a.b');
            SELECT FROM catbus.poll(1);
            SELECT FROM catbus.retention_due(1000, 1000);
            SELECT FROM catbus.retain(1000, 100000000);
            SELECT catbus.rotate_outbox();
            SELECT FROM catbus.heartbeat('r', '{{}}');
            SELECT catbus.create_consumer('c', '*', partitions => 2, start => 'floor', hold => true);
            SELECT FROM catbus.receive('c');
            SELECT FROM catbus.reject('c', 2);
            SELECT FROM catbus.consumer_positions();
            SELECT FROM catbus.dead_letters;
            SELECT FROM catbus.skip_gap('c');
            SELECT catbus.reset_consumer('c', '0');
            SELECT catbus.erase('*');
            SELECT catbus.drop_consumer('c');
            CREATE TABLE public.watched (id integer PRIMARY KEY, note text);
            SELECT catbus.watch('public.watched', 'w.{{id}}.{{note}}', retain => true);
            INSERT INTO public.watched VALUES (1, 'a b');
            UPDATE public.watched SET id = 2;
            TRUNCATE public.watched;
            ALTER TABLE public.watched RENAME note TO remark;
            INSERT INTO public.watched VALUES (3, pg_catalog.repeat('[', 70));
            SELECT catbus.unwatch('public.watched');
            INSERT INTO catbus.roles (key) VALUES (pg_catalog.sha256('a'));
            INSERT INTO catbus.role_grants SELECT key, 'read', 'a.b' FROM catbus.roles;
            DELETE FROM catbus.roles;
            SELECT FROM catbus.new_epoch('{epoch}');
            """
        )
        assert await sql.fetch("SELECT DISTINCT taken, by FROM public.loot") == []


async def test_schema_that_uses_functions_of_another_role_is_rejected(empty_database_url: str) -> None:
    """`nextval` with a literal resolves to a function of text rather than PostgreSQL's own of regclass."""
    [checking] = [number for number, name, _ in schema_files() if name.endswith("_settings.sql")]
    old = "".join(script for number, _, script in schema_files() if number < checking)
    async with open_sql(empty_database_url) as sql:
        await sql.execute(
            f"""
            CREATE FUNCTION public.nextval(text) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint';
            BEGIN; SET LOCAL search_path = public; {old}
            {version_update(checking - 1)}; COMMIT
            """
        )
    with pytest.raises(Unavailable, match=r"use what does not belong to it: function public.nextval\(text\)"):
        await init(DatabaseSettings(url=empty_database_url))


SETTINGS = {
    "default_transaction_isolation": "'serializable'",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "standard_conforming_strings": "off",
    "lock_timeout": "1",
    "idle_in_transaction_session_timeout": "1",
    "idle_session_timeout": "1",
}
"""Settings that can stop a broker, or the creation of the schema."""


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
@pytest.mark.parametrize("name", SETTINGS)
async def test_catbus_works_with_the_settings_of_any_database(empty_database_url: str, name: str, pooled: bool) -> None:
    if name == "idle_session_timeout" and pooled:
        pytest.skip("the sessions are those of the pooler")
    await alter(empty_database_url, {name: SETTINGS[name]})
    async with led(empty_database_url, pooled=pooled) as url:
        await exercise(url, empty_database_url)


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
async def test_statements_have_the_settings_that_they_rely_on(database_url: str, pooled: bool) -> None:
    others = {**SETTINGS, "search_path": "public", "statement_timeout": "60000", "exit_on_error": "on", "geqo": "on"}
    if pooled:
        del others["idle_session_timeout"]
    await alter(database_url, others)
    async with led(database_url, pooled=pooled) as url, open_bridge() as bridge:
        with await bridge.connect(url) as connection:
            wanted = dict(STATEMENT_SETTINGS if pooled else STARTUP_SETTINGS)
            wanted |= {name: value for name, (since, value) in NEWER_SETTINGS.items() if connection.version >= since}
            wanted |= {"transaction_isolation": "read committed", "transaction_read_only": "off"}
            for name, value in wanted.items():
                assert await connection.fetchrow("SELECT current_setting($1)", name) == (value,), name


async def test_connection_that_accepts_no_startup_settings_has_them_afterwards(database_url: str) -> None:
    async with open_bridge() as bridge:
        bridge._plain.add(database_url)
        with await bridge.connect(database_url) as connection:
            for name, value in STARTUP_SETTINGS.items():
                assert await connection.fetchrow("SELECT current_setting($1)", name) == (value,), name


async def test_failed_statement_behind_a_pooler_leaves_the_connection_usable(database_url: str) -> None:
    async with open_bouncer(database_url) as bouncer, open_bridge() as bridge:
        with await bridge.connect(bouncer.url) as connection:
            with pytest.raises(Exception, match="division by zero"):
                await connection.fetch("SELECT 1 / $1::integer", 0)
            assert await connection.fetchrow("SELECT $1::integer", 1) == (1,)
            assert not connection._raw.is_in_transaction()
            with trio.fail_after(5):
                await connection.begin()
            assert connection._raw.is_in_transaction()
