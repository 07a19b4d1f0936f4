"""Messages deleted by hand, as seen by the operator of two replicas and by their clients."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

import catbus
from catbus import Config
from catbus.cli.commands.status import _format_missing
from catbus.client import Bus
from catbus.client.server_messages import Gap
from catbus.config import DatabaseSettings, LimitSettings
from catbus.postgres.maintenance.repair import repair
from tests.brokers import CONFIG, TOKEN
from tests.endpoints.raw_peer import Peer
from tests.postgres.sql import open_sql
from tests.test_both_transports import running


class Client:
    """A subscription after a seq over either transport, with the messages and gaps that it received."""

    def __init__(self, bus: Bus, pattern: str) -> None:
        self._bus = bus
        self._pattern = pattern
        self.seqs: list[int] = []
        self.gaps: list[Gap] = []
        self._news = trio.Event()

    async def follow(self, since: int | None, *, task_status: trio.TaskStatus[None]) -> None:
        async with self._bus.subscribe(self._pattern, since=since) as messages:
            task_status.started()
            async for message in messages:
                self.seqs.append(message.seq)
                self.gaps = list(messages.gaps)
                self._news.set()

    async def wait_for(self, seq: int) -> None:
        while not self.seqs or self.seqs[-1] < seq:
            self._news = trio.Event()
            await self._news.wait()


def on(url: str) -> Config:
    """The configuration of a replica on this database that keeps almost nothing in memory."""
    return msgspec.structs.replace(CONFIG, database=DatabaseSettings(url=url), limits=LimitSettings(recent=1))


@asynccontextmanager
async def replicas(url: str, directory: Path) -> AsyncIterator[list[tuple[str, dict[str, Any]]]]:
    """Run two replicas: the address of each, and its endpoints."""
    async with AsyncExitStack() as closing:
        found = []
        for name in ("one", "other"):
            _, websocket, doors = await closing.enter_async_context(running(directory / name, on(url)))
            found.append((websocket, doors))
        yield found


async def ask(url: str, path: str) -> tuple[int, str]:
    host, _, port = url.removeprefix("ws://").removesuffix("/ws").rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        peer = Peer(stream)
        await peer.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        response = await peer.response()
    return response.status, response.body.decode().strip()


async def until_ready(url: str, state: str) -> None:
    while await ask(url, "/ready") != (200, state):
        await trio.sleep(0.02)


async def metric(url: str, name: str) -> float:
    _, text = await ask(url, "/metrics")
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


async def test_replicas_are_degraded_until_the_repair_and_subscriptions_continue_with_a_gap(
    database_url: str, tmp_path: Path
) -> None:
    with trio.fail_after(60):
        async with AsyncExitStack() as closing:
            found = await closing.enter_async_context(replicas(database_url, tmp_path))
            buses = []
            for websocket, doors in found:
                await until_ready(websocket, "ready")
                over = ((websocket, None), (doors["webtransport"], doors["certificate"]))
                for url, ca in over:
                    buses.append(await closing.enter_async_context(catbus.connect(url, token=TOKEN, ca=ca)))
            nursery = await closing.enter_async_context(trio.open_nursery())
            live = [Client(bus, "*") for bus in buses]
            for client in live:
                await nursery.start(client.follow, None)
            for n in range(1, 11):
                assert await buses[n % 4].publish("a.b", n) == n

            async with open_sql(database_url) as sql:
                await sql.execute("DELETE FROM catbus.entries WHERE seq IN (3, 4, 8)")
            for websocket, _ in found:
                await until_ready(websocket, "degraded: messages are missing")
                assert await metric(websocket, "catbus_log_missing_messages") == 3
                assert await metric(websocket, "catbus_log_available") == 1
            late = [Client(bus, "a.*") for bus in buses]
            for client in late:
                await nursery.start(client.follow, 0)
            for client in late:
                await client.wait_for(2)
            # Publishing continues, and live subscriptions get the message.
            assert await buses[0].publish("a.b", 11) == 11
            for client in live:
                await client.wait_for(11)
            assert [client.seqs for client in late] == [[1, 2]] * 4

            await repair(DatabaseSettings(url=database_url), lambda *_: None, apply=True)
            for websocket, _ in found:
                await until_ready(websocket, "ready")
                assert await metric(websocket, "catbus_log_missing_messages") == 0
            assert await buses[1].publish("a.b", 12) == 12
            for client in (*late, *live):
                await client.wait_for(12)
            for client in late:
                assert client.seqs == [1, 2, 5, 6, 7, 9, 10, 11, 12]
                gaps = [(gap.first, gap.last, gap.reason) for gap in client.gaps]
                assert gaps == [(3, 4, "repair"), (8, 8, "repair")]
            for client in live:
                assert client.seqs == list(range(1, 13))
                assert client.gaps == []
            # A later subscription gets the same on either replica.
            newcomers = [Client(bus, "a.b") for bus in buses]
            for client in newcomers:
                await nursery.start(client.follow, 2)
                await client.wait_for(12)
                assert client.seqs == [5, 6, 7, 9, 10, 11, 12]
            nursery.cancel_scope.cancel()


def test_status_lists_missing_messages() -> None:
    assert _format_missing({"missing": 4, "holes": [[3, 5], [9, 9]]}) == (
        "4 messages were deleted by hand: 3 to 5, 9; `catbus repair` lets subscriptions continue"
    )
