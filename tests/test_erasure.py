"""Erasure in one process: pages of history that wait, subscriptions of the process, and names in statistics."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import catbus
from catbus.errors import Refused
from catbus.replica import Replica
from catbus.session.driver import SessionDriver
from tests.brokers import CONFIG, TOKEN


class TransportWriter:
    def flush(self) -> None:
        """Write nothing: the client does not read."""


async def request(client: SessionDriver, **message: object) -> None:
    await client.receive(json.dumps(message).encode())


def replies(client: SessionDriver) -> list[dict[str, object]]:
    return [
        json.loads(line) for item in client.send_queue.take() if isinstance(item, bytes) for line in item.splitlines()
    ]


async def open_client(replica: Replica) -> SessionDriver:
    client = replica.open_session(TransportWriter(), transport="websocket")
    await request(client, type="auth", token=TOKEN, protocol=1)
    await wait_all_tasks_blocked()
    client.send_queue.take()
    return client


async def test_page_of_history_that_waits_is_replaced_by_an_error_if_a_message_of_it_is_erased() -> None:
    async with catbus.open_broker(CONFIG) as broker:
        for channel in ("a.x", "a.y", "b"):
            await broker.publish(channel, "secret")
        client = await open_client(broker.replica)
        for number, pattern in enumerate(("a.*", "b")):
            await request(client, type="history", pattern=pattern, id=number)
        assert await broker.erase("a.y") == 1
        error, page = replies(client)
        assert (error["type"], error["code"], error["id"]) == ("error", "unavailable", 0)
        assert (page["type"], page["id"]) == ("history", 1)
        await request(client, type="history", pattern="*", id=2)
        [page] = replies(client)
        assert [message["channel"] for message in page["messages"]] == ["a.x", "b"]  # type: ignore[index, attr-defined]
        client.end()


async def test_subscription_of_the_process_hands_on_no_erased_message() -> None:
    async with catbus.open_broker(CONFIG) as broker, broker.subscribe("*") as messages:
        for number in range(4):
            await broker.publish(f"a.{number}", number)
        # It has taken all of them from its send queue.
        assert (await anext(messages)).payload == 0
        assert await broker.erase("a.1") == 1
        assert (await anext(messages)).payload == 2
        await broker.publish("a.1", 4)
        assert [(await anext(messages)).seq for _ in range(2)] == [4, 5]


async def test_names_of_erased_channels_are_in_no_statistics() -> None:
    async with catbus.open_broker(CONFIG) as broker:
        await broker.publish("users.42", 1)
        delivery = broker.replica.delivery
        now = trio.current_time()
        assert [name for name, _ in delivery.channel_rates.report(now, 10).channels] == ["users.42"]
        await broker.erase("users.*")
        assert delivery.channel_rates.report(now, 10).channels == []
        assert "users.42" not in delivery.trees.live._cache


async def test_erasure_is_restricted_by_sender_and_time() -> None:
    async with catbus.open_broker(CONFIG) as broker:
        await broker.publish("a", 1)
        now = datetime.now(UTC)
        assert await broker.erase("a", sender="alice") == 0
        assert await broker.erase("a", before=now - timedelta(hours=1)) == 0
        assert await broker.erase("a", before=now + timedelta(hours=1)) == 1
        with pytest.raises(Refused, match="not a pattern"):
            await broker.erase("a.*.b")
