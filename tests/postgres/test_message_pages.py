"""Pages of messages over HTTP from replicas on one PostgreSQL"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count, cycle

import msgspec
import pytest
import trio

from catbus import Broker
from catbus.auth.grants import Grants
from catbus.config import DatabaseSettings, LimitSettings
from catbus.postgres.maintenance import log_retention
from catbus.postgres.roles.role_store import open_roles
from tests.brokers import CONFIG, running
from tests.endpoints.raw_peer import Peer
from tests.endpoints.test_http_connection import error_code
from tests.endpoints.test_messages_request import ask, connected, page_of, query, waiting
from tests.postgres.sql import open_sql

MESSAGES = 1200
BATCH = 40


@asynccontextmanager
async def replicas(url: str) -> AsyncIterator[tuple[list[Broker], list[Peer]]]:
    """Two replicas that keep few messages in memory, and a connection to each."""
    config = msgspec.structs.replace(
        CONFIG, database=DatabaseSettings(url=url), limits=LimitSettings(recent=4096), retention=CONFIG.retention
    )
    async with (
        running(config) as (one, first),
        running(config) as (other, second),
        connected(first) as to_one,
        connected(second) as to_other,
    ):
        for broker in (one, other):
            await broker.replica.log.wait_open()
        yield [one, other], [to_one, to_other]


async def test_pages_of_alternating_replicas_miss_nothing_but_what_their_gaps_announce(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While messages are published and retention drops the oldest, a client reads pages to the end."""
    monkeypatch.setattr(log_retention, "CHECK_INTERVAL", 3600)
    floors, wanted = [1], set[int]()
    published = trio.Event()

    async def publish(broker: Broker) -> None:
        async with open_sql(database_url) as sql:
            for number in range(0, MESSAGES, BATCH):
                async with trio.open_nursery() as nursery:
                    for each in range(number, number + BATCH):
                        nursery.start_soon(publish_one, broker, each)
                await sql.execute("UPDATE catbus.head SET slot = (slot + 1) % 8")
                if number > 3 * BATCH:
                    # A step takes no entries while another session reads them.
                    ((floor,),) = await sql.fetch("SELECT floor FROM catbus.retain(1, $1)", 1 << 50)
                    floors.append(floor)
        published.set()

    async def publish_one(broker: Broker, number: int) -> None:
        seq = await broker.publish("a.b" if number % 3 else "x", number)
        assert seq is not None
        if number % 3:
            wanted.add(seq)

    found: list[int] = []
    missing: set[int] = set()
    async with replicas(database_url) as (brokers, peers), trio.open_nursery() as nursery:
        nursery.start_soon(publish, brokers[0])
        cursor = f"0.{brokers[0].replica.log.epoch}"
        for number, peer, limit in zip(count(1), cycle(peers), cycle((1, 3, 50, 9)), strict=False):
            if number % 20 == 0:
                # The client is slow, and retention overtakes it.
                while floors[-1] <= int(cursor.partition(".")[0]) + 1 and not published.is_set():
                    await trio.sleep(0.01)
            page = await ask(peer, f"pattern=a.*&pattern=a.b&since={cursor}&limit={limit}&wait=1")
            seqs = [message["seq"] for message in page["messages"]]
            if gap := page.get("gap"):
                assert gap["reason"] == "retention"
                missing.update(range(gap["from"], gap["to"] + 1))
                assert all(gap["to"] < seq for seq in seqs)
            found += seqs
            cursor = page["cursor"]
            if published.is_set() and not page["more"] and int(cursor.partition(".")[0]) == MESSAGES:
                break
    assert found == sorted(set(found))
    assert wanted - set(found) <= missing
    assert set(found) <= wanted
    assert missing
    assert max(missing) < floors[-1]


async def test_revoked_role_gets_no_message_that_is_published_during_its_wait(database_url: str) -> None:
    async with replicas(database_url) as (brokers, peers), open_roles(DatabaseSettings(url=database_url)) as roles:
        token, _ = await roles.create("ci", Grants(("a",)))
        for broker, peer in zip(brokers, peers, strict=True):
            await peer.send(query("pattern=a&wait=30", f"Authorization: Bearer {token}"))
            await waiting(broker, 1)
        await roles.revoke(token, Grants(("a",)))
        await brokers[0].publish("a", "private")
        for peer in peers:
            response = await peer.response()
            assert (response.status, error_code(response)) == (403, "unauthorized")
            assert b"private" not in response.body


async def test_waiting_request_is_answered_by_a_message_of_another_replica(database_url: str) -> None:
    async with replicas(database_url) as (brokers, peers):
        await peers[1].send(query("pattern=a&wait=30"))
        await waiting(brokers[1], 1)
        seq = await brokers[0].publish("a", 1)
        page = page_of(await peers[1].response())
        assert [message["seq"] for message in page["messages"]] == [seq]
        # The other replica resumes from this cursor at once, whether it has heard of the message or not.
        await peers[0].send(query(f"pattern=a&wait=30&since={page['cursor']}"))
        await waiting(brokers[0], 1)
        seq = await brokers[1].publish("a", 2)
        assert [message["seq"] for message in page_of(await peers[0].response())["messages"]] == [seq]
