"""The asyncpg bridge contains cancellation, timeouts, lost connections and errors."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import trio

from catbus.errors import ConfigError
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, open_bridge, sqlstate
from tests.log.harness import TEST_TIMEOUT
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql, pids, wait_until


async def test_query_returns_its_rows(database_url: str) -> None:
    async with open_sql(database_url) as connection:
        assert await connection.fetchrow("SELECT $1::int + 1, $2::text", 1, "é") == (2, "é")
        assert [tuple(row) for row in await connection.fetch("SELECT generate_series(1, 3)")] == [(1,), (2,), (3,)]
        assert connection.version >= 14
        assert await connection.fetchrow("SELECT pg_backend_pid()") == (connection.pid,)


async def test_database_error_leaves_the_connection_usable(database_url: str) -> None:
    async with open_sql(database_url) as connection:
        with pytest.raises(DATABASE_ERRORS) as caught:
            await connection.fetch("SELECT 1 / 0")
        assert sqlstate(caught.value) == "22012"
        assert not connection.closed
        assert await connection.fetchrow("SELECT 1") == (1,)


async def test_missing_required_row_is_an_outage(database_url: str) -> None:
    async with open_sql(database_url) as connection:
        with pytest.raises(OSError, match="returned no row"):
            await connection.fetchrow("SELECT 1 WHERE false")


async def test_cancelled_query_ends_its_connection_and_opens_no_other(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, open_bridge() as bridge, open_sql(database_url) as sql:
        connection = await bridge.connect(proxy.url)
        with trio.move_on_after(0.1) as scope:
            await connection.fetch("SELECT pg_sleep(60)")
        assert scope.cancelled_caught
        assert connection.closed
        with pytest.raises(DATABASE_ERRORS):
            await connection.fetch("SELECT 1")
        assert (proxy.accepted, proxy.refused) == (1, 0)
        for pid in await pids(sql, "%pg_sleep%"):
            await sql.fetch("SELECT pg_terminate_backend($1)", pid)


async def test_query_that_exceeds_its_timeout_ends_its_connection(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, open_bridge() as bridge:
        connection = await bridge.connect(proxy.url)
        proxy.block()
        with pytest.raises(TimeoutError, match="no answer within"):
            await connection.fetch("SELECT 1", timeout=0.1)
        assert connection.closed
        assert proxy.accepted == 1


async def test_connecting_to_a_silent_server_stops_at_the_timeout(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, open_bridge() as bridge:
        proxy.block()
        with pytest.raises(TimeoutError, match="no connection within"):
            await bridge.connect(proxy.url, timeout=0.1)
        with trio.move_on_after(0.1) as scope:
            await bridge.connect(proxy.url)
        assert scope.cancelled_caught


async def test_rejected_connection_is_an_outage(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, open_bridge() as bridge:
        proxy.close()
        with pytest.raises(DATABASE_ERRORS):
            await bridge.connect(proxy.url)
        with pytest.raises(OSError, match=r"refused|failed"):
            await bridge.connect("postgres://localhost:1/x?sslmode=disable")


async def test_wrong_url_is_a_configuration_error() -> None:
    async with open_bridge() as bridge:
        with pytest.raises(ConfigError, match="sslmode"):
            await bridge.connect("postgres://someone:sesame@localhost/x?sslmode=perhaps")


async def test_lost_connection_calls_its_callback(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, open_bridge() as bridge:
        with await bridge.connect(proxy.url) as connection:
            lost = trio.Event()
            connection.when_closed(lost.set)
            proxy.cut()
            with trio.fail_after(TEST_TIMEOUT):
                await lost.wait()
            assert connection.closed


async def test_call_in_progress_raises_an_outage_when_the_bridge_closes(database_url: str) -> None:
    failed: list[Exception] = []

    async with trio.open_nursery() as nursery, open_bridge() as bridge:
        connection = await bridge.connect(database_url)

        async def query() -> None:
            try:
                await connection.fetch("SELECT pg_sleep(60)")
            except DATABASE_ERRORS as error:
                failed.append(error)

        nursery.start_soon(query)
        async with open_sql(database_url) as sql:
            await wait_until(lambda: pids(sql, "%pg_sleep%"))
    assert len(failed) == 1
    assert connection.closed
    with pytest.raises(OSError, match="not running"):
        await connection.fetch("SELECT 1")


async def test_notifications_arrive_with_their_sender(database_url: str) -> None:
    heard: list[tuple[int, str]] = []
    news = trio.Event()

    def hear(pid: int, payload: str) -> None:
        heard.append((pid, payload))
        news.set()

    async with open_sql(database_url) as listener, open_sql(database_url) as sender:
        await listener.listen("news", hear)
        await sender.execute("NOTIFY news, 'good'")
        with trio.fail_after(TEST_TIMEOUT):
            await news.wait()
        assert heard == [(sender.pid, "good")]


async def test_callback_error_is_counted_and_ends_nothing(database_url: str) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    async def fail_later() -> None:
        raise ZeroDivisionError

    async with open_bridge() as bridge:
        with await bridge.connect(database_url) as connection:
            await connection.listen("news", fail)
            await connection.execute("NOTIFY news")
            with trio.fail_after(TEST_TIMEOUT):
                while not bridge.stray_errors:
                    await trio.sleep(0.01)
            assert await connection.fetchrow("SELECT 1") == (1,)
            with pytest.raises(ZeroDivisionError):
                await bridge.run_in_asyncio(fail_later, asyncio.Task.cancel)


async def test_kernel_detects_a_dead_peer(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, open_bridge() as bridge:
        with await bridge.connect(proxy.url) as connection:
            peer = connection._raw._transport.get_extra_info("socket")
            assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 4_000


async def test_exception_within_the_bridge_is_raised_unchanged() -> None:
    with pytest.raises(KeyError):
        async with open_bridge():
            raise KeyError
