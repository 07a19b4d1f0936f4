"""The presence of a single replica, in memory."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from catbus.errors import PeerError
from catbus.presence import Member, PresenceAction
from catbus.presence.local import LocalPresence

GRACE = 10.0


class Recorder:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.events: list[tuple[str, str, int]] = []

    def begin_members(self, pattern: str) -> None:
        self.begun.append(pattern)

    def note_member(self, pattern: str, action: PresenceAction, member: Member) -> None:
        self.events.append((action, member.client_id or "?", member.sessions))

    def take(self) -> list[tuple[str, str, int]]:
        taken, self.events = self.events, []
        return taken


@pytest.fixture
async def presence(nursery: trio.Nursery) -> LocalPresence:
    local = LocalPresence(GRACE)
    nursery.start_soon(local.run)
    return local


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_member_that_comes_back_within_the_grace_is_never_gone(
    presence: LocalPresence, autojump_clock: trio.testing.MockClock
) -> None:
    watcher = Recorder()
    presence.watch("room.*", watcher)
    assert watcher.begun == ["room.*"]
    presence.join(1, "room.a", "alice", None)
    await settle()
    presence.leave_all(1)
    await trio.sleep(GRACE - 0.1)
    presence.join(2, "room.a", "alice", None)
    await trio.sleep(2 * GRACE)
    assert watcher.take() == [("join", "alice", 1)]
    presence.leave_all(2)
    await trio.sleep(GRACE - 0.1)
    assert watcher.take() == []
    await trio.sleep(0.2)
    assert watcher.take() == [("leave", "alice", 0)]


async def test_explicit_leave_is_announced_at_once(
    presence: LocalPresence, autojump_clock: trio.testing.MockClock
) -> None:
    watcher = Recorder()
    presence.watch("room.a", watcher)
    presence.join(1, "room.a", "alice", b'{"n":1}')
    presence.join(2, "room.a", "alice", None)
    await settle()
    assert watcher.take() == [("join", "alice", 2)]
    presence.leave(2, "room.a", explicit=True)
    await settle()
    assert watcher.take() == [("update", "alice", 1)]
    presence.leave(1, "room.a", explicit=True)
    await settle()
    assert watcher.take() == [("leave", "alice", 0)]
    assert presence.channels(1) == ()


async def test_pages_have_all_members_once(presence: LocalPresence, autojump_clock: trio.testing.MockClock) -> None:
    for session in range(1, 26):
        presence.join(session, f"room.{session % 3}", None if session % 2 else f"client{session}", None)
    await settle()
    found: list[Member] = []
    after = None
    while True:
        page = await presence.members("room.*", after, 4)
        found += page.members
        after = page.next
        if after is None:
            break
    assert len(found) == 25
    assert [member.position for member in found] == sorted({member.position for member in found})
    assert all((member.client_id is None) != (member.session is None) for member in found)
    assert (await presence.members("room.*", None, 25)).next is None
    for text in ("", "room.a", "room.* cx", "room.a c\0", "room.a c\ud800", "x" * 2000):
        with pytest.raises(PeerError):
            await presence.members("room.*", text)


async def test_explicit_leave_does_not_end_a_session_that_may_come_back(
    presence: LocalPresence, autojump_clock: trio.testing.MockClock
) -> None:
    """Of two sessions one lost its connection. The other one leaves, and the first comes back."""
    watcher = Recorder()
    presence.watch("room.a", watcher)
    presence.join(1, "room.a", "alice", None)
    presence.join(2, "room.a", "alice", None)
    await settle()
    presence.leave_all(1)
    await trio.sleep(1)
    presence.leave(2, "room.a", explicit=True)
    await trio.sleep(GRACE - 2)
    presence.join(3, "room.a", "alice", None)
    await trio.sleep(2 * GRACE)
    assert [action for action, _, _ in watcher.take()] == ["join", "update"]
    # The third session took the place of the first, so nobody is expected any more.
    presence.leave(3, "room.a", explicit=True)
    await settle()
    assert watcher.take() == [("leave", "alice", 0)]


async def test_unwatched_pattern_gets_no_events(
    presence: LocalPresence, autojump_clock: trio.testing.MockClock
) -> None:
    watcher = Recorder()
    presence.watch("room.*", watcher)
    presence.watch("room.*", watcher)
    assert watcher.begun == ["room.*"], "watching twice is the same as once"
    presence.unwatch("room.*", watcher)
    presence.unwatch("room.*", watcher)
    presence.join(1, "room.a", "alice", None)
    await settle()
    assert watcher.take() == []
