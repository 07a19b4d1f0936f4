"""A watcher for tests, which keeps what it is told and checks that the events fit together."""

from __future__ import annotations

from collections.abc import Callable

import trio

from catbus.presence import Member, Presence, PresenceAction

TIMEOUT = 30
"""Seconds that a test waits for a condition."""


class RecordingWatcher:
    """Follows the members of one pattern: the snapshot, and then the events."""

    def __init__(self, presence: Presence, pattern: str) -> None:
        self.members: dict[tuple[str, str], Member] = {}
        self.begun = False
        self.events: list[tuple[PresenceAction, Member]] = []
        self._presence = presence
        self._pattern = pattern
        self._changed = trio.Event()
        presence.watch(pattern, self)

    def begin_members(self, pattern: str) -> None:
        assert pattern == self._pattern
        assert not self.begun, "a pattern begins twice"
        self.begun = True
        self.members = {member.position: member for member in self.present()}
        self._wake()

    def note_member(self, pattern: str, action: PresenceAction, member: Member) -> None:
        assert pattern == self._pattern
        assert self.begun, "an event before the beginning"
        before = self.members.get(member.position)
        match action:
            case "join":
                assert before is None
                assert member.sessions > 0
            case "update":
                assert before is not None
                assert (before.sessions, before.info) != (member.sessions, member.info)
                assert member.sessions > 0
            case "leave":
                assert before is not None
                assert member.sessions == 0
        if action == "leave":
            del self.members[member.position]
        else:
            self.members[member.position] = member
        self.events.append((action, member))
        self._wake()

    def present(self) -> list[Member]:
        """The members, read in pages from memory."""
        found: list[Member] = []
        more, after = True, None
        while more:
            page, more = self._presence.present(self._pattern, after, 3)
            found += page
            after = found[-1].position if found else None
        assert [member.position for member in found] == sorted({member.position for member in found})
        return found

    def close(self) -> None:
        self._presence.unwatch(self._pattern, self)

    @property
    def names(self) -> dict[str, int]:
        """The number of sessions by client_id; sessions without one count under `-`."""
        found: dict[str, int] = {}
        for member in self.members.values():
            name = member.client_id or "-"
            found[name] = found.get(name, 0) + member.sessions
        return found

    @property
    def left(self) -> list[str | None]:
        """The client_ids of the leaves so far."""
        return [member.client_id for action, member in self.events if action == "leave"]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait_until(self, reached: Callable[[RecordingWatcher], bool], timeout: float = TIMEOUT) -> None:
        """Wait until a condition holds."""
        with trio.fail_after(timeout):
            while not reached(self):
                await self._changed.wait()

    async def wait_names(self, **expected: int) -> None:
        """Wait until exactly these clients are there, with these numbers of sessions."""
        try:
            await self.wait_until(lambda self: self.begun and self.names == expected)
        except trio.TooSlowError:
            raise AssertionError(f"{self.names}, not {expected}") from None
