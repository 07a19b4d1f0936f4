"""Sessions of one replica, their deadlines and limits, on a virtual clock, with a log in memory."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import trio
from msgspec import Raw
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.auth.grants import Grants, Identity, client_of
from catbus.auth.role_tokens import make_role_token, role_key
from catbus.auth.tokens import Authenticator, sign
from catbus.broker import OWNER
from catbus.close_codes import CloseCode
from catbus.config import Config, DrainSettings, LimitSettings
from catbus.delivery.encoded_messages import EncodedMessages
from catbus.delivery.send_queue import SendQueue
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError, Unavailable
from catbus.limits.cpu_scheduler import TimeSlices
from catbus.log import Append, Committed, MemoryLog
from catbus.log.interface import APPEND_OVERHEAD
from catbus.protocol.wire_messages import Publish, check_payload
from catbus.replica import Replica
from catbus.session.driver import SessionDriver

SECRET = "a secret of the tests"


class TransportWriter:
    def flush(self) -> None:
        """Write nothing: the client does not read."""


@pytest.fixture
async def replica(nursery: trio.Nursery) -> Replica:
    replica = Replica(Config(limits=LimitSettings(send_queue=5000)), MemoryLog(), Authenticator([SECRET]))
    await nursery.start(replica.log.run, replica.delivery)
    return replica


def auth(lifetime: float | None, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An `auth` request with a token of the given lifetime in seconds of the virtual clock."""
    monkeypatch.setattr("time.time", trio.current_time)
    expires = None if lifetime is None else trio.current_time() + lifetime
    token = sign(SECRET, client_id="alice", grants=Grants.ALL, expires=expires)
    return json.dumps({"type": "auth", "token": token, "protocol": 1}).encode()


def open_client(replica: Replica, network: str = "") -> SessionDriver:
    return replica.open_session(TransportWriter(), transport="test", network=network)


def reply_types(client: SessionDriver) -> list[Any]:
    return [json.loads(line)["type"] for line in client.send_queue.take() if isinstance(line, bytes)]


async def test_session_without_auth_is_closed_in_time(replica: Replica, autojump_clock: MockClock) -> None:
    client = open_client(replica)
    await client.wait_closing()
    assert trio.current_time() == pytest.approx(10)
    assert client.closing is not None
    assert client.closing[0] is CloseCode.AUTH_TIMEOUT
    assert reply_types(client) == ["auth_error"]


@pytest.mark.parametrize("nonsense", [b"{}", b'{"type":"history","pattern":"a"}', b'{"type":"ping","seq":1}'])
async def test_client_is_read_no_faster_than_it_reads_its_replies(
    replica: Replica, nonsense: bytes, nursery: trio.Nursery
) -> None:
    client = open_client(replica)
    nursery.start_soon(client.receive, nonsense * 10_000)
    replies = 0
    while replies < 10_000:
        await wait_all_tasks_blocked()
        assert client.send_queue.size < 5000 + 200
        replies += len(client.send_queue.take())
    client.end()


