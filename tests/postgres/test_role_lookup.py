"""Role lookups: present results, shared statements, outages, and no tokens in the log."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.auth.grants import Grants, Identity
from catbus.auth.role_tokens import make_role_token, role_key
from catbus.config import DatabaseSettings
from catbus.errors import Unavailable
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection, open_bridge
from catbus.postgres.roles import role_lookup
from catbus.postgres.roles.role_changes import RoleChanges
from catbus.postgres.roles.role_lookup import LOOKUP_TIMEOUT, RoleLookup
from catbus.postgres.roles.role_store import open_roles
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql, pids, wait_until

GRANTS = Grants(("a.*", "b"), ("a.c",))


@asynccontextmanager
async def looking_up(url: str) -> AsyncIterator[RoleLookup]:
    """A running role lookup with its own connections."""
    with trio.fail_after(60):
        async with open_bridge() as bridge, trio.open_nursery() as nursery:
            lookup = RoleLookup(partial(bridge.connect, url), RoleChanges())
            nursery.start_soon(lookup.run)
            yield lookup
            nursery.cancel_scope.cancel()


async def look_up(lookup: RoleLookup, key: bytes) -> Identity | None:
    """The identity of a role, without the time of its creation."""
    found = (await lookup.find([key])).get(key)
    return None if found is None else replace(found, issued=0.0)


async def test_role_counts_as_issued_when_it_was_created(database_url: str) -> None:
    async with looking_up(database_url) as lookup, open_roles(DatabaseSettings(url=database_url)) as roles:
        token, role = await roles.create("ci", GRANTS)
        key = key_of(token)
        assert (await lookup.find([key]))[key].issued == role.created.timestamp() > 0


def key_of(token: str) -> bytes:
    key = role_key(token)
    assert key is not None
    return key


async def make_role(url: str, client_id: str | None = "ci", grants: Grants = GRANTS) -> bytes:
    async with open_roles(DatabaseSettings(url=url)) as roles:
        token, _ = await roles.create(client_id, grants)
    return key_of(token)


async def test_lookup_returns_the_present_role(database_url: str) -> None:
    key = await make_role(database_url)
    bare = await make_role(database_url, None, Grants())
    async with looking_up(database_url) as lookup, open_roles(DatabaseSettings(url=database_url)) as roles:
        assert await look_up(lookup, key) == Identity("ci", GRANTS, None, role=key)
        assert await look_up(lookup, bare) == Identity(None, Grants(), None, role=bare)
        assert await look_up(lookup, key_of(make_role_token())) is None
        await roles.revoke(key.hex(), Grants(("b",)))
        assert await look_up(lookup, key) == Identity("ci", Grants(("a.*",), ("a.c",)), None, role=key)
        await roles.delete(key.hex())
        assert await look_up(lookup, key) is None


async def test_concurrent_lookups_share_a_statement(database_url: str) -> None:
    keys = [await make_role(database_url, f"c{number}") for number in range(3)]
    found: list[object] = []

    async def find(key: bytes) -> None:
        found.append(await look_up(lookup, key))

    async with looking_up(database_url) as lookup:
        await look_up(lookup, keys[0])
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                for key in (*keys, bytes(32)):
                    nursery.start_soon(find, key)
        assert lookup._connection.statements == 2
    for number, key in enumerate(keys):
        assert found.count(Identity(f"c{number}", GRANTS, None, role=key)) == 100
    assert found.count(None) == 100


async def test_lookup_during_a_statement_gets_the_result_of_a_later_one(database_url: str) -> None:
    key = await make_role(database_url)
    found: list[object] = []

    async def find() -> None:
        found.append(await look_up(lookup, key))

    async with open_proxy(database_url) as proxy, looking_up(proxy.url) as lookup:
        await look_up(lookup, key)
        async with trio.open_nursery() as nursery:
            proxy.block()
            nursery.start_soon(find)
            await wait_all_tasks_blocked()
            async with open_roles(DatabaseSettings(url=database_url)) as roles:
                await roles.delete(key.hex())
            nursery.start_soon(find)
            await wait_all_tasks_blocked()
            proxy.unblock()
    assert found[-1] is None
    assert len(found) == 2


async def test_cancelled_lookup_does_not_disturb_the_others(database_url: str) -> None:
    key = await make_role(database_url)
    found: list[object] = []

    async def find() -> None:
        found.append(await look_up(lookup, key))

    async with open_proxy(database_url) as proxy, looking_up(proxy.url) as lookup:
        await look_up(lookup, key)
        async with trio.open_nursery() as nursery:
            proxy.block()
            nursery.start_soon(find)
            await wait_all_tasks_blocked()
            async with trio.open_nursery() as leaving:
                leaving.start_soon(lookup.find, key)
                await wait_all_tasks_blocked()
                leaving.cancel_scope.cancel()
            proxy.unblock()
        assert found == [Identity("ci", GRANTS, None, role=key)]
        assert await look_up(lookup, key) is not None
        assert proxy.accepted == 1


async def test_connection_is_opened_when_needed_and_again_after_a_loss(database_url: str) -> None:
    key = await make_role(database_url)
    async with open_proxy(database_url) as proxy, looking_up(proxy.url) as lookup:
        await wait_all_tasks_blocked()
        assert proxy.accepted == 0
        await look_up(lookup, key)
        async with open_sql(database_url) as sql:
            [pid] = await pids(sql, "%catbus.roles%")
            await sql.fetch("SELECT pg_terminate_backend($1)", pid)

            async def gone() -> bool:
                return not await pids(sql, "%catbus.roles%")

            await wait_until(gone)
        await wait_until_closed(lookup)
        assert await look_up(lookup, key) is not None
        assert proxy.accepted == 2


async def wait_until_closed(lookup: RoleLookup) -> None:
    connection = lookup._connection._connection
    assert isinstance(connection, DatabaseConnection)

    async def closed() -> bool:
        return connection.closed

    await wait_until(closed)


async def test_lookup_is_unavailable_until_the_database_is_reachable(database_url: str) -> None:
    key = await make_role(database_url)
    async with open_proxy(database_url) as proxy, looking_up(proxy.url) as lookup:
        proxy.close()
        for _ in range(2):
            with pytest.raises(Unavailable):
                await look_up(lookup, key)
        proxy.open()
        assert await look_up(lookup, key) is not None
        proxy.close()
        with pytest.raises(Unavailable):
            await look_up(lookup, key)
        proxy.open()
        assert await look_up(lookup, key) is not None


async def test_database_without_the_schema_is_unavailable(empty_database_url: str) -> None:
    async with looking_up(empty_database_url) as lookup:
        with pytest.raises(Unavailable):
            await look_up(lookup, bytes(32))


async def test_hanging_database_is_unavailable_in_time(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await make_role(database_url)
    monkeypatch.setattr(role_lookup, "LOOKUP_TIMEOUT", 0.2)
    async with open_proxy(database_url) as proxy, looking_up(proxy.url) as lookup:
        await look_up(lookup, key)
        proxy.block()
        with pytest.raises(Unavailable), trio.fail_after(10):
            await look_up(lookup, key)
        proxy.unblock()
        await wait_until_found(lookup, key)


async def wait_until_found(lookup: RoleLookup, key: bytes) -> None:
    async def found() -> bool:
        try:
            return await look_up(lookup, key) is not None
        except Unavailable:
            return False

    await wait_until(found)


async def test_lookup_waits_no_longer_than_the_timeout(autojump_clock: MockClock) -> None:
    async def connect() -> DatabaseConnection:
        await trio.sleep_forever()

    lookup = RoleLookup(connect, RoleChanges())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lookup.run)
        with pytest.raises(Unavailable):
            await look_up(lookup, bytes(32))
        assert trio.current_time() == LOOKUP_TIMEOUT
        nursery.cancel_scope.cancel()


async def test_bug_is_logged_and_does_not_end_the_replica(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = await make_role(database_url)
    async with looking_up(database_url) as lookup:
        with monkeypatch.context() as patch:
            patch.setattr(role_lookup, "role_from_row", lambda row: row.no_such_thing)
            with pytest.raises(Unavailable):
                await look_up(lookup, key)
        assert "the lookup of roles failed" in caplog.text
        assert await look_up(lookup, key) is not None


async def test_log_reports_failing_lookups_once_without_the_roles(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = await make_role(database_url)
    async with open_proxy(database_url) as proxy, looking_up(proxy.url) as lookup:
        for open_ in (False, False, True, False):
            (proxy.open if open_ else proxy.close)()
            with suppress(Unavailable):
                await look_up(lookup, key)
    assert caplog.text.count("roles cannot be looked up") == 2
    assert key.hex()[:12] not in caplog.text
    assert repr(key)[2:12] not in caplog.text
