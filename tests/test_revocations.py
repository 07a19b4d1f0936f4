"""Revoked tokens are rejected, and sessions that use them are closed, on every replica and over every transport."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import catbus
from catbus.auth import revocations as module
from catbus.auth.grants import Grants, Identity
from catbus.auth.revocations import Revocations
from catbus.auth.role_tokens import role_key
from catbus.auth.token_errors import RejectionReason
from catbus.auth.tokens import Authenticator, sign
from catbus.client import Backoff, Bus
from catbus.close_codes import CloseCode
from catbus.config import Config, DatabaseSettings
from catbus.error_codes import ErrorCode
from catbus.limits.cpu_scheduler import TimeSlices
from catbus.log import MemoryLog
from catbus.observability.metrics import export_metrics
from catbus.postgres.listen import polling_interval
from catbus.postgres.roles.role_store import open_roles
from catbus.replica import Replica
from catbus.session.driver import SessionDriver
from tests.brokers import SECRET, running
from tests.endpoints.event_source import events
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql
from tests.test_both_transports import running as running_both_transports
from tests.test_live_permissions import Slow, publish, subscribe, tell, words
from tests.test_replica import ROLE, Roles, objects, open_client, reply_types
from tests.test_roles import authenticate, on, post
from tests.test_tokens import signed_jwt
from tests.test_wrong_input import speaker


def make_token(client_id: str = "alice", issued: float | None = None, grants: Grants = Grants.ALL) -> str:
    """A token that is issued now, unless told otherwise."""
    return sign(SECRET, client_id=client_id, grants=grants, issued_at=time.time() if issued is None else issued)


# One replica, with a log in memory


@pytest.fixture
async def replica(nursery: trio.Nursery) -> Replica:
    return await open_replica(nursery)


async def open_replica(nursery: trio.Nursery, roles: Roles | None = None) -> Replica:
    replica = Replica(Config(), MemoryLog(), Authenticator([SECRET]), roles=roles)
    await nursery.start(replica.log.run, replica.delivery)
    nursery.start_soon(replica.delivery.run)
    nursery.start_soon(replica.permissions.run)
    nursery.start_soon(replica.revocations.run)
    return replica


def auth(token: str) -> dict[str, Any]:
    return {"type": "auth", "token": token, "protocol": 1}


async def enter(replica: Replica, token: str, *messages: dict[str, Any]) -> SessionDriver:
    """Open a session with this token, which has sent these messages."""
    client = open_client(replica)
    await client.receive(objects(auth(token), *messages))
    await wait_all_tasks_blocked()
    client.send_queue.take()
    return client


async def test_revocation_closes_sessions_with_earlier_tokens_and_no_others(replica: Replica) -> None:
    now = float(int(time.time()))
    old = await enter(replica, make_token(issued=now - 10), *subscribe("a.*", "a.b"))
    undated = await enter(replica, sign(SECRET, client_id="alice", grants=Grants.ALL))
    newer = await enter(replica, make_token(issued=now - 5), *subscribe("a.*"))
    other = await enter(replica, make_token("bob", now - 10), *subscribe("a.*"))
    nobody = await enter(replica, sign(SECRET, client_id=None, grants=Grants.ALL), *subscribe("a.*"))
    await tell(replica, "a.b")
    assert await replica.revoke_client("alice", now - 5) == now - 5
    await wait_all_tasks_blocked()
    for client in (old, undated):
        assert client.closing == (CloseCode.REVOKED, "the token was revoked")
    # Unsent messages are dropped, and nothing more is delivered.
    await tell(replica, "a.c")
    for client in (old, undated):
        assert words(client) == [("error", None)]
    for client in (newer, other, nobody):
        assert client.closing is None
        assert words(client) == [("message", "a.*")] * 2
    assert replica.delivery.statistics().live == 3
    body, _ = export_metrics(replica)
    assert b"catbus_revocations 1.0\n" in body
    assert b"catbus_sessions_revoked_total 2.0\n" in body


async def test_revoked_token_is_rejected_and_a_newer_one_is_accepted(replica: Replica) -> None:
    old = make_token()
    in_force = await replica.revoke_client("alice")
    new = make_token()
    for token, reply in ((old, "auth_error"), (new, "auth_ok"), (make_token("bob", 0), "auth_ok")):
        client = open_client(replica)
        await client.receive(objects(auth(token)))
        assert reply_types(client) == [reply]
        assert client.closing == (None if reply == "auth_ok" else (CloseCode.REVOKED, "the token was revoked"))
    # An earlier time changes nothing.
    assert await replica.revoke_client("alice", in_force - 10) == in_force
    assert replica.runtime_statistics.rejected_tokens == {RejectionReason.REVOKED: 1}


async def test_session_with_a_newer_token_survives_the_revocation_of_its_first(replica: Replica) -> None:
    now = float(int(time.time()))
    client = await enter(replica, make_token(issued=now - 10), auth(make_token(issued=now - 5)), *subscribe("a"))
    await replica.revoke_client("alice", now - 5)
    await wait_all_tasks_blocked()
    assert client.closing is None
    await client.receive(objects(auth(make_token(issued=now - 6))))
    assert client.closing == (CloseCode.REVOKED, "the token was revoked")
    assert reply_types(client) == ["auth_error"]
    client.end()
    assert not replica.revocations._sessions and not replica.revocations._client_ids


async def test_revocation_closes_sessions_whose_issuer_is_ahead(replica: Replica) -> None:
    """A token counts as issued when it was seen, so it does not outlive a revocation by the error of its issuer."""
    replica.authenticator._leeway = 30
    client = await enter(replica, make_token(issued=time.time() + 20))
    await replica.revoke_client("alice")
    await wait_all_tasks_blocked()
    assert client.closing is not None


async def test_revocation_withdraws_pending_publishes(replica: Replica) -> None:
    replica.cpu_scheduler.slices = TimeSlices(3600.0, 3600.0)
    client = await enter(replica, make_token())
    await client.receive(objects(publish("a.x", id=1), publish("a.y", id=2)))
    client.revoke_token()
    assert reply_types(client) == ["publish_error", "publish_error", "error"]
    await wait_all_tasks_blocked()
    assert replica.log.applied == 0


async def test_revocation_during_a_role_lookup_is_not_missed(nursery: trio.Nursery) -> None:
    roles = Slow()
    replica = await open_replica(nursery, roles)
    roles.answer = Identity("ci", Grants.ALL, None, role=role_key(ROLE), issued=1000.0)
    client = open_client(replica)
    nursery.start_soon(client.receive, objects(auth(ROLE)))
    await wait_all_tasks_blocked()
    await replica.revoke_client("ci", 1000.5)
    roles.let.set()
    await wait_all_tasks_blocked()
    assert client.closing == (CloseCode.REVOKED, "the token was revoked")
    later = Identity("ci", Grants.ALL, None, role=role_key(ROLE), issued=1000.5)
    roles.answer = later
    assert (await enter(replica, ROLE)).session.identity == later


async def test_session_that_opens_after_a_revocation_became_known_is_closed() -> None:
    revocations, closed = Revocations(), list[str]()

    class Session:
        def revoke_token(self) -> None:
            closed.append("closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(revocations.run)
        revocations.check("alice", 5.0)
        await revocations.revoke("alice", 10.0)
        revocations.add(Session(), "alice", 5.0)
        revocations.add(Session(), "alice", 10.0)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert closed == ["closed"]


async def test_many_sessions_are_closed_in_steps(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLOSING_TIME", -1.0)
    now = float(int(time.time()))
    clients = [await enter(replica, make_token(issued=now - 10)) for _ in range(50)]
    renewed: list[SessionDriver] = []
    left: list[SessionDriver] = []
    async with trio.open_nursery() as nursery:

        async def change_meanwhile() -> None:
            while replica.revocations.closed < 20:
                await trio.lowlevel.checkpoint()
            renewed.append(next(client for client in clients if client.closing is None))
            left.append(next(client for client in reversed(clients) if client.closing is None))
            left[0].end()
            replica.revocations.add(renewed[0], "alice", now)

        nursery.start_soon(change_meanwhile)
        await replica.revoke_client("alice", now)
    await wait_all_tasks_blocked()
    assert [client for client in clients if client.closing is None] == [*renewed, *left]
    assert replica.revocations.closed == 48


# Replicas on one database


@asynccontextmanager
async def two_replicas(url: str, state: Path) -> AsyncIterator[list[tuple[catbus.Broker, dict[str, Any]]]]:
    """Two replicas with all transports; each with its URLs and what else a client needs, by transport."""
    async with AsyncExitStack() as stack:
        brokers = []
        for name in ("one", "other"):
            broker, websocket, found = await stack.enter_async_context(running_both_transports(state / name, on(url)))
            await broker.replica.log.wait_open()
            address = dict(broker.addresses)["websocket"]
            more = {"webtransport": found["webtransport"], "ca": found["certificate"], "http": address}
            brokers.append((broker, {"websocket": websocket, **more}))
        yield brokers


TRANSPORTS = ("websocket", "webtransport")


def connect(found: dict[str, Any], transport: str, token: Any, **options: Any) -> Any:
    ca = found["ca"] if transport == "webtransport" else None
    return catbus.connect(found[transport], token=token, ca=ca, **options)


@pytest.mark.parametrize("by", ["notification", "poll"])
async def test_revocation_closes_sessions_on_every_replica_and_transport(
    database_url: str, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "notification":
        monkeypatch.setattr(polling_interval, "NOTIFIED_INTERVAL", 3600.0)
    else:
        listener = "catbus.postgres.listen.notification_listener.NotificationListener"
        monkeypatch.setattr(f"{listener}._receive_role", lambda *_: None)
    old, bob = make_token(), make_token("bob")
    async with two_replicas(database_url, tmp_path) as brokers, AsyncExitStack() as stack:
        enter = stack.enter_async_context
        buses: list[Bus] = []
        unaffected: list[Bus] = []
        for _, found in brokers:
            for transport in TRANSPORTS:
                buses.append(await enter(connect(found, transport, old, reconnect=False)))
                unaffected.append(await enter(connect(found, transport, bob, reconnect=False)))
        subscriptions = [await enter(bus.subscribe("a.*")) for bus in buses]
        streams = [await enter(events(found["http"], "pattern=a.*", token=old)) for _, found in brokers]
        assert [stream.status for stream in streams] == [200, 200]
        kept = [await enter(bus.subscribe("a.*")) for bus in unaffected]
        await brokers[0][0].replica.revoke_client("alice")
        for messages in subscriptions:
            with pytest.raises(catbus.Disconnected) as ended:
                await anext(messages)
            assert ended.value.code == CloseCode.REVOKED
        for stream in streams:
            last = await stream.next()
            assert (last.type, last.data["code"]) == ("close", CloseCode.REVOKED)
        new = make_token()
        for broker, found in brokers:
            await broker.replica.log.wait_open()
            for transport in TRANSPORTS:
                with pytest.raises(catbus.Refused) as refused:
                    async with connect(found, transport, old, reconnect=False):
                        pass
                assert refused.value.code is ErrorCode.REVOKED
                async with connect(found, transport, new, reconnect=False) as bus:
                    assert await bus.publish("a.x", 1)
            status, reply = await post(found["http"], old, b'{"channel":"a.x","payload":1}')
            assert (status, reply["code"]) == (401, "revoked")
            status, reply = await post(found["http"], new, b'{"channel":"a.x","payload":1}')
            assert status == 200
            for token, status in ((old, 401), (new, 200)):
                async with events(found["http"], "pattern=a.*", token=token) as stream:
                    assert stream.status == status
        for messages in kept:
            assert [(await anext(messages)).payload for _ in range(6)] == [1] * 6


async def test_role_tokens_of_a_revoked_client_are_those_of_roles_created_before(database_url: str) -> None:
    async with open_roles(DatabaseSettings(url=database_url)) as roles, running(on(database_url)) as (broker, address):
        await broker.replica.log.wait_open()
        earlier, _ = await roles.create("ci", Grants.ALL)
        async with speaker(address) as peer:
            assert (await authenticate(peer, earlier))["type"] == "auth_ok"
            await broker.replica.revoke_client("ci")
            assert (await peer.reply())["code"] == "revoked"
            assert await peer.close_code() == CloseCode.REVOKED
        later, _ = await roles.create("ci", Grants.ALL)
        for token, reply in ((earlier, "auth_error"), (later, "auth_ok")):
            async with speaker(address) as peer:
                assert (await authenticate(peer, token))["type"] == reply


async def test_client_with_a_token_function_continues_with_another_token(database_url: str) -> None:
    """An issuer that writes whole seconds needs a moment until its tokens are newer than the revocation."""
    given: list[str] = []

    async def token() -> str:
        granted = {"sub": "alice", "catbus": {"read": ["*"], "write": ["*"]}}
        given.append(signed_jwt({"alg": "HS256"}, {**granted, "iat": int(time.time())}, SECRET))
        return given[-1]

    async with running(on(database_url)) as (broker, address):
        await broker.replica.log.wait_open()
        reconnect = Backoff(first=0.1, jitter=0)
        async with (
            catbus.connect(f"ws://{address}/ws", token=token, reconnect=reconnect, persist=True) as bus,
            bus.subscribe("a") as messages,
        ):
            await broker.replica.revoke_client("alice")
            while not broker.replica.revocations.closed:
                await trio.sleep(0.01)
            await bus.publish("a", 1)
            assert (await anext(messages)).payload == 1
        assert len(given) > 1


async def test_stateless_tokens_and_known_revocations_work_without_the_database(database_url: str) -> None:
    old = make_token()
    async with open_proxy(database_url) as proxy, running(on(proxy.url)) as (broker, address):
        await broker.replica.log.wait_open()
        await broker.replica.revoke_client("alice")
        async with speaker(address) as later_revoked:
            assert (await authenticate(later_revoked, make_token("bob")))["type"] == "auth_ok"
            proxy.close()
            for token, reply in ((old, "auth_error"), (make_token(), "auth_ok")):
                async with speaker(address) as peer:
                    assert (await authenticate(peer, token))["type"] == reply
            async with open_sql(database_url) as sql:
                await sql.fetch("SELECT catbus.revoke_client('bob')")
            await later_revoked.say({"type": "ping", "seq": 1})
            assert (await later_revoked.reply())["type"] == "pong"
            proxy.open()
            while (reply := await later_revoked.reply())["type"] == "head":
                pass
            assert reply["code"] == "revoked"
            assert await later_revoked.close_code() == CloseCode.REVOKED
