"""Sessions whose roles change: a log in memory, and roles that the test changes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.auth import live_permissions
from catbus.auth.grants import Grants, Identity
from catbus.auth.live_permissions import MAX_STALENESS
from catbus.auth.role_tokens import make_role_token, role_handle, role_key
from catbus.auth.tokens import Authenticator, sign
from catbus.close_codes import CloseCode
from catbus.config import Config
from catbus.errors import Unavailable
from catbus.limits.cpu_scheduler import TimeSlices
from catbus.log import Entry, MemoryLog
from catbus.protocol.wire_messages import Publish, check_payload, decode_server
from catbus.replica import Replica
from catbus.session.driver import SessionDriver
from tests.test_replica import AUTH, CI, ROLE, SECRET, Roles, objects, open_client, reply_types

READER = Identity("ci", Grants(("a.b",), ()), None, role=role_key(ROLE))


class Slow(Roles):
    """Answers each lookup with the state at its start."""

    async def find(self, keys: Collection[bytes]) -> Mapping[bytes, Identity]:
        answer = self.answer
        await self.let.wait()
        assert isinstance(answer, Identity)
        return dict.fromkeys(keys, answer)


@pytest.fixture
async def roles() -> Roles:
    roles = Roles()
    roles.let.set()
    return roles


@pytest.fixture
async def replica(nursery: trio.Nursery, roles: Roles) -> Replica:
    return await open_replica(nursery, roles)


async def open_replica(nursery: trio.Nursery, roles: Roles) -> Replica:
    replica = Replica(Config(), MemoryLog(), Authenticator([SECRET]), roles=roles)
    await nursery.start(replica.log.run, replica.delivery)
    nursery.start_soon(replica.delivery.run)
    nursery.start_soon(replica.permissions.run)
    return replica


def subscribe(*patterns: str) -> list[dict[str, Any]]:
    return [{"type": "subscribe", "pattern": pattern} for pattern in patterns]


def publish(channel: str, **fields: Any) -> dict[str, Any]:
    return {"type": "publish", "channel": channel, "payload": 1, **fields}


async def enter(replica: Replica, *messages: dict[str, Any], auth: dict[str, Any] = AUTH) -> SessionDriver:
    """Open a session with the role, which has sent these messages."""
    client = open_client(replica)
    await client.receive(objects(auth, *messages))
    await wait_all_tasks_blocked()
    client.send_queue.take()
    return client


async def tell(replica: Replica, *channels: str) -> None:
    """Publish as another client."""
    await replica.publish(CI, [Publish(channel, check_payload(b"1")) for channel in channels])
    await wait_all_tasks_blocked()


def words(client: SessionDriver) -> list[tuple[str, str | None]]:
    """The type and pattern of all messages to the client."""
    items = client.send_queue.take()
    lines = b"".join([item if isinstance(item, bytes) else item.lines for item in items]).splitlines()
    return [(o["type"], o.get("pattern")) for o in map(msgspec.json.decode, lines)]


async def test_narrowed_role_ends_only_the_subscriptions_it_no_longer_covers(replica: Replica, roles: Roles) -> None:
    client = await enter(replica, *subscribe("a.*", "a.b"))
    await tell(replica, "a.b")
    roles.change(READER)
    await wait_all_tasks_blocked()
    # Unsent messages of the revoked pattern are dropped, and `revoked` is its last line.
    assert words(client) == [("message", "a.b"), ("revoked", "a.*")]
    await tell(replica, "a.b", "a.c")
    assert words(client) == [("message", "a.b")]
    await client.receive(objects(*subscribe("a.*", "a.b"), publish("a.b", id=1)))
    assert words(client) == [("subscribe_error", "a.*"), ("subscribed", "a.b"), ("publish_error", None)]
    assert client.closing is None


async def test_one_line_in_the_log_says_how_a_role_has_changed_for_its_sessions(
    replica: Replica, roles: Roles, caplog: pytest.LogCaptureFixture
) -> None:
    """A lookup that finds nothing new is not logged, and the line has no token."""
    caplog.set_level(logging.INFO, "catbus.audit")
    for _ in range(3):
        await enter(replica)
    for answer in (CI, READER, READER, None):
        roles.change(answer)
        await wait_all_tasks_blocked()
    handle = role_handle(role_key(ROLE) or b"")
    assert [
        (line.role, line.client_id, line.permissions, line.sessions)  # type: ignore[attr-defined]
        for line in caplog.records
        if line.name == "catbus.audit"
    ] == [(handle, "ci", str(READER.grants), 3), (handle, None, "the role was deleted", 3)]
    assert ROLE not in caplog.text


async def test_widened_role_applies_at_once(replica: Replica, roles: Roles) -> None:
    client = await enter(replica, *subscribe("b"))
    roles.change(Identity("ci", Grants.ALL, None, role=role_key(ROLE)))
    await wait_all_tasks_blocked()
    assert words(client) == []
    await client.receive(objects(*subscribe("b")))
    assert words(client) == [("subscribed", "b")]


@pytest.mark.parametrize("answer", [None, Identity("other", CI.grants, None, role=role_key(ROLE))])
async def test_deleted_role_ends_its_sessions(replica: Replica, roles: Roles, answer: Identity | None) -> None:
    client = await enter(replica, *subscribe("a.*", "a.b"))
    roles.change(answer)
    with trio.fail_after(1):
        await client.wait_closing()
    assert client.closing is not None
    assert client.closing[0] is CloseCode.REVOKED == 4403
    told = words(client)
    assert sorted(told[:2]) == [("revoked", "a.*"), ("revoked", "a.b")]  # type: ignore[type-var]
    assert told[2:] == [("error", None)]
    assert replica.delivery.statistics().live == 0


async def test_narrowed_role_withdraws_its_pending_publishes_only(replica: Replica, roles: Roles) -> None:
    replica.cpu_scheduler.slices = TimeSlices(3600.0, 3600.0)
    mine, other = await enter(replica), await enter(replica, auth={"type": "auth", "token": full(), "protocol": 1})
    for client in (mine, other):
        await client.receive(objects(publish("a.x", id=1), publish("a.b", id=2)))
    mine.update_role(Identity("ci", Grants((), ("a.b",)), None))
    await wait_all_tasks_blocked()
    told = [decode_server(item) for item in mine.send_queue.take() if isinstance(item, bytes)]
    assert [(reply.id, getattr(reply, "code", None)) for reply in told] == [  # type: ignore[union-attr]
        (1, "unauthorized"),
        (2, None),
    ]
    assert reply_types(other) == ["published", "published"]
    assert replica.log.applied == 3


async def test_narrower_token_withdraws_its_pending_publishes_only(nursery: trio.Nursery) -> None:
    replica = Replica(Config(), MemoryLog(), Authenticator([SECRET]))
    # The log is open, but appends nothing yet.
    replica.log._epoch = "e"  # type: ignore[attr-defined]
    client = open_client(replica)
    less = sign(SECRET, client_id="alice", grants=Grants((), ("a.b",)))
    await client.receive(
        objects({"type": "auth", "token": full(), "protocol": 1}, publish("a.x", id=1), publish("a.b", id=2))
        + objects({"type": "auth", "token": less, "protocol": 1})
    )
    assert reply_types(client) == ["auth_ok", "auth_ok", "publish_error"]
    await nursery.start(replica.log.run, replica.delivery)
    await wait_all_tasks_blocked()
    assert reply_types(client) == ["published"]


def full() -> str:
    return sign(SECRET, client_id="alice", grants=Grants.ALL)


async def test_change_during_a_role_lookup_is_not_missed(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    roles = Slow()
    replica = await open_replica(nursery, roles)
    client = open_client(replica)
    nursery.start_soon(client.receive, objects(AUTH, *subscribe("a.*")))
    await wait_all_tasks_blocked()
    roles.change(READER)
    await wait_all_tasks_blocked()
    roles.let.set()
    await wait_all_tasks_blocked()
    assert words(client) == [("auth_ok", None), ("subscribed", "a.*"), ("revoked", "a.*")]


async def test_only_roles_with_sessions_are_looked_up(replica: Replica, roles: Roles) -> None:
    client = await enter(replica)
    key, other = role_key(ROLE), role_key(make_role_token())
    assert key is not None and other is not None
    before = list(roles.asked)
    roles.change(None, [other])
    await wait_all_tasks_blocked()
    assert roles.asked == before
    roles.change(READER, [other, key])
    await wait_all_tasks_blocked()
    assert roles.asked == [*before, key]
    assert client.session.identity == READER


async def test_closed_and_reauthenticated_sessions_do_not_depend_on_the_role(replica: Replica, roles: Roles) -> None:
    gone = await enter(replica)
    gone.end()
    token = sign(SECRET, client_id="ci", grants=Grants.ALL)
    client = await enter(replica, {"type": "auth", "token": token}, *subscribe("*"))
    before = list(roles.asked)
    roles.change(None)
    await wait_all_tasks_blocked()
    assert roles.asked == before
    assert client.closing is None


async def test_role_change_is_applied_when_the_database_is_reachable_again(
    replica: Replica, roles: Roles, autojump_clock: MockClock
) -> None:
    client = await enter(replica, *subscribe("a.*"))
    roles.change(Unavailable("away"))
    await trio.sleep(10)
    assert words(client) == []
    roles.answer = READER
    await trio.sleep(1)
    assert words(client) == [("revoked", "a.*")]


async def test_failed_role_lookup_makes_permissions_unknown_after_a_minute(
    replica: Replica, roles: Roles, autojump_clock: MockClock
) -> None:
    client = await enter(replica)
    roles.change(Unavailable("away"))
    for _ in range(int(MAX_STALENESS) + 1):
        await trio.sleep(1)
        roles.checked = trio.current_time()
    await client.receive(objects(*subscribe("a.*")))
    assert words(client) == [("subscribe_error", "a.*")]
    roles.answer = CI
    await trio.sleep(1)
    await client.receive(objects(*subscribe("a.*")))
    assert words(client) == [("subscribed", "a.*")]


async def test_changed_roles_are_looked_up_before_unchecked_ones(
    replica: Replica, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_permissions, "LOOKUP_BATCH", 3)
    tokens = [make_role_token() for _ in range(8)]
    keys = [role_key(token) for token in tokens]
    for token in tokens:
        await enter(replica, auth={"type": "auth", "token": token, "protocol": 1})
    roles.asked.clear()
    roles.let = trio.Event()
    roles.change(CI)
    await wait_all_tasks_blocked()
    later = next(key for key in keys if key not in roles.asked)
    assert later is not None
    roles.change(CI, [later])
    await wait_all_tasks_blocked()
    assert len(roles.asked) == 3
    roles.let.set()
    await wait_all_tasks_blocked()
    assert roles.asked[3] == later
    assert set(roles.asked) == set(keys), "each of them"


async def test_session_added_after_a_role_lookup_is_not_updated_by_it(replica: Replica, roles: Roles) -> None:
    await enter(replica)
    roles.let = trio.Event()
    roles.change(READER)
    await wait_all_tasks_blocked()
    late = open_client(replica)
    replica.permissions.add(late, role_key(ROLE), roles.changes)
    late.update_role = lambda _: pytest.fail("told what it knows better")  # type: ignore[method-assign]
    roles.let.set()
    await wait_all_tasks_blocked()
    assert replica.permissions.updates == 1


async def test_roles_get_nothing_new_after_a_minute_without_the_database(
    replica: Replica, roles: Roles, autojump_clock: MockClock
) -> None:
    client = await enter(replica, *subscribe("a.*"))
    other = await enter(replica, auth={"type": "auth", "token": full(), "protocol": 1})
    await trio.sleep(MAX_STALENESS - 1)
    await client.receive(objects(*subscribe("a.*"), publish("a.b", ack=False)))
    await wait_all_tasks_blocked()
    assert words(client) == [("subscribed", "a.*"), ("message", "a.*")]
    await trio.sleep(2)
    retry = publish("a.b", id=7, retry=True, after=0, epoch=replica.log.epoch)
    history = {"type": "history", "pattern": "a.b", "limit": 1}
    leave = {"type": "unsubscribe", "pattern": "a.*"}
    await client.receive(objects(*subscribe("a.*"), publish("a.b", id=6), retry, history))
    replies = [decode_server(item) for item in client.send_queue.take() if isinstance(item, bytes)]
    assert [reply.code for reply in replies] == [  # type: ignore[union-attr]
        "unavailable",
        "unavailable",
        "unknown",
        "unavailable",
    ]
    # Present permissions stay, and sessions whose tokens contain their grants are not affected.
    await tell(replica, "a.b")
    assert words(client) == [("message", "a.*")]
    await other.receive(objects(*subscribe("a.*"), publish("a.b")))
    await wait_all_tasks_blocked()
    assert reply_types(other) == ["subscribed", "published"]
    client.send_queue.take()
    await client.receive(objects(leave))
    roles.checked = trio.current_time()
    await client.receive(objects(*subscribe("a.*")))
    assert words(client) == [("unsubscribed", "a.*"), ("subscribed", "a.*")]


async def test_first_version_client_keeps_messages_of_its_remaining_pattern(replica: Replica, roles: Roles) -> None:
    first = {"type": "auth", "token": ROLE}
    client = await enter(replica, *subscribe("a.*", "a.b"), auth=first)
    await tell(replica, "a.b", "a.c")
    roles.change(READER)
    await wait_all_tasks_blocked()
    items = client.send_queue.take()
    assert [[e.channel for e in item.entries] for item in items if not isinstance(item, bytes)] == [["a.b"]]
    assert [msgspec.json.decode(item)["type"] for item in items if isinstance(item, bytes)] == ["subscribe_error"]
    assert replica.delivery.budget.held == 0


async def test_many_sessions_are_updated_in_steps(
    replica: Replica, roles: Roles, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_permissions, "MAX_UPDATE_TIME", -1.0)
    clients = [await enter(replica, *subscribe("a.*")) for _ in range(100)]
    left: list[SessionDriver] = []

    async def leave_meanwhile() -> None:
        while replica.permissions.updates < 50:
            await trio.lowlevel.checkpoint()
        left.append(next(client for client in clients if client.closing is None))
        left[0].end()

    nursery.start_soon(leave_meanwhile)
    roles.change(None)
    await wait_all_tasks_blocked()
    assert [client for client in clients if client.closing is None] == left
    assert replica.permissions.updates == 99


@pytest.mark.parametrize("answer", [READER, None])
async def test_history_read_before_a_role_change_is_not_sent_after_it(
    replica: Replica, roles: Roles, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, answer: Identity | None
) -> None:
    client = await enter(replica)
    await tell(replica, "a.b", "a.c")
    let, read = trio.Event(), replica.log.history

    async def slow(pattern: str, *, before: int | None, limit: int) -> tuple[Sequence[Entry], bool]:
        page = await read(pattern, before=before, limit=limit)
        await let.wait()
        return page

    monkeypatch.setattr(replica.log, "history", slow)
    history = [{"type": "history", "pattern": pattern, "limit": 5} for pattern in ("a.*", "a.b")]
    nursery.start_soon(client.receive, objects(*history))
    await wait_all_tasks_blocked()
    roles.change(answer)
    await wait_all_tasks_blocked()
    let.set()
    await wait_all_tasks_blocked()
    assert reply_types(client) == (["error"] if answer is None else ["error", "history"])
