"""Session events in PostgreSQL: a backend that follows them misses nothing, over replicas and outages."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import trio

import catbus
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.client import connect
from catbus.config import DatabaseSettings, EventsSettings
from tests.brokers import CONFIG, running
from tests.brokers import SECRET as BROKER_SECRET
from tests.postgres.processes import SECRET, Replica, open_replicas, token
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql, wait_until

PATIENCE = 60.0
CLIENTS = 12
PATTERN = "_catbus.sessions.*"


async def read_table(url: str) -> list[tuple[int, dict[str, Any]]]:
    """The seq and the payload of all events in the log."""
    async with open_sql(url) as sql:
        rows = await sql.fetch("SELECT seq, payload FROM catbus.entries WHERE starts_with(channel, '_') ORDER BY seq")
    return [(seq, json.loads(payload)) for seq, payload in rows]


async def visit(replica: Replica, client_id: str) -> None:
    async with connect(replica.url, token=token(client_id), reconnect=False) as bus:
        await bus.publish("a", client_id)


def is_close(event: dict[str, Any]) -> bool:
    return bool(event["event"] == "close" and event["client_id"].startswith("client"))


async def test_backend_that_moves_between_replicas_misses_no_event(database_url: str) -> None:
    """Its first replica is killed. A killed replica publishes no close of the sessions that it had."""
    backend = sign(SECRET, client_id="backend", grants=Grants(read=(PATTERN,)))
    found: list[tuple[int, dict[str, Any]]] = []

    async def follow(replica: Replica, closes: int) -> None:
        """Continue until there are so many closes of clients in all."""
        since = found[-1][0] if found else 0
        async with (
            connect(replica.url, token=backend, reconnect=False) as bus,
            bus.subscribe(PATTERN, since=since) as messages,
        ):
            async for message in messages:
                assert message.sender == "_catbus"
                assert message.seq is not None
                found.append((message.seq, message.payload))
                if sum(is_close(event) for _, event in found) == closes:
                    return

    with trio.fail_after(PATIENCE):
        async with open_replicas(database_url, 2, CATBUS_EVENTS_SESSIONS="true") as (first, second):

            async def is_open() -> bool:
                events = [event for _, event in await read_table(database_url)]
                return any(event["client_id"] == "client-lost" for event in events)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow, second, CLIENTS)
                for number in range(CLIENTS):
                    nursery.start_soon(visit, (first, second)[number % 2], f"client-{number}")
            async with connect(second.url, token=token("client-lost"), reconnect=False):
                await wait_until(is_open)
                second.kill()
                await second.wait()
            async with trio.open_nursery() as nursery:
                for number in range(CLIENTS):
                    nursery.start_soon(visit, first, f"client-later-{number}")
            await follow(first, 2 * CLIENTS)
            stored = await read_table(database_url)
    assert [entry for entry in stored if entry[0] <= found[-1][0]] == found
    opened = {event["client_id"] for _, event in found if event["event"] == "open"}
    closed = {event["client_id"] for _, event in found if event["event"] == "close"}
    assert "client-lost" in opened - closed
    assert len({event["replica"] for _, event in found}) == 2


async def test_stopping_replica_publishes_its_last_closes(database_url: str) -> None:
    with trio.fail_after(PATIENCE):
        async with open_replicas(database_url, 1, CATBUS_EVENTS_SESSIONS="true") as [replica]:
            async with connect(replica.url, token=token("client"), reconnect=False):
                replica.terminate()
                assert await replica.wait() == 0
            events = [event for _, event in await read_table(database_url)]
    assert [(event["event"], event["client_id"]) for event in events] == [("open", "client"), ("close", "client")]


@pytest.mark.parametrize("outage", ["unreachable", "unanswered"])
async def test_events_of_an_outage_are_published_once_after_it(database_url: str, outage: str) -> None:
    """Also those whose append was not answered: the log may have them, or may not."""
    async with open_proxy(database_url) as proxy:
        database = DatabaseSettings(url=proxy.url, publish_timeout=0.5, connect_timeout=1)
        config = msgspec.structs.replace(CONFIG, database=database, events=EventsSettings(sessions=True))
        async with running(config) as (broker, address):
            events = broker.replica.session_events

            async def come_and_go(client_id: str) -> None:
                known = sign(BROKER_SECRET, client_id=client_id, grants=Grants.ALL)
                async with catbus.connect(f"ws://{address}/ws", token=known):
                    pass
                while broker.replica.sessions:
                    await trio.sleep(0.001)

            await broker.replica.log.wait_open()
            await come_and_go("before")
            await events.flush()
            if outage == "unreachable":
                proxy.close()
            else:
                proxy.block_answers()
            for number in range(5):
                await come_and_go(f"client-{number}")
            # The outcome of this publish comes after the outcomes of the events before it.
            with pytest.raises(catbus.Refused):
                await broker.publish("a", 1)
            await come_and_go("later")
            if outage == "unreachable":
                proxy.open()
            else:
                proxy.unblock()
            await events.flush()
            found = [event for _, event in await read_table(database_url)]
    names = ["before", *(f"client-{number}" for number in range(5)), "later"]
    assert [(event["client_id"], event["event"]) for event in found] == [
        (name, event) for name in names for event in ("open", "close")
    ]
    assert events.counts == {"published": 2 * len(names), "dropped": 0}