async def test_authentication_moves_the_deadline(
    replica: Replica, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(replica)
    nursery.start_soon(client.wait_closing)
    await trio.sleep(9)
    await client.receive(auth(None, monkeypatch))
    await trio.sleep(80_000)
    assert client.closing is None
    client.end()


async def test_expired_token_closes_the_session_after_its_grace_period_unless_renewed(
    replica: Replica, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(replica)
    nursery.start_soon(client.wait_closing)
    await wait_all_tasks_blocked()
    await client.receive(auth(100, monkeypatch))
    await trio.sleep(120)
    await client.receive(auth(50, monkeypatch))
    await trio.sleep(79)
    assert client.closing is None
    await client.wait_closing()
    assert trio.current_time() == pytest.approx(120 + 50 + 30)
    assert client.closing is not None
    assert client.closing[0] is CloseCode.TOKEN_EXPIRED


async def test_deadline_applies_while_reading_from_the_client_pauses(
    replica: Replica, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(replica)
    await client.receive(auth(100, monkeypatch))
    nursery.start_soon(client.receive, b'{"type":"ping","seq":1}' * 1000)
    await wait_all_tasks_blocked()
    assert client.send_queue.full, "reading pauses until the client reads its replies"
    await client.wait_closing()
    assert trio.current_time() == pytest.approx(130)
    client.end()


async def test_session_that_ended_while_its_send_queue_was_full_processes_nothing_more(
    replica: Replica, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(replica)
    await client.receive(auth(None, monkeypatch))
    nursery.start_soon(client.receive, b'{"type":"ping","seq":1}{"type":"subscribe","pattern":"project.*"}' * 1000)
    await wait_all_tasks_blocked()
    assert replica.delivery.statistics().live
    client.end()
    await wait_all_tasks_blocked()
    assert not replica.delivery.statistics().live


async def test_client_that_sends_much_at_once_lets_other_tasks_run(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica.cpu_scheduler.slices = TimeSlices(0.0, 0.0)
    client = open_client(replica)
    await client.receive(auth(None, monkeypatch))
    steps = 0

    async def other() -> None:
        nonlocal steps
        while True:
            steps += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as both:
        both.start_soon(other)
        await client.receive(b'{"type":"ping","seq":1}' * 20)
        both.cancel_scope.cancel()
    assert steps > 10
    client.end()


# Heads for quiet sessions


class ReadingWriter:
    """A transport writer whose client reads every flush at once."""

    def __init__(self) -> None:
        self.client: SessionDriver | None = None
        self.received: list[tuple[float, str, int | None]] = []

    def flush(self) -> None:
        assert self.client is not None
        for item in self.client.send_queue.take():
            for line in (item if isinstance(item, bytes) else item.lines).splitlines():
                message = json.loads(line)
                self.received.append((trio.current_time(), message["type"], message.get("seq")))


async def quiet_client(
    replica: Replica, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, *patterns: str
) -> ReadingWriter:
    nursery.start_soon(replica.flusher.run)
    nursery.start_soon(replica.send_heads)
    writer = ReadingWriter()
    writer.client = replica.open_session(writer, transport="test")
    await writer.client.receive(auth(None, monkeypatch))
    await writer.client.receive(objects(*({"type": "subscribe", "pattern": pattern} for pattern in patterns)))
    await trio.sleep(0.1)
    writer.received.clear()
    return writer


async def publish(replica: Replica, channel: str) -> None:
    await replica.publish(OWNER, [Publish(channel, Raw(b"1"))])


async def test_quiet_session_gets_head(
    replica: Replica, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = await quiet_client(replica, nursery, monkeypatch, "quiet.*")
    await trio.sleep(100)
    assert writer.received == [], "the head is the same"
    await publish(replica, "elsewhere")
    await trio.sleep(31)
    [(_, kind, seq)] = writer.received
    assert (kind, seq) == ("head", 1)
    await trio.sleep(100)
    assert len(writer.received) == 1, "the session has this head already"
    nursery.cancel_scope.cancel()


async def test_session_that_gets_messages_gets_no_head(
    replica: Replica, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = await quiet_client(replica, nursery, monkeypatch, "busy")
    for _ in range(20):
        await publish(replica, "busy")
        await publish(replica, "elsewhere")
        await trio.sleep(10)
    assert {kind for _, kind, _ in writer.received} == {"message"}
    nursery.cancel_scope.cancel()


async def test_session_without_subscriptions_gets_no_head(
    replica: Replica, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = await quiet_client(replica, nursery, monkeypatch)
    await publish(replica, "elsewhere")
    await trio.sleep(100)
    assert writer.received == []
    nursery.cancel_scope.cancel()


async def test_waiting_for_the_close_ends_with_the_session(replica: Replica) -> None:
    client = open_client(replica)
    client.end()
    with trio.fail_after(5):
        await client.wait_closing()
    assert client.closing is None


# Role lookups, during which the replica continues


ROLE = make_role_token()
CI = Identity("ci", Grants(("a.*",), ("a.*",)), None, role=role_key(ROLE))


class Roles:
    """A role store with one role. Lookups wait until `let` is set."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.answer: Identity | Exception | None = CI
        self.let = trio.Event()
        self.changes = 0
        self.checked = trio.current_time()
        self._send, self._receive = trio.open_memory_channel[Collection[bytes] | None](1000)

    async def find(self, keys: Collection[bytes]) -> Mapping[bytes, Identity]:
        self.asked += keys
        await self.let.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return {} if self.answer is None else {key: replace(self.answer, role=key) for key in keys}

    async def wait_changes(self) -> Collection[bytes] | None:
        return await self._receive.receive()

    def change(self, answer: Identity | Exception | None, keys: Collection[bytes] | None = None) -> None:
        """Change the answer of later lookups, and report the change."""
        self.answer = answer
        self.changes += 1
        self._send.send_nowait(keys)


@pytest.fixture
async def roles() -> Roles:
    return Roles()


@pytest.fixture
async def role_replica(nursery: trio.Nursery, roles: Roles) -> Replica:
    config = Config(drain=DrainSettings(delay=0, window=5))
    replica = Replica(config, MemoryLog(), Authenticator([SECRET]), roles=roles)
    await nursery.start(replica.log.run, replica.delivery)
    nursery.start_soon(replica.delivery.run)
    nursery.start_soon(replica.permissions.run)
    return replica


def objects(*messages: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(message).encode() for message in messages)


AUTH = {"type": "auth", "token": ROLE, "protocol": 1}
PING = {"type": "ping", "seq": 1}
SUBSCRIBE = {"type": "subscribe", "pattern": "a.*"}


async def test_requests_after_an_auth_are_processed_after_it_and_in_order(
    role_replica: Replica, roles: Roles, nursery: trio.Nursery
) -> None:
    client = open_client(role_replica)
    nursery.start_soon(client.receive, objects(PING, AUTH, SUBSCRIBE, PING, {"type": "publish", "channel": "b"}))
    await wait_all_tasks_blocked()
    assert reply_types(client) == ["pong"]
    assert roles.asked == [role_key(ROLE)]
    roles.let.set()
    await wait_all_tasks_blocked()
    assert reply_types(client) == ["auth_ok", "subscribed", "pong", "head", "error"]
    assert client.session.identity == CI


async def test_lookup_that_hangs_does_not_move_the_deadline(
    role_replica: Replica, roles: Roles, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    client = open_client(role_replica)
    await trio.sleep(7)
    nursery.start_soon(client.receive, objects(AUTH, SUBSCRIBE))
    await client.wait_closing()
    assert trio.current_time() == pytest.approx(10)
    assert client.closing is not None
    assert client.closing[0] is CloseCode.AUTH_TIMEOUT
    assert reply_types(client) == ["auth_error"]
    roles.let.set()
    await wait_all_tasks_blocked()
    assert reply_types(client) == []
    assert client.session.identity is None


LATE_ANSWERS = [CI, None, Unavailable("away")]


@pytest.mark.parametrize("answer", LATE_ANSWERS, ids=["a role", "no role", "an outage"])
@pytest.mark.parametrize("end", [SessionDriver.end, SessionDriver.finish])
async def test_session_that_ended_during_the_lookup_is_not_authenticated(
    role_replica: Replica, roles: Roles, nursery: trio.Nursery, end: Callable[[SessionDriver], None], answer: Any
) -> None:
    client = open_client(role_replica)
    nursery.start_soon(client.receive, objects(AUTH, SUBSCRIBE, PING))
    await wait_all_tasks_blocked()
    end(client)
    closing = client.closing
    roles.answer = answer
    roles.let.set()
    await wait_all_tasks_blocked()
    assert reply_types(client) == []
    assert client.closing == closing
    assert client.session.identity is None
    assert role_replica.delivery.statistics().live == 0


async def test_session_that_ends_while_a_newer_token_is_looked_up_does_not_subscribe(
    role_replica: Replica, roles: Roles, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(role_replica)
    await client.receive(auth(None, monkeypatch) + objects(SUBSCRIBE))
    assert role_replica.delivery.statistics().live == 1
    nursery.start_soon(client.receive, objects(AUTH, SUBSCRIBE))
    await wait_all_tasks_blocked()
    client.end()
    roles.let.set()
    await wait_all_tasks_blocked()
    assert role_replica.delivery.statistics().live == 0


async def test_session_authenticated_while_the_replica_drains_gets_goaway(
    role_replica: Replica, roles: Roles, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    client = open_client(role_replica)
    nursery.start_soon(client.receive, objects(AUTH))
    await trio.sleep(0)
    nursery.start_soon(role_replica.drain)
    await trio.sleep(1)
    assert reply_types(client) == []
    roles.let.set()
    await trio.sleep(1)
    assert reply_types(client) == ["auth_ok", "head", "goaway"]


async def test_auth_ok_names_the_head_after_the_lookup(
    role_replica: Replica, roles: Roles, nursery: trio.Nursery
) -> None:
    client = open_client(role_replica)
    nursery.start_soon(client.receive, objects(AUTH))
    await wait_all_tasks_blocked()
    await role_replica.publish(CI, [Publish("a.b", check_payload(b"1"))])
    roles.let.set()
    await wait_all_tasks_blocked()
    [line] = client.send_queue.take()
    assert isinstance(line, bytes)
    assert json.loads(line)["head"] == 1


async def test_messages_are_delivered_while_a_newer_token_is_looked_up(
    role_replica: Replica, roles: Roles, nursery: trio.Nursery
) -> None:
    client = open_client(role_replica)
    roles.let.set()
    await client.receive(objects(AUTH, SUBSCRIBE))
    roles.let = trio.Event()
    nursery.start_soon(client.receive, objects(AUTH))
    await wait_all_tasks_blocked()
    client.send_queue.take()
    await role_replica.publish(CI, [Publish("a.b", check_payload(b"1"))])
    await wait_all_tasks_blocked()
    assert len(client.send_queue.take()) == 1


@pytest.mark.parametrize(
    ("answer", "code", "closing"),
    [
        (None, ErrorCode.UNAUTHENTICATED, CloseCode.UNAUTHENTICATED),
        (Unavailable("away"), ErrorCode.UNAVAILABLE, CloseCode.UNAVAILABLE),
    ],
)
async def test_unknown_role_and_a_failed_lookup_have_different_errors(
    role_replica: Replica, roles: Roles, answer: Any, code: ErrorCode, closing: CloseCode
) -> None:
    roles.answer = answer
    roles.let.set()
    with pytest.raises(PeerError) as caught:
        await role_replica.authenticate(ROLE)
    assert (caught.value.code, caught.value.close) == (code, closing)
    assert ROLE not in str(caught.value)


async def test_only_role_tokens_are_looked_up(role_replica: Replica, roles: Roles) -> None:
    roles.let.set()
    await role_replica.authenticate(sign(SECRET, client_id="alice", grants=Grants.ALL))
    for token in ("role-", "role-x", f"{ROLE}=", ROLE[:-1], "sub-x.y", ""):
        with pytest.raises(PeerError) as caught:
            await role_replica.authenticate(token)
        assert (caught.value.code, caught.value.close) == (ErrorCode.UNAUTHENTICATED, CloseCode.UNAUTHENTICATED)
    assert roles.asked == []


async def test_role_tokens_are_rejected_without_a_database(replica: Replica) -> None:
    with pytest.raises(PeerError, match="need a database, and this broker has none") as caught:
        await replica.authenticate(ROLE)
    assert caught.value.close is CloseCode.UNAUTHENTICATED


# Producers


def sign_in(name: str, producer: str | None = None) -> bytes:
    token = sign(SECRET, client_id=name, grants=Grants.ALL)
    return json.dumps({"type": "auth", "token": token, "protocol": 1, "producer": producer}).encode()


async def ask(replica: Replica, client: SessionDriver, *requests: bytes) -> list[Any]:
    await client.receive(b"\n".join(requests))
    await wait_all_tasks_blocked()
    return [json.loads(line) for line in client.send_queue.take() if isinstance(line, bytes)]


async def test_client_that_claims_the_producer_of_another_gets_its_own(replica: Replica) -> None:
    """With the producer id of another client, a client could turn the next publish of that one into a duplicate."""
    publish = b'{"type": "publish", "channel": "a", "payload": 1, "id": 1}'
    alice, mallory, again = open_client(replica), open_client(replica), open_client(replica)
    [mine] = await ask(replica, alice, sign_in("alice"))
    welcome, published = await ask(replica, mallory, sign_in("mallory", mine["producer"]), publish)
    assert welcome["producer"] != mine["producer"]
    assert published == {"type": "published", "channel": "a", "id": 1, "seq": 1}
    [published] = await ask(replica, alice, publish)
    assert published == {"type": "published", "channel": "a", "id": 1, "seq": 2}
    welcome, published = await ask(replica, again, sign_in("alice", mine["producer"]), publish)
    assert welcome["producer"] == mine["producer"]
    assert published == {"type": "published", "channel": "a", "id": 1, "seq": 2, "duplicate": True}


@pytest.mark.parametrize(("clients", "seconds"), [(0, 0), (1, 2.01), (50, 2.5), (300, 5), (1000, 5)])
async def test_drain_of_few_clients_takes_less_time(autojump_clock: MockClock, clients: int, seconds: float) -> None:
    replica = Replica(Config(), MemoryLog(), Authenticator([SECRET]))
    for _ in range(clients):
        open_client(replica)
    began = trio.current_time()
    await replica.drain()
    assert replica.readiness == "draining"
    assert trio.current_time() - began == pytest.approx(seconds)


async def test_draining_replica_waits_only_until_its_last_client_has_left(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    replica = Replica(Config(drain=DrainSettings(delay=3, window=60)), MemoryLog(), Authenticator([SECRET]))
    clients = [open_client(replica) for _ in range(300)]

    async def end_sessions() -> None:
        await trio.sleep(4)
        for client in clients:
            client.end()

    began = trio.current_time()
    nursery.start_soon(end_sessions)
    await replica.drain()
    assert trio.current_time() - began == pytest.approx(4)


def token(client_id: str | None) -> str:
    return sign(SECRET, client_id=client_id, grants=Grants.ALL)


def auth_as(client_id: str | None) -> bytes:
    return json.dumps({"type": "auth", "token": token(client_id), "protocol": 1}).encode()


@pytest.fixture
async def strict_replica(nursery: trio.Nursery) -> Replica:
    limits = LimitSettings(publish_rate=10, publish_bytes=1000, sessions=2, client_id=8)
    replica = Replica(Config(limits=limits), MemoryLog(), Authenticator([SECRET]))
    await nursery.start(replica.log.run, replica.delivery)
    return replica


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        (b'{"type":"publish","channel":"a","payload":1}', 2),
        (b'{"type":"publish","channel":"a","payload":1,"ephemeral":true}', 2),
        (b'{"type":"publish","channel":"a","payload":"%b"}' % (b"x" * 196), 5),
    ],
    ids=["messages", "ephemeral messages", "bytes"],
)
async def test_session_is_read_no_faster_than_its_client_may_publish(
    strict_replica: Replica, message: bytes, seconds: float, autojump_clock: MockClock
) -> None:
    client, sibling, other = (open_client(strict_replica) for _ in range(3))
    await client.receive(auth_as("a"))
    await sibling.receive(auth_as("a"))
    await other.receive(auth_as("b"))
    await client.receive(message * 30)
    assert trio.current_time() == pytest.approx(seconds)
    assert strict_replica.runtime_statistics.read_pauses["rate"] > 0
    await other.receive(message)
    assert trio.current_time() == pytest.approx(seconds)
    await sibling.receive(message)
    assert trio.current_time() > seconds + 0.05
    for each in (client, sibling, other):
        each.end()


async def test_error_of_a_request_over_the_publish_rate_has_a_retry_delay(
    strict_replica: Replica, autojump_clock: MockClock
) -> None:
    identity = strict_replica.authenticator.verify(token("a"), 0)
    requests = [Publish("a", Raw(b"1")) for _ in range(30)]
    await strict_replica.publish(identity, requests)
    with pytest.raises(PeerError) as caught:
        await strict_replica.publish(identity, requests[:1])
    assert caught.value.code is ErrorCode.RATE_LIMITED
    assert caught.value.retry_after == pytest.approx(2)
    await strict_replica.publish(strict_replica.authenticator.verify(token("b"), 0), requests[:1])
    await trio.sleep(caught.value.retry_after)
    await strict_replica.publish(identity, requests[:1])
    await strict_replica.publish(OWNER, requests * 10)


async def test_token_may_set_another_publish_rate(strict_replica: Replica, autojump_clock: MockClock) -> None:
    fast = sign(SECRET, client_id="a", grants=Grants.ALL, publish_rate=100, publish_bytes=1 << 20)
    fast_client, default_client = open_client(strict_replica), open_client(strict_replica)
    await fast_client.receive(json.dumps({"type": "auth", "token": fast, "protocol": 1}).encode())
    await default_client.receive(auth_as("a"))
    message = b'{"type":"publish","channel":"a","payload":1}'
    await fast_client.receive(message * 200)
    assert trio.current_time() == pytest.approx(1)
    await default_client.receive(message * 20)
    assert trio.current_time() == pytest.approx(2), "tokens without a publish rate keep the configured one"
    identity = strict_replica.authenticator.verify(fast, 0)
    await trio.sleep(5)
    requests = [Publish("a", Raw(b"1")) for _ in range(100)]
    await strict_replica.publish(identity, requests)
    await strict_replica.publish(identity, requests)
    with pytest.raises(PeerError) as caught:
        await strict_replica.publish(identity, requests)
    assert (caught.value.code, caught.value.retry_after) == (ErrorCode.RATE_LIMITED, pytest.approx(1))
    await fast_client.receive(auth_as("a"))
    began = trio.current_time()
    await fast_client.receive(message * 20)
    assert trio.current_time() == pytest.approx(began + 1), "the rate of the newest token applies"
    for client in (fast_client, default_client):
        client.end()


async def test_sessions_of_a_client_are_limited(strict_replica: Replica) -> None:
    clients = [open_client(strict_replica) for _ in range(4)]
    for client in clients[:3]:
        await client.receive(auth_as("a"))
        await client.receive(auth_as("a"))
    assert [client.closing and client.closing[0] for client in clients[:3]] == [None, None, CloseCode.OVERLOADED]
    await clients[3].receive(auth_as(None))
    assert clients[3].closing is None
    clients[0].end()
    clients[2].end()
    assert (usage := strict_replica.client_usages.of("a")) is not None
    assert usage.sessions == 1
    again = open_client(strict_replica)
    await again.receive(auth_as("a"))
    assert again.closing is None
    for client in (*clients, again):
        client.end()
    assert len(strict_replica.client_usages) == 0


async def test_sessions_with_one_token_without_a_client_id_are_one_client_per_network(
    strict_replica: Replica, autojump_clock: MockClock
) -> None:
    here, beside, elsewhere, late = (open_client(strict_replica, network) for network in ("a", "a", "b", "a"))
    for client in (here, beside, elsewhere, late):
        await client.receive(auth_as(None))
    assert late.closing is not None
    assert late.closing[0] is CloseCode.OVERLOADED
    assert here.session.usage.client == beside.session.usage.client != elsewhere.session.usage.client
    message = b'{"type":"publish","channel":"a","payload":1}'
    await here.receive(message * 20)
    began = trio.current_time()
    await elsewhere.receive(message * 2)
    assert trio.current_time() == began
    await beside.receive(message * 2)
    assert trio.current_time() > began
    identity = strict_replica.authenticator.verify(token(None), 0)
    requests = [Publish("a", Raw(b"1")) for _ in range(20)]
    await trio.sleep(1)  # Until the token bucket has no debt, on the virtual clock.
    await strict_replica.publish(identity, requests, client=client_of(identity, token(None), "a"))
    with pytest.raises(PeerError, match="publishes too much"):
        await strict_replica.publish(identity, requests, client=client_of(identity, token(None), "a"))
    began = trio.current_time()
    await here.receive(message)
    assert trio.current_time() > began
    for client in (here, beside, elsewhere, late):
        client.end()
    assert len(strict_replica.client_usages) == 0


async def test_tokens_without_a_client_id_have_a_cpu_share_per_network(replica: Replica) -> None:
    shares = []
    with replica.cpu_scheduler.serve("a proxy") as peer:
        for client_id, network in ((None, "a"), (None, "b"), (None, "a"), ("alice", "a"), ("alice", "b")):
            client = open_client(replica, network)
            await client.receive(auth_as(client_id))
            shares.append(peer.share)
            client.end()
    assert [shares.index(share) for share in shares] == [0, 1, 0, 3, 3]


class HoldingLog(MemoryLog):
    """A log that holds appends until the test settles them."""

    allowance = 1000

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Append] = []

    def submit(self, append: Append) -> None:
        self.held.append(append)


@pytest.mark.parametrize("settled_first", [True, False])
async def test_ended_session_is_freed_without_the_garbage_collector(nursery: trio.Nursery, settled_first: bool) -> None:
    log = HoldingLog()
    replica = Replica(Config(), log, Authenticator([SECRET]))
    await nursery.start(log.run, replica.delivery)
    client = open_client(replica)
    await client.receive(auth_as("a") + objects(SUBSCRIBE, {"type": "publish", "channel": "a", "payload": 1}))
    await client.receive(objects({"type": "publish", "channel": "a", "payload": 2}))
    kept = weakref.ref(client)
    gc.disable()
    try:
        for step in range(3):
            if step == (2 if settled_first else 0):
                client.end()
                del client
            else:
                append = log.held.pop()
                append.settle(append, Committed(step))
                del append
        assert kept() is None
    finally:
        gc.enable()


async def test_sessions_of_one_client_share_one_allowance_of_pending_publishes(nursery: trio.Nursery) -> None:
    log = HoldingLog()
    replica = Replica(Config(), log, Authenticator([SECRET]))
    await nursery.start(replica.log.run, replica.delivery)
    clients = {name: open_client(replica, network) for name, network in (("one", "a"), ("two", "a"), ("other", "b"))}
    for client in clients.values():
        await client.receive(auth_as(None))
    full = ceil(1000 / (len("a") + len("1") + APPEND_OVERHEAD))
    for name, taken in (("one", full), ("two", 1), ("other", full)):
        log.held.clear()
        nursery.start_soon(clients[name].receive, b'{"type":"publish","channel":"a","payload":1}' * 20)
        await wait_all_tasks_blocked()
        assert len(log.held) == taken, name
    nursery.cancel_scope.cancel()


async def test_one_client_leaves_room_for_the_subscriptions_of_others(nursery: trio.Nursery) -> None:
    replica = Replica(Config(limits=LimitSettings(subscriptions_total=10)), MemoryLog(), Authenticator([SECRET]))
    await nursery.start(replica.log.run, replica.delivery)
    greedy, sibling, other = open_client(replica), open_client(replica), open_client(replica)

    async def subscribe(client: SessionDriver, name: str, count: int) -> list[str]:
        for number in range(count):
            await client.receive(json.dumps({"type": "subscribe", "pattern": f"{name}.{number}"}).encode())
        return [kind for kind in reply_types(client) if kind in ("subscribed", "subscribe_error")]

    for client, client_id in ((greedy, "a"), (sibling, "a"), (other, "b")):
        await client.receive(auth_as(client_id))
    assert await subscribe(greedy, "a", 4) == ["subscribed"] * 4
    assert await subscribe(sibling, "b", 2) == ["subscribed", "subscribe_error"]
    assert await subscribe(greedy, "a", 4) == ["subscribed"] * 4, "it has these subscriptions already"
    assert await subscribe(other, "c", 3) == ["subscribed", "subscribed", "subscribed"]
    assert replica.runtime_statistics.errors_sent[ErrorCode.OVERLOADED] == 1
    await other.receive(b'{"type":"unsubscribe","pattern":"c.0"}')
    assert replica.client_usages.subscriptions == 7
    for client in (greedy, sibling, other):
        client.end()
    assert replica.client_usages.subscriptions == 0


async def test_pending_publishes_of_a_session_are_limited(nursery: trio.Nursery) -> None:
    log = HoldingLog()
    replica = Replica(Config(limits=LimitSettings(pending_publishes=3)), log, Authenticator([SECRET]))
    await nursery.start(replica.log.run, replica.delivery)
    client = open_client(replica)
    await client.receive(auth_as(None))
    nursery.start_soon(client.receive, b'{"type":"publish","channel":"a","payload":1}' * 20)
    await wait_all_tasks_blocked()
    assert len(log.held) == 3
    assert replica.runtime_statistics.read_pauses == {"publishes": 1, "replies": 0, "rate": 0}
    nursery.cancel_scope.cancel()


async def test_session_without_a_client_id_keeps_its_usage_with_another_token(strict_replica: Replica) -> None:
    client = open_client(strict_replica, "a")
    await client.receive(auth_as(None))
    before = client.session.usage.client
    other = sign(SECRET, client_id=None, grants=Grants(("b",), ("b",)))
    await client.receive(json.dumps({"type": "auth", "token": other, "protocol": 1}).encode())
    assert client.session.identity is not None
    assert client.session.identity.grants.write == ("b",)
    assert client.session.usage.client == before
    client.end()


async def test_client_id_that_is_too_long_is_rejected(strict_replica: Replica) -> None:
    await strict_replica.authenticate(token("12345678"))
    await strict_replica.authenticate(token("äöüß"))
    for client_id in ("123456789", "äöüßx"):
        with pytest.raises(PeerError) as caught:
            await strict_replica.authenticate(token(client_id))
        assert caught.value.code is ErrorCode.UNAUTHENTICATED


# Memory for clients that do not read


async def test_pinned_messages_of_clients_that_do_not_read_are_bounded(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(
        Config(limits=LimitSettings(send_queue=10_000, send_queue_total=100_000)), MemoryLog(), Authenticator([SECRET])
    )
    await nursery.start(replica.log.run, replica.delivery)
    clients = [open_client(replica) for _ in range(10)]
    unsubscribed = []

    async def unsubscribe(client: SessionDriver) -> None:
        await client.receive(b'{"type":"unsubscribe","pattern":"n%d"}' % clients.index(client))
        unsubscribed.append(client)

    for number, client in enumerate(clients):
        for request in (auth(None, monkeypatch), b'{"type":"subscribe","pattern":"n%d"}' % number):
            await client.receive(request)
            client.send_queue.take()
        await client.receive(b'{"type":"publish","channel":"n%d","payload":"%s"}' % (number, b"x" * 4000))
        await wait_all_tasks_blocked()
        nursery.start_soon(unsubscribe, client)
    await wait_all_tasks_blocked()
    budget = replica.delivery.budget
    assert 0 < len(unsubscribed) < 10
    assert budget.for_pinned < budget.pinned <= budget.for_pinned + 10_000
    for client in clients:
        assert reply_types(client)
    await wait_all_tasks_blocked()
    assert len(unsubscribed) == 10
    assert budget.pinned == 0
    for client in clients:
        client.end()


@pytest.mark.parametrize("protocol", [0, 1])
async def test_revoking_many_subscriptions_searches_a_send_queue_once(
    protocol: int, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(Config(), MemoryLog(), Authenticator([SECRET]))
    await nursery.start(replica.log.run, replica.delivery)
    client = open_client(replica)
    await client.receive(auth(None, monkeypatch).replace(b'"protocol": 1', b'"protocol": %d' % protocol))
    for number in range(100):
        await client.receive(b'{"type":"subscribe","pattern":"n%d"}' % number)
        client.send_queue.take()
    await client.receive(b"".join([b'{"type":"publish","channel":"n%d","payload":1}' % n for n in (0, 99)]))
    await wait_all_tasks_blocked()
    searches = []
    drop = SendQueue._drop
    monkeypatch.setattr(SendQueue, "_drop", lambda *args: searches.append(args) or drop(*args))
    narrow = sign(SECRET, client_id="alice", grants=Grants(("n0",), ("*",)))
    await client.receive(b'{"type":"auth","protocol":1,"token":"%s"}' % narrow.encode())
    assert len(searches) == 1
    kept = [item for item in client.send_queue.take() if isinstance(item, EncodedMessages)]
    assert [entry.channel for run in kept for entry in run.entries] == ["n0"]
    client.end()
