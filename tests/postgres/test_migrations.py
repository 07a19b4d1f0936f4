"""Migrations to the schema of this release."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
import trio

from catbus.config import DatabaseSettings
from catbus.errors import ConfigError, Unavailable
from catbus.postgres import PostgresLog
from catbus.postgres.access import migrations
from catbus.postgres.access.migrations import check_version, init, migrate, schema_files
from tests.log.harness import TEST_TIMEOUT, RecordingFollower, running
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql

NAMES = [name for _, name, _ in schema_files()]
NEWEST = schema_files()[-1][0]


def test_files_are_numbered_without_a_gap() -> None:
    assert [number for number, _, _ in schema_files()] == list(range(1, len(NAMES) + 1))


async def test_empty_database_gets_every_file_and_a_prepared_one_none(empty_database_url: str) -> None:
    settings = DatabaseSettings(url=empty_database_url)
    assert await init(settings) == NAMES
    assert await init(settings) == []
    async with open_sql(empty_database_url) as sql:
        assert await sql.fetchrow("SELECT version FROM catbus.schema_version") == (NEWEST,)
        assert (await sql.fetchrow("SELECT head, floor FROM catbus.position()")) == (0, 1)


async def test_log_applies_the_schema_by_itself(empty_database_url: str) -> None:
    async with running(PostgresLog(DatabaseSettings(url=empty_database_url))) as (_, publisher):
        assert await publisher.publish_seq("a", b"1") == 1


async def test_replicas_that_start_together_apply_each_file_once(empty_database_url: str) -> None:
    applied: list[list[str]] = []

    async def start() -> None:
        applied.append(await init(DatabaseSettings(url=empty_database_url)))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(start)
    assert sorted(applied) == [[], [], [], NAMES]


async def test_only_missing_files_are_applied(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await init(DatabaseSettings(url=empty_database_url))
    more = [*schema_files(), (NEWEST + 1, "999_more.sql", "CREATE TABLE catbus.more ()")]
    monkeypatch.setattr(migrations, "schema_files", lambda: more)
    assert await init(DatabaseSettings(url=empty_database_url)) == ["999_more.sql"]


async def test_failed_file_leaves_nothing_behind(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [*schema_files(), (NEWEST + 1, "999_wrong.sql", "CREATE TABLE catbus.more (); SELECT 1 / 0")]
    monkeypatch.setattr(migrations, "schema_files", lambda: more)
    with pytest.raises(Unavailable, match="division by zero"):
        await init(DatabaseSettings(url=empty_database_url))
    async with open_sql(empty_database_url) as sql:
        assert await sql.fetchrow("SELECT to_regnamespace('catbus')::text") == (None,)


async def test_schema_of_a_newer_release_is_rejected(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(f"UPDATE catbus.schema_version SET version = {NEWEST + 1}")
    with pytest.raises(ConfigError, match=f"version {NEWEST + 1} and this release knows {NEWEST}"):
        await init(DatabaseSettings(url=database_url))


OTHER_BUILDS = {
    "another file": "UPDATE catbus.schema_version SET digest = pg_catalog.repeat('0', 64)",
    "no digest": "ALTER TABLE catbus.schema_version DROP COLUMN digest",
    "an older version": f"UPDATE catbus.schema_version SET version = {NEWEST - 1}",
}


@pytest.mark.parametrize("change", OTHER_BUILDS.values(), ids=OTHER_BUILDS)
async def test_schema_of_another_build_is_rejected_at_once_and_stays(database_url: str, change: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(change)
        with pytest.raises(ConfigError, match=r"another build of Catbus .* Start the build that made it"):
            await init(DatabaseSettings(url=database_url))
        with pytest.raises(ConfigError, match="another build of Catbus"), trio.fail_after(TEST_TIMEOUT):
            await PostgresLog(DatabaseSettings(url=database_url)).run(RecordingFollower())
        with pytest.raises(ConfigError, match="another build of Catbus"):
            await check_version(sql)
        assert await sql.fetchrow("SELECT head FROM catbus.position()") == (0,)


async def test_changed_comments_make_no_other_schema(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [(number, name, f"-- Another comment.\n\n{script}") for number, name, script in schema_files()]
    monkeypatch.setattr(migrations, "schema_files", lambda: files)
    assert await init(DatabaseSettings(url=database_url)) == []
    files[0] = (*files[0][:2], files[0][2].replace("integer", "bigint"))
    with pytest.raises(ConfigError, match="another build of Catbus"):
        await init(DatabaseSettings(url=database_url))


async def test_database_with_another_encoding_is_rejected(empty_database_url: str) -> None:
    parts = urlsplit(empty_database_url)
    name = parts.path.strip("/") + "_latin"
    async with open_sql(empty_database_url) as sql:
        await sql.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
        try:
            with pytest.raises(ConfigError, match="encoding is LATIN1"):
                await init(DatabaseSettings(url=parts._replace(path=f"/{name}").geturl()))
        finally:
            await sql.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_old_server_is_rejected(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        sql.version = 13
        with pytest.raises(ConfigError, match="PostgreSQL 13; Catbus needs 14"):
            await migrate(sql)


async def test_unreachable_database_is_reported(database_url: str) -> None:
    async with open_proxy(database_url) as proxy:
        proxy.close()
        with pytest.raises(Unavailable, match="the database cannot be prepared"):
            await init(DatabaseSettings(url=proxy.url))
