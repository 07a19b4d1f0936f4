"""Webhooks from end to end: a database, replicas, and receivers that fail in every way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import standardwebhooks
import trio

from catbus.config import DatabaseSettings, WebhookSettings
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.webhooks import verdicts
from tests.log.harness import TEST_TIMEOUT, running
from tests.postgres.bouncer import open_bouncer
from tests.postgres.consumers import dead_letters, positions, publish
from tests.postgres.processes import open_replicas
from tests.postgres.sql import open_sql, wait_until
from tests.postgres.webhook_receiver import Delivery, Reply, open_receiver

LOOPBACK = ("127.0.0.0/8",)
STATES = "SELECT paused IS NOT NULL, reason, delivering, failures, due IS NOT NULL, error FROM catbus.webhook_states()"

Decide = Callable[[Delivery], Awaitable[Reply]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry at once: how long the pauses are is tested elsewhere."""
    monkeypatch.setattr(verdicts, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(verdicts, "LONGEST_DELAY", 0.001)


def make(url: str, **settings: Any) -> PostgresLog:
    return PostgresLog(DatabaseSettings(url=url), webhooks=WebhookSettings(**{"allow": LOOPBACK, **settings}))


async def create(sql: DatabaseConnection, url: str, name: str = "c", *, partitions: int = 1) -> str:
    """Create a consumer of `a.*`, and return its secret."""
    create = "SELECT catbus.create_consumer($1, 'a.*', partitions => $2, start => 'floor', push => $3)"
    await sql.fetch(create, name, partitions, url)
    ((secret,),) = await sql.fetch("SELECT catbus.webhook_secret($1)", name)
    return str(secret)


async def wait_settled(sql: DatabaseConnection, seq: int, name: str = "c") -> None:
    """Wait until a partition is complete up to this seq."""

    async def settled() -> bool:
        # A partition without messages moves later.
        return max(position.cursor for position in await positions(sql, name)) == seq

    await wait_until(settled)


async def state(sql: DatabaseConnection) -> tuple[Any, ...]:
    """The state of a consumer with one partition."""
    return tuple(await sql.fetchrow(STATES))


def in_turn(*replies: Reply) -> Decide:
    """Decide so, one after the other, and accept the rest."""
    left = [*replies]

    async def decide(_: Delivery) -> Reply:
        return left.pop(0) if left else Reply()

    return decide


async def never(_: Delivery) -> Reply:
    await trio.sleep_forever()
    raise AssertionError


# Deliveries


async def test_messages_are_delivered_and_signed(database_url: str) -> None:
    async with open_receiver() as receiver, open_sql(database_url) as sql, running(make(database_url)):
        secret = await create(sql, receiver.url)
        head = await publish(sql, "a.x", "b.x", "a.y")
        await receiver.wait_until(lambda self: len(self.seqs) == 2)
        (delivery,) = receiver.deliveries
        standardwebhooks.Webhook(secret).verify(delivery.body, dict(delivery.headers))
        assert re.fullmatch("msg_[0-9a-f]{32}", delivery.id)
        assert delivery.event["type"] == "catbus.messages"
        assert delivery.event["data"]["consumer"] == "c"
        assert delivery.event["data"]["partition"] == 0
        assert [{**message, "at": 0} for message in delivery.event["data"]["messages"]] == [
            {"seq": 1, "channel": "a.x", "payload": 1, "at": 0},
            {"seq": 3, "channel": "a.y", "payload": 3, "at": 0},
        ]
        await wait_settled(sql, head)


async def test_batches_are_limited_in_messages_and_bytes(database_url: str) -> None:
    log = make(database_url, batch=3, batch_size=1000)
    async with open_receiver() as receiver, open_sql(database_url) as sql:
        await create(sql, receiver.url)
        await publish(sql, *["a.x"] * 7)
        await sql.execute("UPDATE catbus.entries SET payload = to_json(repeat('x', 2000)) WHERE seq IN (5, 6)")
        async with running(log):
            await receiver.wait_until(lambda self: len(self.seqs) == 7)
        assert [delivery.seqs for delivery in receiver.accepted] == [[1, 2, 3], [4], [5], [6], [7]]


async def test_deliveries_work_through_a_pooler(database_url: str) -> None:
    async with (
        open_bouncer(database_url) as bouncer,
        open_receiver() as receiver,
        open_sql(database_url) as sql,
        running(make(bouncer.url)),
    ):
        await create(sql, receiver.url, partitions=2)
        await publish(sql, *["a.x", "a.y", "a.z"] * 5)
        await receiver.wait_until(lambda self: len(self.seqs) == 15)


@pytest.mark.parametrize(
    "failures",
    [
        [Reply(500)],
        [Reply(None)],
        [Reply(302, (("Location", "/"),)), Reply(404)],
        [Reply(429), Reply(503, (("Retry-After", "0"),)), Reply(429)],
    ],
    ids=["500", "closed", "redirect", "throttled"],
)
async def test_failed_batch_comes_again_with_the_same_id_and_body(database_url: str, failures: list[Reply]) -> None:
    async with open_receiver(in_turn(*failures)) as receiver, open_sql(database_url) as sql:
        await create(sql, receiver.url)
        await publish(sql, *["a.x"] * 5)
        async with running(make(database_url)):
            await receiver.wait_until(lambda self: self.accepted)
            await publish(sql, "a.y")
            await receiver.wait_until(lambda self: len(self.seqs) == 6)
        assert receiver.seqs == [1, 2, 3, 4, 5, 6]
        *retries, _ = receiver.deliveries
        assert len(retries) == len(failures) + 1
        assert len({(delivery.id, delivery.body) for delivery in retries}) == 1


async def test_receiver_that_does_not_respond_in_time_gets_the_batch_again(database_url: str) -> None:
    async def decide(delivery: Delivery) -> Reply:
        return await never(delivery) if len(receiver.deliveries) == 1 else Reply()

    async with open_receiver(decide) as receiver, open_sql(database_url) as sql:
        await create(sql, receiver.url)
        await publish(sql, "a.x")
        log = make(database_url, timeout=1.0)
        async with running(log):
            await receiver.wait_until(lambda self: self.accepted)
            await wait_settled(sql, 1)
        first, second = receiver.deliveries[:2]
        assert (first.id, first.body) == (second.id, second.body)
        assert log.statistics().webhooks.attempts["timeout"] >= 1


async def test_message_that_the_receiver_cannot_take_becomes_a_dead_letter_alone(database_url: str) -> None:
    async def decide(delivery: Delivery) -> Reply:
        return Reply(400) if 4 in delivery.seqs else Reply()

    log = make(database_url, attempts=7)
    async with open_receiver(decide) as receiver, open_sql(database_url) as sql:
        await create(sql, receiver.url)
        await publish(sql, *["a.x"] * 9)
        async with running(log):
            await receiver.wait_until(lambda self: len(self.seqs) == 8)
            await wait_settled(sql, 9)
        assert receiver.seqs == [1, 2, 3, 5, 6, 7, 8, 9]
        assert sum(4 in delivery.seqs for delivery in receiver.deliveries) >= 7
        assert await dead_letters(sql) == [("c", 4, "a.x", "4", "the receiver responded with status 400")]
        found = log.statistics().webhooks
        assert (found.messages, found.rejected, found.lost_leases) == (8, 1, 0)


async def test_receiver_that_is_gone_pauses_the_consumer_until_it_is_resumed(database_url: str) -> None:
    async with open_receiver(in_turn(Reply(410))) as receiver, open_sql(database_url) as sql:
        await create(sql, receiver.url)
        await publish(sql, "a.x")
        async with running(make(database_url)):
            await wait_until(lambda: paused(sql))
            assert await state(sql) == (
                True, "the receiver responded with status 410", 1, 0, False, "the receiver responded with status 410"
            )  # fmt: skip
            await publish(sql, "a.x")
            assert len(receiver.deliveries) == 1
            await sql.fetch("SELECT catbus.resume_consumer('c')")
            await receiver.wait_until(lambda self: len(self.seqs) == 2)
            await wait_settled(sql, 2)
        assert await state(sql) == (False, None, 0, 0, False, None)
        assert receiver.deliveries[0].id == receiver.deliveries[1].id


async def paused(sql: DatabaseConnection) -> bool:
    return bool((await state(sql))[0])


async def test_receiver_that_asks_to_wait_is_left_alone_by_all_partitions(database_url: str) -> None:
    async with (
        open_receiver(in_turn(Reply(429, (("Retry-After", "3600"),)))) as receiver,
        open_sql(database_url) as sql,
    ):
        await create(sql, receiver.url)
        await publish(sql, "a.x")
        async with running(make(database_url)):
            await wait_until(lambda: is_waiting(sql))
        assert len(receiver.deliveries) == 1
        ((left,),) = await sql.fetch("SELECT extract(epoch FROM due - now())::float8 FROM catbus.webhook_states()")
        assert 3000 < left < 4000


async def is_waiting(sql: DatabaseConnection) -> bool:
    return bool((await state(sql))[4])


async def test_slow_receiver_does_not_delay_another_consumer(database_url: str) -> None:
    log = make(database_url, deliveries=4)
    async with open_receiver(never) as slow, open_receiver() as fast, open_sql(database_url) as sql, running(log):
        await create(sql, slow.url, "slow", partitions=16)
        await publish(sql, *(f"a.{n}" for n in range(50)))
        await slow.wait_until(lambda self: len(self.deliveries) == 2)
        await create(sql, fast.url, "fast")
        await fast.wait_until(lambda self: len(self.seqs) == 50)
        found = log.statistics().webhooks
        assert len(slow.deliveries) == 2
        assert 2 <= found.running <= 3
        assert found.waiting > 0


async def test_private_address_gets_nothing_unless_it_is_allowed(database_url: str) -> None:
    async with open_receiver() as receiver, open_sql(database_url) as sql:
        await create(sql, receiver.url)
        await publish(sql, "a.x")
        async with running(make(database_url, allow=("10.0.0.0/8",))):
            await wait_until(lambda: has_error(sql))
        assert "without TLS to 127.0.0.1 is not allowed" in (await state(sql))[5]
        assert receiver.connections == 0


async def has_error(sql: DatabaseConnection) -> bool:
    return (await state(sql))[5] is not None


async def test_replica_that_shall_not_deliver_does_not(database_url: str) -> None:
    async with open_receiver() as receiver, open_sql(database_url) as sql:
        await create(sql, receiver.url)
        await publish(sql, "a.x")
        async with running(make(database_url, enabled=False)) as (follower, _):
            await follower.wait_until(lambda self: self.applied == 1)
            async with running(make(database_url)):
                await receiver.wait_until(lambda self: self.seqs)


# Several replicas


def one_at_a_time() -> Decide:
    """Accept, and fail if two requests of a partition overlap."""
    running: Counter[int] = Counter()

    async def decide(delivery: Delivery) -> Reply:
        partition = delivery.event["data"]["partition"]
        running[partition] += 1
        assert running[partition] == 1
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        running[partition] -= 1
        return Reply()

    return decide


async def test_one_replica_at_a_time_delivers_a_partition_in_order(database_url: str) -> None:
    channels = [f"a.{n % 7}" for n in range(100)]
    async with open_receiver() as receiver, open_sql(database_url) as sql:
        receiver.decide = one_at_a_time()
        await create(sql, receiver.url, partitions=4)
        settings = {"batch": 3}
        async with running(make(database_url, **settings)), running(make(database_url, **settings)):
            for n in range(0, 100, 20):
                await publish(sql, *channels[n : n + 20])
            await receiver.wait_until(lambda self: len(self.seqs) == 100)
        for channel in {*channels}:
            seqs = [seq for seq in receiver.seqs if channels[seq - 1] == channel]
            assert seqs == sorted({*seqs})


async def test_batch_of_a_replica_that_stops_comes_again_at_once_from_another_one(database_url: str) -> None:
    """Its lease would end after a minute."""
    held = trio.Event()

    async def decide(_: Delivery) -> Reply:
        if len(receiver.deliveries) == 2:
            held.set()
            await trio.sleep_forever()
        return Reply()

    settings = {"CATBUS_WEBHOOKS_ALLOW": "127.0.0.0/8", "CATBUS_WEBHOOKS_BATCH": "10", "CATBUS_WEBHOOKS_TIMEOUT": "1m"}
    async with open_receiver(decide) as receiver, open_sql(database_url) as sql:
        await create(sql, receiver.url)
        await publish(sql, *["a.x"] * 35)
        async with open_replicas(database_url, 1, **settings) as (first,):
            with trio.fail_after(TEST_TIMEOUT):
                await held.wait()
            first.terminate()
            assert await first.wait() == 0
            async with open_replicas(database_url, 1, **settings):
                await receiver.wait_until(lambda self: len(self.seqs) == 35)
        assert receiver.seqs == [*range(1, 36)]
        cut_off, again = receiver.deliveries[1:3]
        assert (cut_off.id, cut_off.body) == (again.id, again.body)
        [(failures,)] = await sql.fetch("SELECT sum(failures) FROM catbus.webhook_batches")
        assert not failures


async def test_batch_of_a_killed_replica_comes_again_from_another_one(database_url: str) -> None:
    """Nothing is lost, the order stays, and what comes twice has the same id and the same body."""
    held = trio.Event()

    async def decide(_: Delivery) -> Reply:
        if len(receiver.deliveries) == 2:
            held.set()
            await trio.sleep_forever()
        return Reply()

    settings = {"CATBUS_WEBHOOKS_ALLOW": "127.0.0.0/8", "CATBUS_WEBHOOKS_BATCH": "10"}
    async with open_receiver(decide) as receiver, open_sql(database_url) as sql:
        await create(sql, receiver.url)
        await publish(sql, *["a.x"] * 35)
        async with open_replicas(database_url, 1, CATBUS_WEBHOOKS_TIMEOUT="1m", **settings) as (first,):
            with trio.fail_after(TEST_TIMEOUT):
                await held.wait()
            first.kill()
            await first.wait()
            # A minute has passed.
            await sql.execute("UPDATE catbus.webhook_batches SET until = now() WHERE replica IS NOT NULL")
            async with open_replicas(database_url, 1, **settings):
                await publish(sql, *["a.x"] * 5)
                await receiver.wait_until(lambda self: len(self.seqs) == 40)
        assert receiver.seqs == [*range(1, 41)]
        lost, again = receiver.deliveries[1:3]
        assert (lost.id, lost.body) == (again.id, again.body)
        assert len({delivery.id for delivery in receiver.accepted}) == len(receiver.accepted)
