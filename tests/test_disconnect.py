"""A client is disconnected on every replica, and may connect again."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import catbus
from catbus.client import Bus
from catbus.close_codes import CloseCode
from catbus.errors import Unavailable
from catbus.postgres.listen import polling_interval
from tests.brokers import request, running
from tests.endpoints.event_source import events
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql
from tests.test_revocations import TRANSPORTS, connect, make_token, two_replicas
from tests.test_roles import on


@pytest.mark.parametrize("by", ["notification", "poll", "sql"])
async def test_client_is_disconnected_on_every_replica_and_transport(
    database_url: str, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "poll":
        listener = "catbus.postgres.listen.notification_listener.NotificationListener"
        monkeypatch.setattr(f"{listener}._receive_role", lambda *_: None)
    else:
        monkeypatch.setattr(polling_interval, "NOTIFIED_INTERVAL", 3600.0)
    alice, bob, carol = make_token(), make_token("bob"), make_token("carol")
    async with two_replicas(database_url, tmp_path) as brokers, AsyncExitStack() as stack:
        enter = stack.enter_async_context

        async def enter_all(token: str) -> list[Bus]:
            return [
                await enter(connect(found, transport, token, reconnect=False))
                for _, found in brokers
                for transport in TRANSPORTS
            ]

        async def disconnect(client_id: str, number: int = len(TRANSPORTS)) -> None:
            if by == "sql":
                async with open_sql(database_url) as sql:
                    await sql.fetch(f"SELECT catbus.disconnect_client('{client_id}')")
            else:
                path = f"/api/clients/{client_id}/disconnect"
                response = await request(brokers[0][1]["http"], path, bob, method="POST")
                assert response.status == 200
                assert b'"sessions":%d' % number in response.body

        async def wait_disconnected(buses: list[Bus]) -> None:
            for bus in buses:
                with pytest.raises(catbus.Disconnected) as ended:
                    async with bus.subscribe("nothing.here") as messages:
                        await anext(messages)
                assert ended.value.code == CloseCode.DISCONNECTED

        buses, unaffected = await enter_all(alice), await enter_all(bob)
        streams = [await enter(events(found["http"], "pattern=a.*", token=carol)) for _, found in brokers]
        await disconnect("alice")
        await wait_disconnected(buses)
        # The same token is accepted, and its sessions stay, although the request is read again with the next one.
        again = await enter_all(alice)
        await disconnect("carol", number=1)
        for stream in streams:
            while (event := await stream.next()).type != "close":
                pass
            assert event.data["code"] == CloseCode.DISCONNECTED
        for bus in (*again, *unaffected):
            assert await bus.publish("a.x", 1)
        # The request is the second one for this client.
        await disconnect("alice")
        await wait_disconnected(again)


async def test_request_means_nothing_for_replicas_that_start_later(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.fetch("SELECT catbus.disconnect_client('alice')")
    async with running(on(database_url)) as (broker, address):
        await broker.replica.log.wait_open()
        url = f"ws://{address}/ws"
        async with (
            catbus.connect(url, token=make_token(), reconnect=False) as alice,
            catbus.connect(url, token=make_token("bob"), reconnect=False) as bob,
            bob.subscribe("nothing.here") as messages,
        ):
            assert await broker.replica.disconnect_client("bob") == 1
            with pytest.raises(catbus.Disconnected):
                await anext(messages)
            assert await alice.publish("a.x", 1)


async def test_unreachable_database_disconnects_nobody(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, running(on(proxy.url)) as (broker, address):
        await broker.replica.log.wait_open()
        async with catbus.connect(f"ws://{address}/ws", token=make_token(), reconnect=False) as bus:
            proxy.close()
            with pytest.raises(Unavailable):
                await broker.replica.disconnect_client("alice")
            response = await request(address, "/api/clients/alice/disconnect", make_token("bob"), method="POST")
            assert response.status == 503
            assert "retry-after" in response.headers
            proxy.open()
            await bus.ping()
