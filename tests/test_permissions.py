"""What happens to sessions whose role changes: a log in memory, and roles that change at will."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.auth import live_permissions
from catbus.auth.grants import Grants, Identity
from catbus.auth.live_permissions import MAX_STALENESS
from catbus.auth.role_tokens import make_role_token, role_key
from catbus.auth.tokens import Authenticator, sign
from catbus.config import Config
from catbus.errors import CloseCode, Unavailable
from catbus.limits.cpu_scheduler import TimeSlices
from catbus.log import Entry, MemoryLog
from catbus.protocol.wire_messages import Publish, check_payload, decode_server
from catbus.replica import Replica
from catbus.session.driver import SessionDriver
from tests.test_replica import AUTH, CI, ROLE, SECRET, Roles, objects, open_client, said

READER = Identity("ci", Grants(("a.b",), ()), None, role=role_key(ROLE))


class Slow(Roles):
    """Answers what was so when it was asked."""

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
    """Somebody with the role, who has said this."""
    client = open_client(replica)
    await client.receive(objects(auth, *messages))
    await wait_all_tasks_blocked()
    client.send_queue.take()
    return client


async def tell(replica: Replica, *channels: str) -> None:
    """Have somebody else publish."""
    await replica.publish(CI, [Publish(channel, check_payload(b"1")) for channel in channels])
    await wait_all_tasks_blocked()


def words(client: SessionDriver) -> list[tuple[str, str | None]]:
    """Type and pattern of all that the client is told."""
    items = client.send_queue.take()
    lines = b"".join([item if isinstance(item, bytes) else item.lines for item in items]).splitlines()
    return [(o["type"], o.get("pattern")) for o in map(msgspec.json.decode, lines)]


async def test_what_a_narrower_role_may_not_read_ends_and_the_rest_goes_on(replica: Replica, roles: Roles) -> None:
    client = await enter(replica, *subscribe("a.*", "a.b"))
    await tell(replica, "a.b")
    roles.change(READER)
    await wait_all_tasks_blocked()
    # What was not sent yet of the one is not sent any more, and its last line is `revoked`.
    assert words(client) == [("message", "a.b"), ("revoked", "a.*")]
    await tell(replica, "a.b", "a.c")
    assert words(client) == [("message", "a.b")]
    await client.receive(objects(*subscribe("a.*", "a.b"), publish("a.b", id=1)))
    assert words(client) == [("subscribe_error", "a.*"), ("subscribed", "a.b"), ("publish_error", None)]
    assert client.closing is None


async def test_a_role_that_may_more_may_it_at_once(replica: Replica, roles: Roles) -> None:
    client = await enter(replica, *subscribe("b"))
    roles.change(Identity("ci", Grants.ALL, None, role=role_key(ROLE)))
    await wait_all_tasks_blocked()
    assert words(client) == []
    await client.receive(objects(*subscribe("b")))
    assert words(client) == [("subscribed", "b")]


@pytest.mark.parametrize("answer", [None, Identity("other", CI.grants, None, role=role_key(ROLE))])
async def test_a_role_that_is_no_more_ends_the_session(replica: Replica, roles: Roles, answer: Identity | None) -> None:
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


async def test_what_is_still_to_be_published_is_taken_back_and_nothing_else(replica: Replica, roles: Roles) -> None:
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
    assert said(other) == ["published", "published"]
    assert replica.log.applied == 3


async def test_so_it_is_with_a_newer_token_that_may_less(nursery: trio.Nursery) -> None:
    replica = Replica(Config(), MemoryLog(), Authenticator([SECRET]))
    # It has been opened, and appends nothing yet.
    replica.log._epoch = "e"  # type: ignore[attr-defined]
    client = open_client(replica)
    less = sign(SECRET, client_id="alice", grants=Grants((), ("a.b",)))
    await client.receive(
        objects({"type": "auth", "token": full(), "protocol": 1}, publish("a.x", id=1), publish("a.b", id=2))
        + objects({"type": "auth", "token": less, "protocol": 1})
    )
    assert said(client) == ["auth_ok", "auth_ok", "publish_error"]
    await nursery.start(replica.log.run, replica.delivery)
    await wait_all_tasks_blocked()
    assert said(client) == ["published"]


def full() -> str:
    return sign(SECRET, client_id="alice", grants=Grants.ALL)


async def test_a_change_while_the_role_is_looked_up_is_not_missed(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
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


async def test_only_who_has_the_role_is_looked_up(replica: Replica, roles: Roles) -> None:
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


async def test_who_has_left_or_bears_another_token_now_does_not_depend_on_it(replica: Replica, roles: Roles) -> None:
    gone = await enter(replica)
    gone.end()
    token = sign(SECRET, client_id="ci", grants=Grants.ALL)
    client = await enter(replica, {"type": "auth", "token": token}, *subscribe("*"))
    before = list(roles.asked)
    roles.change(None)
    await wait_all_tasks_blocked()
    assert roles.asked == before
    assert client.closing is None


async def test_while_the_database_is_away_nothing_changes_and_then_it_does(
    replica: Replica, roles: Roles, autojump_clock: MockClock
) -> None:
    client = await enter(replica, *subscribe("a.*"))
    roles.change(Unavailable("away"))
    await trio.sleep(10)
    assert words(client) == []
    roles.answer = READER
    await trio.sleep(1)
    assert words(client) == [("revoked", "a.*")]


async def test_a_change_that_cannot_be_looked_up_for_a_minute_is_as_bad_as_no_database(
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


async def test_what_is_known_to_have_changed_goes_before_what_may_have(
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


async def test_an_answer_is_not_for_who_came_after_the_question(replica: Replica, roles: Roles) -> None:
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


async def test_after_a_minute_without_the_database_roles_may_nothing_new(
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
    # What it has it keeps, and whoever shows what it may in the token itself is not concerned.
    await tell(replica, "a.b")
    assert words(client) == [("message", "a.*")]
    await other.receive(objects(*subscribe("a.*"), publish("a.b")))
    await wait_all_tasks_blocked()
    assert said(other) == ["subscribed", "published"]
    client.send_queue.take()
    await client.receive(objects(leave))
    roles.checked = trio.current_time()
    await client.receive(objects(*subscribe("a.*")))
    assert words(client) == [("unsubscribed", "a.*"), ("subscribed", "a.*")]


async def test_a_first_version_client_keeps_what_another_of_its_patterns_matches(
    replica: Replica, roles: Roles
) -> None:
    first = {"type": "auth", "token": ROLE}
    client = await enter(replica, *subscribe("a.*", "a.b"), auth=first)
    await tell(replica, "a.b", "a.c")
    roles.change(READER)
    await wait_all_tasks_blocked()
    items = client.send_queue.take()
    assert [[e.channel for e in item.entries] for item in items if not isinstance(item, bytes)] == [["a.b"]]
    assert [msgspec.json.decode(item)["type"] for item in items if isinstance(item, bytes)] == ["subscribe_error"]
    assert replica.delivery.budget.held == 0


async def test_many_sessions_are_told_bit_by_bit(
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
async def test_what_was_read_for_a_role_that_may_not_have_it_any_more_is_not_sent(
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
    assert said(client) == (["error"] if answer is None else ["error", "history"])
