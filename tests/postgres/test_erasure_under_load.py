"""Erasure on two replicas under load: nobody receives an erased message any more, and nobody misses another one."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import trio

from catbus.cli.development_credentials import CERTIFICATE_FILE
from catbus.client import Transport, connect
from catbus.client.broker_address import parse_address
from catbus.client.transport_interface import DrivenTransport
from catbus.client.websocket_transport import open_websocket
from catbus.client.webtransport_transport import make_configuration, open_webtransport
from catbus.config import DatabaseSettings
from catbus.postgres.maintenance.erasure import ErasureReport, Selection, erase
from tests.endpoints.event_source import events
from tests.postgres.processes import Replica, open_replicas, token
from tests.postgres.sql import open_sql

PATIENCE = 60.0
FILLER = 2000
"""Messages of 1 KB: more than all buffers between a replica and a client that does not read."""
SECRETS = 600


async def dial(replica: Replica, kind: str, state: Path) -> Transport:
    if kind == "websocket":
        return await open_websocket(parse_address(replica.urls[0]))
    address = parse_address(replica.urls[1])
    return await open_webtransport(address, make_configuration(address, state / CERTIFICATE_FILE))


class Subscriber:
    """A subscription to all channels without the client library, which reads only while `reading` is set."""

    def __init__(self, replica: Replica, kind: str, state: Path) -> None:
        self.seqs: list[int] = []
        self.gaps: list[object] = []
        self.reading = trio.Event()
        self.reading.set()
        self._replica, self._kind, self._state = replica, kind, state
        self._changed = trio.Event()

    def stop_reading(self) -> None:
        self.reading = trio.Event()

    async def run(self, since: int | None, *, task_status: trio.TaskStatus[None]) -> None:
        receive = self._receive_events if self._kind == "sse" else self._receive_lines
        await receive(since, task_status)

    async def _receive_events(self, since: int | None, task_status: trio.TaskStatus[None]) -> None:
        query = "pattern=*" + ("" if since is None else f"&since={since}")
        async with events(urlsplit(self._replica.url).netloc, query, token=token("reader")) as source:
            assert source.status == 200
            task_status.started()
            while True:
                await self.reading.wait()
                event = await source.next()
                self._note(event.type, event.data)

    async def _receive_lines(self, since: int | None, task_status: trio.TaskStatus[None]) -> None:
        transport = await dial(self._replica, self._kind, self._state)
        async with trio.open_nursery() as nursery:
            if isinstance(transport, DrivenTransport):
                nursery.start_soon(transport.run)
            try:
                subscribe = {"type": "subscribe", "pattern": "*"} | ({} if since is None else {"since": since})
                for request in ({"type": "auth", "token": token("reader"), "protocol": 1}, subscribe):
                    await transport.send(msgspec.json.encode(request) + b"\n")
                begun: defaultdict[int, bytes] = defaultdict(bytes)
                while True:
                    await self.reading.wait()
                    chunk = await transport.receive()
                    if transport.pending:
                        await transport.send(b"")
                    *lines, begun[chunk.stream] = (begun[chunk.stream] + chunk.data).split(b"\n")
                    for line in lines:
                        reply = msgspec.json.decode(line)
                        if reply["type"] == "subscribed":
                            task_status.started()
                        self._note(reply["type"], reply)
            finally:
                await transport.aclose()

    def _note(self, kind: str, reply: Any) -> None:
        if kind == "message":
            self.seqs.append(reply["seq"])
            self._changed.set()
        elif kind == "gap":
            self.gaps.append(reply)

    async def wait_for(self, seq: int) -> None:
        while not self.seqs or self.seqs[-1] < seq:
            self._changed = trio.Event()
            await self._changed.wait()


async def wait_erased(replica: Replica) -> None:
    """Wait until a replica has applied an erasure to its memory."""
    address = urlsplit(replica.url)
    assert address.hostname and address.port
    while True:
        async with await trio.open_tcp_stream(address.hostname, address.port) as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            answer = b"".join([data async for data in stream])
        if b"\ncatbus_log_erasures_total 1" in answer:
            return
        await trio.sleep(0.01)


@pytest.mark.parametrize("transport", ["websocket", "webtransport", "sse"])
async def test_nobody_receives_what_was_erased_and_nobody_misses_anything_else(
    database_url: str, transport: str, tmp_path: Path
) -> None:
    async def publish(bus: int, channel: str, number: int) -> int:
        seqs = await buses[bus].publish_many([(f"{channel}.{n % 7}", "personal" + "x" * 1000) for n in range(number)])
        assert all(isinstance(seq, int) for seq in seqs)
        return max(seqs)  # type: ignore[type-var]

    async def load(bus: int) -> None:
        while not enough.is_set():
            await publish(bus, "keep.load", 5)

    enough = trio.Event()
    with trio.fail_after(PATIENCE):
        async with (
            open_replicas(database_url, 2, tmp_path) as replicas,
            connect(replicas[0].url, token=token("alice")) as one,
            connect(replicas[1].url, token=token("bob")) as other,
            trio.open_nursery() as nursery,
        ):
            buses = (one, other)
            live, stalled, returning, late = (
                [Subscriber(replica, transport, tmp_path) for replica in replicas] for _ in range(4)
            )
            for subscriber in (*live, *stalled):
                await nursery.start(subscriber.run, None)
            for subscriber in stalled:
                subscriber.stop_reading()
            await publish(0, "keep.filler", FILLER)
            async with trio.open_nursery() as loading:
                for bus in (0, 1):
                    loading.start_soon(load, bus)
                first = await publish(0, "secret", SECRETS // 2)
                last = await publish(1, "secret", SECRETS // 2)
                for subscriber in live:
                    await subscriber.wait_for(last)
                settings = DatabaseSettings(url=database_url)
                report = await erase(settings, Selection("secret.*"), lambda *_: None, apply=True)
                assert report == ErasureReport(SECRETS)
                for replica in replicas:
                    await wait_erased(replica)
                # Nothing of it may arrive from here on: neither from a send queue, nor from memory, nor from the log.
                for number, subscriber in enumerate(returning):
                    await nursery.start(subscriber.run, (first, first // 2)[number])
                for subscriber in late:
                    await nursery.start(subscriber.run, 0)
                await publish(1, "secret.later", 10)
                enough.set()
            head = await publish(0, "keep.end", 1)
            for subscriber in stalled:
                subscriber.reading.set()
            for subscriber in (*live, *stalled, *returning, *late):
                await subscriber.wait_for(head)
            nursery.cancel_scope.cancel()

    async with open_sql(database_url) as sql:
        rows = await sql.fetch("SELECT seq, channel, payload, sender FROM catbus.entries ORDER BY seq")
    assert [seq for seq, *_ in rows] == list(range(1, head + 1))
    gone = {seq for seq, *contents in rows if contents == ["_erased", "null", None]}
    assert len(gone) == SECRETS
    kept = [seq for seq in range(1, head + 1) if seq not in gone]
    for subscriber in live:
        assert subscriber.seqs == list(range(1, head + 1))
    for subscriber in (*stalled, *late):
        assert subscriber.seqs == kept
    assert returning[0].seqs == [seq for seq in kept if seq > first]
    assert returning[1].seqs == [seq for seq in kept if seq > first // 2]
    assert not [gap for subscriber in (*live, *stalled, *returning, *late) for gap in subscriber.gaps]
    assert not [complaint for replica in replicas for complaint in replica.complaints]
