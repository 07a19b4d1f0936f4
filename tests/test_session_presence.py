"""Presence in sessions: memberships, snapshots and changes of watched patterns, limits and grants; no network."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.auth.grants import Grants
from catbus.auth.tokens import Authenticator, sign
from catbus.config import Config, LimitSettings, PresenceSettings
from catbus.delivery.send_queue import SendQueue
from catbus.log import MemoryLog
from catbus.presence import Member, Watcher
from catbus.presence.local import LocalPresence
from catbus.protocol.wire_messages import ProtocolVersion
from catbus.replica import Replica
from catbus.session import presence_watch
from catbus.session.driver import MEMBERSHIP_COST
from catbus.session.presence_watch import PresenceFeeder, PresenceWatch
from tests.test_specification import objects

SECRET = "a secret of the tests"
EVERYTHING = Grants(read=("*", "_catbus.sessions"), write=("*",))

Message = dict[str, Any]


async def start(nursery: trio.Nursery, config: Config | None = None) -> Replica:
    replica = Replica(config or Config(), MemoryLog(), Authenticator([SECRET]))
    await nursery.start(replica.log.run, replica.delivery)
    for task in (replica.delivery.run, replica.presence.run, replica.presence_feeder.run):
        nursery.start_soon(task)
    return replica


@pytest.fixture
async def replica(nursery: trio.Nursery) -> Replica:
    return await start(nursery)


class Peer:
    """A client without a network. It reads nothing until it is told to."""

    def __init__(self, replica: Replica, client_id: str | None, grants: Grants = EVERYTHING) -> None:
        self.client_id = client_id
        self.driver = replica.open_session(self, transport="test", network="192.0.2.7")
        self.auth = {"type": "auth", "token": self.token(grants), "protocol": 1}

    def token(self, grants: Grants) -> str:
        return sign(SECRET, client_id=self.client_id, grants=grants, issued_at=time.time())

    def flush(self) -> None:
        """Do nothing: `read` takes the lines."""

    async def send(self, *messages: Message) -> list[Message]:
        """Send messages, and return what has come when all tasks wait."""
        async with trio.open_nursery() as nursery:
            # The session waits while the client does not read its replies.
            nursery.start_soon(self.driver.receive, b"".join(json.dumps(message).encode() for message in messages))
            received = await self.read()
        return received + await self.read()

    async def read(self) -> list[Message]:
        received: list[Message] = []
        while True:
            await wait_all_tasks_blocked()
            items = self.driver.send_queue.take()
            if not items:
                return received
            for item in items:
                received += objects(item if isinstance(item, bytes) else item.lines)


async def connect(replica: Replica, client_id: str | None, grants: Grants = EVERYTHING) -> Peer:
    peer = Peer(replica, client_id, grants)
    [reply] = await peer.send(peer.auth)
    assert reply["type"] == "auth_ok", reply
    return peer


def join(channel: str = "room.1", **fields: Any) -> Message:
    return {"type": "join", "channel": channel, **fields}


def leave(channel: str = "room.1", **fields: Any) -> Message:
    return {"type": "leave", "channel": channel, **fields}


def watch(pattern: str = "room.*") -> Message:
    return {"type": "subscribe", "pattern": pattern, "presence": True}


def members(pattern: str = "room.*", **fields: Any) -> Message:
    return {"type": "members", "pattern": pattern, **fields}


def member(channel: str, sessions: int, **fields: Any) -> Message:
    return {"channel": channel, "sessions": sessions, **fields}


def change(action: str, channel: str, sessions: int, pattern: str = "room.*", **fields: Any) -> Message:
    return {"type": "presence", "pattern": pattern, "action": action, **member(channel, sessions, **fields)}


def snapshot(received: list[Message], pattern: str = "room.*") -> list[Message]:
    """Return the members of the only snapshot in what was received, and check its pages."""
    pages = [each for each in received if each["type"] == "members"]
    assert {page["pattern"] for page in pages} == {pattern}
    assert ["complete" in page for page in pages] == [False] * (len(pages) - 1) + [True]
    return [each for page in pages for each in page["members"]]


async def test_members_of_a_channel_are_listed(replica: Replica, autojump_clock: MockClock) -> None:
    alice, nobody = await connect(replica, "alice"), await connect(replica, None)
    assert await alice.send(join(info={"name": "Alice"}, id=7)) == [{"type": "joined", "channel": "room.1", "id": 7}]
    await nobody.send(join())
    [reply] = await alice.send(members(id=8))
    assert reply["id"] == 8
    assert "pattern" not in reply
    assert "next" not in reply
    one, other = reply["members"]
    assert one == member("room.1", 1, client_id="alice", info={"name": "Alice"})
    assert other == member("room.1", 1, session=other["session"])
    assert await alice.send(leave(id=9)) == [{"type": "left", "channel": "room.1", "id": 9}]
    assert (await nobody.send(members()))[0]["members"] == [other]


async def test_subscription_with_presence_gets_the_members_and_each_change(
    replica: Replica, autojump_clock: MockClock
) -> None:
    alice, bob, watcher = [await connect(replica, name) for name in ("alice", "bob", "carol")]
    await alice.send(join(info=1))
    received = await watcher.send(watch())
    assert [each["type"] for each in received] == ["subscribed", "members"]
    assert snapshot(received) == [member("room.1", 1, client_id="alice", info=1)]
    await bob.send(join("room.2"))
    assert await watcher.read() == [change("join", "room.2", 1, client_id="bob")]
    await bob.send(join("room.2", info=[2]))
    assert await watcher.read() == [change("update", "room.2", 1, client_id="bob", info=[2])]
    await bob.send(leave("room.2"))
    assert await watcher.read() == [change("leave", "room.2", 0, client_id="bob", info=[2])]
    await watcher.send({"type": "unsubscribe", "pattern": "room.*"})
    await alice.send(leave())
    assert await watcher.read() == []


async def test_sessions_of_one_client_are_one_member(replica: Replica, autojump_clock: MockClock) -> None:
    one, other, watcher = [await connect(replica, name) for name in ("alice", "alice", "bob")]
    await watcher.send(watch())
    await one.send(join(info="one"))
    await other.send(join(info="other"))
    await other.send(leave())
    assert [(each["action"], each["sessions"], each["info"]) for each in await watcher.read()] == [
        ("join", 1, "one"),
        ("update", 2, "other"),
        ("update", 1, "one"),
    ]


async def test_client_that_comes_back_within_the_grace_is_not_announced(
    replica: Replica, autojump_clock: MockClock
) -> None:
    alice, watcher = await connect(replica, "alice"), await connect(replica, "bob")
    await alice.send(join())
    await watcher.send(watch())
    alice.driver.end()
    await trio.sleep(9)
    again = await connect(replica, "alice")
    await again.send(join())
    await trio.sleep(60)
    assert [each for each in await watcher.read() if each["type"] == "presence"] == []
    again.driver.end()
    await trio.sleep(9)
    assert await watcher.read() == []
    await trio.sleep(2)
    assert await watcher.read() == [change("leave", "room.1", 0, client_id="alice")]


async def test_subscribing_again_sends_the_snapshot_again(replica: Replica, autojump_clock: MockClock) -> None:
    alice, watcher = await connect(replica, "alice"), await connect(replica, "bob")
    await watcher.send(watch())
    await alice.send(join())
    received = await watcher.read() + await watcher.send(watch())
    assert [each["type"] for each in received] == ["presence", "subscribed", "members"]
    assert snapshot(received) == [member("room.1", 1, client_id="alice")]
    await watcher.send({"type": "subscribe", "pattern": "room.*"})
    await alice.send(leave())
    assert await watcher.read() == [], "the new subscription has no presence"


# Wrong requests

WRONG: list[tuple[Message, str]] = [
    (join("room.*"), "invalid_channel"),
    (join("other"), "unauthorized"),
    (join("_catbus.sessions"), "unauthorized"),
    (join(info="x" * 1023), "too_large"),
    (leave("*"), "invalid_channel"),
    (members("room..1"), "invalid_pattern"),
    (members("*"), "unauthorized"),
    (members("room.*", after="nonsense"), "bad_message"),
    (members("room.*", after="room.1 \0"), "bad_message"),
    (members("room.*", limit=0), "bad_message"),
    (members("room.*", after=3), "bad_message"),
    (join(channel=3), "bad_message"),
    ({"type": "join"}, "bad_message"),
]


@pytest.mark.parametrize(
    ("request_", "code"), WRONG, ids=[f"{code} {number}" for number, (_, code) in enumerate(WRONG)]
)
async def test_wrong_request_gets_its_code_and_changes_nothing(
    replica: Replica, request_: Message, code: str, autojump_clock: MockClock
) -> None:
    alice = await connect(replica, "alice", Grants(read=("room.*", "_catbus.sessions")))
    await alice.send(join(info="before"))
    [reply] = await alice.send({**request_, "id": 5})
    assert (reply["type"], reply["code"], reply["id"]) == ("error", code, 5)
    [page] = await alice.send(members())
    assert page["members"] == [member("room.1", 1, client_id="alice", info="before")]
    assert replica.client_usages.subscriptions == 1


async def test_info_that_is_nested_too_deep_is_rejected(replica: Replica, autojump_clock: MockClock) -> None:
    alice = await connect(replica, "alice")
    [reply] = await alice.send(join(info=json.loads("[" * 64 + "]" * 64), id=5))
    assert (reply["code"], reply["id"]) == ("bad_message", 5)
    deepest = json.loads("[" * 63 + "]" * 63)
    [reply] = await alice.send(join(info=deepest))
    assert reply["type"] == "joined"
    [page] = await alice.send(members())
    assert page["members"] == [member("room.1", 1, client_id="alice", info=deepest)]


async def test_info_of_the_largest_size_is_accepted(replica: Replica, autojump_clock: MockClock) -> None:
    alice = await connect(replica, "alice")
    [reply] = await alice.send(join(info="x" * 1022))
    assert reply["type"] == "joined"


async def test_session_is_a_member_of_so_many_channels(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    replica = await start(nursery, Config(limits=LimitSettings(joined_channels=2)))
    alice = await connect(replica, "alice")
    replies = await alice.send(join("a"), join("b"), join("c"), join("b"), leave("a"), join("c"))
    assert [(each["type"], each.get("code")) for each in replies] == [
        ("joined", None),
        ("joined", None),
        ("error", "limit"),
        ("joined", None),
        ("left", None),
        ("joined", None),
    ]


async def test_memberships_share_the_limit_of_all_subscriptions(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    replica = await start(nursery, Config(limits=LimitSettings(subscriptions_total=4)))
    alice = await connect(replica, "alice")
    replies = await alice.send(join("a"), join("b"), join("c"), join("b"))
    assert [each.get("code") for each in replies] == [None, None, "overloaded", None]
    [page] = await alice.send(members("c"))
    assert page["members"] == []
    alice.driver.end()
    assert replica.client_usages.subscriptions == 0


async def test_pages_of_members_continue_each_other(replica: Replica, autojump_clock: MockClock) -> None:
    alice = await connect(replica, "alice")
    await alice.send(*[join(f"room.{number}") for number in range(5)])
    found, after = [], {}
    while True:
        [page] = await alice.send(members(limit=2, **after))
        found += [each["channel"] for each in page["members"]]
        if "next" not in page:
            break
        assert len(page["members"]) == 2
        after = {"after": page["next"]}
    assert found == [f"room.{number}" for number in range(5)]


async def test_page_of_members_is_bounded_in_bytes(replica: Replica, autojump_clock: MockClock) -> None:
    info = "x" * 1000
    for number in range(11):
        peer = await connect(replica, f"client-{number}")
        await peer.send(*[join(f"room.{channel}", info=info) for channel in range(100)])
    found, after = [], {}
    while True:
        [page] = await peer.send(members(limit=1_000_000, **after))
        assert len(json.dumps(page)) < 1.2 * 1024 * 1024
        found += page["members"]
        if "next" not in page:
            break
        after = {"after": page["next"]}
    assert len(found) == 1100
    assert len({(each["channel"], each["client_id"]) for each in found}) == 1100


# Permissions


async def test_withdrawn_permission_ends_membership_and_watch(replica: Replica, autojump_clock: MockClock) -> None:
    alice, watcher = await connect(replica, "alice"), await connect(replica, "bob")
    await alice.send(join("room.1"), join("hall"), watch())
    await watcher.send(watch("*"))
    received = await alice.send({**alice.auth, "token": alice.token(Grants(read=("hall",)))})
    assert sorted(each["type"] for each in received) == ["auth_ok", "left", "revoked"]
    assert {"type": "left", "channel": "room.1"} in received
    assert await watcher.read() == [change("leave", "room.1", 0, "*", client_id="alice")], "at once"
    bob = await connect(replica, "bob")
    await bob.send(join("room.1"))
    assert await alice.read() == []
    assert (await alice.send(join("room.1")))[0]["code"] == "unauthorized"


async def test_changes_that_wait_are_dropped_when_the_permission_is_withdrawn(
    replica: Replica, autojump_clock: MockClock
) -> None:
    alice, bob = await connect(replica, "alice"), await connect(replica, "bob")
    await alice.send(watch(), watch("hall"))
    await bob.send(join("room.1"), join("hall"))
    await wait_all_tasks_blocked()
    await alice.driver.receive(json.dumps({**alice.auth, "token": alice.token(Grants(read=("hall",)))}).encode())
    received = await alice.read()
    assert [each.get("pattern") for each in received if each["type"] == "presence"] == ["hall"]


async def test_revoked_token_ends_memberships(
    replica: Replica, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    nursery.start_soon(replica.revocations.run)
    alice, watcher = await connect(replica, "alice"), await connect(replica, "bob")
    await alice.send(join())
    await watcher.send(watch())
    await replica.revoke_client("alice", time.time() + 60)
    assert "left" not in [each["type"] for each in await alice.read()]
    alice.driver.end()
    assert (await watcher.send(members()))[0]["members"] == []
    await trio.sleep(11)
    assert [each["action"] for each in await watcher.read()] == ["leave"]


async def test_first_version_client_gets_no_presence(replica: Replica, autojump_clock: MockClock) -> None:
    alice, old = await connect(replica, "alice"), Peer(replica, "old")
    await old.send({**old.auth, "protocol": 0})
    assert old.driver.session.protocol is ProtocolVersion.FIRST
    assert [each["type"] for each in await old.send(watch())] == ["subscribed"]
    await alice.send(join())
    assert await old.read() == []


# All sessions


async def test_every_session_is_a_member_of_the_reserved_channel(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    replica = await start(nursery, Config(presence=PresenceSettings(sessions=True)))
    alice, other = await connect(replica, "alice"), await connect(replica, "alice", Grants(read=("*",)))
    assert (await other.send(members("_catbus.sessions")))[0]["code"] == "unauthorized"
    received = await alice.send(watch("_catbus.sessions"))
    found = snapshot(received, "_catbus.sessions")
    assert [each["info"] for each in found] == [
        {
            "client_id": "alice",
            "transport": "test",
            "address": "192.0.2.7",
            "replica": replica.id,
            "session": replica.sessions[peer.driver].id,
        }
        for peer in (alice, other)
    ]
    Peer(replica, "bob")
    assert await alice.read() == [], "a session is no member before it is authenticated"
    other.driver.end()
    [gone] = await alice.read()
    assert (gone["action"], gone["session"]) == ("leave", found[1]["session"]), "at once"


async def test_sessions_are_no_members_unless_configured(replica: Replica, autojump_clock: MockClock) -> None:
    alice = await connect(replica, "alice")
    assert (await alice.send(members("_catbus.sessions")))[0]["members"] == []


# Clients that do not read, and clients that ask for much


async def crowd(replica: Replica, number: int, channel: str = "room.1", info: Any = None) -> list[Peer]:
    peers = [await connect(replica, f"client-{index:04}") for index in range(number)]
    for peer in peers:
        await peer.send(join(channel, info=info))
    return peers


async def test_snapshot_of_many_members_has_bounded_pages(replica: Replica, autojump_clock: MockClock) -> None:
    await crowd(replica, 250)
    watcher = await connect(replica, "watcher")
    received = await watcher.send(watch())
    assert len(snapshot(received)) == 250
    pages = [each for each in received if each["type"] == "members"]
    assert max(len(page["members"]) for page in pages) <= presence_watch.PAGE_MEMBERS
    assert max(len(json.dumps(page)) for page in pages) <= 1.5 * presence_watch.PAGE_BYTES


async def test_watcher_that_does_not_read_gets_the_state_when_it_reads(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Its send queue stays bounded, and what it reads leads to the members as they are."""
    replica = await start(nursery, Config(limits=LimitSettings(send_queue=20_000)))
    peers = await crowd(replica, 60, info="x" * 200)
    watcher = await connect(replica, "watcher")
    await watcher.driver.receive(json.dumps(watch()).encode())
    known: dict[tuple[str, str], Message] = {}
    for step in range(6):
        for index, peer in enumerate(peers):
            if (index + step) % 3 == 0:
                await peer.send(leave() if step % 2 else join(info=[step] * 40))
            assert watcher.driver.send_queue.size < 20_000 + 2 * presence_watch.PAGE_BYTES
        follow(known, await take_once(watcher))
    follow(known, await watcher.read())
    assert sorted(known.values(), key=str) == sorted((await peers[0].send(members(limit=1000)))[0]["members"], key=str)


