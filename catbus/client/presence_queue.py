"""The members of the channels of a pattern, from a snapshot and the changes after it. Pure."""

from __future__ import annotations

from collections.abc import Callable

from ..protocol import wire_messages as wire
from .live_state import set_entry
from .server_messages import MemberKey, PresentMember
from .state_queue import StateQueue


def _content(member: PresentMember) -> object:
    return member


class PresenceQueue(StateQueue[MemberKey, PresentMember]):
    """The queue of a live map of members. It drops messages, so it has no cursor.

    The broker sends a snapshot after each `subscribe`, and when it had to drop changes. A snapshot replaces the state
    when it is complete; changes that arrive between its pages belong to it.
    """

    __slots__ = ("_snapshot",)

    wants_presence = True

    def __init__(self, pattern: str, wake: Callable[[], None]) -> None:
        super().__init__(pattern, _content, wake)
        self._snapshot: dict[MemberKey, PresentMember] | None = None
        """What will replace the state."""

    def start(self, seq: int, epoch: str) -> None:
        super().start(seq, epoch)
        self.has_cursor = False
        self._snapshot = None

    def add_page(self, page: wire.MemberList) -> None:
        """Take a page of a snapshot."""
        snapshot = {} if self._snapshot is None else self._snapshot
        for found in page.members:
            member = PresentMember.read(found)
            snapshot[member.key] = member
        self._snapshot = snapshot
        if page.complete:
            self._snapshot = None
            self._show(snapshot)

    def add_change(self, change: wire.PresenceChange) -> None:
        member = PresentMember.read(change)
        value = None if change.action == "leave" else member
        if self._snapshot is None:
            self.state.set(member.key, value)
        else:
            set_entry(self._snapshot, member.key, value)