async def test_changes_during_a_snapshot_follow_it(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """No change comes between the pages, and those of members in earlier pages come after the last one."""
    replica = await start(nursery, Config(limits=LimitSettings(send_queue=20_000)))
    peers = await crowd(replica, 150, info="x" * 150)
    watcher = await connect(replica, "watcher")
    await watcher.driver.receive(json.dumps(watch()).encode())
    received = await take_once(watcher)
    assert not any(each.get("complete") for each in received), "the first pages fill the send queue"
    await peers[0].send(leave())
    await peers[1].send(join(info="new"))
    await peers[2].send(leave(), join())
    await peers[149].send(leave())
    [newcomer] = await crowd_named(replica, "client-0000a")
    gone = await connect(replica, "client-0000b")
    await gone.send(join())
    await gone.send(leave())
    received += await watcher.read()
    found = [each["client_id"] for each in snapshot(received)]
    assert "client-0149" not in found, "a later page shows what happened before it"
    assert "client-0000" in found
    after = [each for each in received if each["type"] == "presence"]
    assert received[-len(after) :] == after
    assert [(each["action"], each["client_id"], each.get("info")) for each in after] == [
        ("leave", "client-0000", "x" * 150),
        ("update", "client-0001", "new"),
        ("update", "client-0002", None),
        ("join", newcomer.client_id, None),
    ]


async def test_too_many_changes_are_replaced_by_a_new_snapshot(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence_watch, "MAX_CHANGES", 10)
    replica = await start(nursery, Config(limits=LimitSettings(send_queue=2_000)))
    watcher = await connect(replica, "watcher")
    known: dict[tuple[str, str], Message] = {}
    follow(known, await watcher.send(watch()))
    peers = await crowd(replica, 40, info="x" * 100)
    assert replica.presence_feeder.changes <= 10
    received = await watcher.read()
    assert [each["type"] for each in received].count("members") >= 1
    follow(known, received)
    assert {client for _, client in known} == {str(peer.client_id) for peer in peers}
    assert replica.presence_feeder.changes == 0


async def crowd_named(replica: Replica, *names: str) -> list[Peer]:
    peers = [await connect(replica, name) for name in names]
    for peer in peers:
        await peer.send(join())
    return peers


async def take_once(peer: Peer) -> list[Message]:
    """Let the client read what waits for it, once."""
    await wait_all_tasks_blocked()
    return [each for item in peer.driver.send_queue.take() if isinstance(item, bytes) for each in objects(item)]


def follow(known: dict[tuple[str, str], Message], received: list[Message]) -> None:
    """Apply what a watcher has received to what it knew, as the specification says."""
    for each in received:
        if each["type"] == "members":
            pages = known.setdefault(("", "pages"), {"members": []})
            pages["members"] += each["members"]
            if each.get("complete"):
                found = {(one["channel"], one["client_id"]): one for one in pages["members"]}
                known.clear()
                known.update(found)
        elif each["type"] == "presence":
            assert ("", "pages") not in known, "a change came between the pages of a snapshot"
            one = {name: each[name] for name in ("channel", "sessions", "client_id", "info") if name in each}
            place = one["channel"], one["client_id"]
            assert (place in known) == (each["action"] != "join"), each
            if each["action"] == "leave":
                del known[place]
            else:
                known[place] = one


async def test_session_that_ends_is_watched_and_fed_no_more(replica: Replica, autojump_clock: MockClock) -> None:
    alice, watcher = await connect(replica, "alice"), await connect(replica, "watcher")
    await watcher.send(watch(), join("hall"))
    watcher.driver.end()
    await alice.send(join(), join("hall"))
    assert replica.presence.statistics().patterns == 0
    assert not watcher.driver.send_queue
    assert replica.client_usages.subscriptions == 2


async def test_joining_is_charged_to_the_publish_rate(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """A client that joins and leaves as fast as it can is read more slowly, and other clients are not."""
    rate = 10 * MEMBERSHIP_COST
    replica = await start(nursery, Config(limits=LimitSettings(publish_rate=rate)))
    alice, bob = await connect(replica, "alice"), await connect(replica, "bob")
    began = trio.current_time()
    for _ in range(15):
        await alice.send(join(), leave())
    assert trio.current_time() - began >= 1.9
    began = trio.current_time()
    await bob.send(join(), leave())
    assert trio.current_time() - began < 0.1


async def test_reading_members_is_charged_by_their_number(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    replica = await start(nursery, Config(limits=LimitSettings(publish_rate=1000)))
    await crowd(replica, 20)
    reader = await connect(replica, "reader")
    began = trio.current_time()
    for _ in range(100):
        await reader.send(members())
    assert trio.current_time() - began >= 1.0


class UnusedWriter:
    def flush(self) -> None:
        """Do nothing: the test takes the lines itself."""


class TwoPages(LocalPresence):
    """Has the members a and b, each in a page of its own."""

    def watch(self, pattern: str, watcher: Watcher) -> None:
        watcher.begin_members(pattern)

    def present(
        self, pattern: str, after: tuple[str, str] | None = None, limit: int = 0
    ) -> tuple[Sequence[Member], bool]:
        return ([Member("room.1", "ca", 1, "a")], True) if after is None else ([Member("room.1", "cb", 1, "b")], False)


def test_change_between_two_pages_waits_although_there_is_room() -> None:
    queue = SendQueue(UnusedWriter(), lambda _: None)
    watch = PresenceWatch(PresenceFeeder(TwoPages()), "alice", "room.*", queue)
    watch.begin()
    watch.feed()
    watch.note_member("room.*", "leave", Member("room.1", "ca", 0, "a"))
    watch.note_member("room.*", "leave", Member("room.1", "cc", 0, "c"))
    watch.feed()
    watch.feed()
    lines = [each for item in queue.take() if isinstance(item, bytes) for each in objects(item)]
    assert [each["type"] for each in lines] == ["members", "members", "presence"]
    assert (lines[2]["action"], lines[2]["client_id"]) == ("leave", "a")
