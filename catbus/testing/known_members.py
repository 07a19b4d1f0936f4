"""What a client knows of the members of channels, from the pages and changes that it received (section 9.4)."""

from __future__ import annotations

from typing import Any

from .reference_model import ReferenceModel

HOSTILE = "hostile"
"""The client_id of clients that join any channels."""

Member = tuple[str, str | None]
"""A channel and a client_id."""
MemberStates = dict[Member, tuple[int, Any]]
"""The number of sessions and the info of members."""


class KnownMembers:
    """The members that a client knows, by pattern. Each page and each change must fit what came before."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.watched: dict[str, MemberStates] = {}
        """The members that it knows, by pattern of a subscription with presence."""
        self.complete: set[str] = set()
        """The patterns of which it has a complete snapshot."""
        self._snapshots: dict[str, MemberStates] = {}
        """The pages so far of snapshots that are not complete."""

    def members_in(self, page: dict[str, Any]) -> MemberStates:
        """Return the members in a page, except those of hostile clients, which may join any channel."""
        return {
            (each["channel"], each.get("client_id")): (each["sessions"], each.get("info"))
            for each in page["members"]
            if each.get("client_id") != HOSTILE
        }

    def begin_members(self, pattern: str) -> None:
        """Expect a snapshot: a subscription with presence begins."""
        self.forget_members(pattern)
        self.watched[pattern] = {}

    def forget_members(self, pattern: str) -> None:
        self._snapshots.pop(pattern, None)
        self.complete.discard(pattern)
        self.watched.pop(pattern, None)

    def add_page(self, page: dict[str, Any]) -> None:
        pattern = page["pattern"]
        assert pattern in self.watched, f"{self.name} received {page}, and watches {set(self.watched)}"
        found = self._snapshots.setdefault(pattern, {})
        found |= self.members_in(page)
        if page.get("complete"):
            self.watched[pattern] = self._snapshots.pop(pattern)
            self.complete.add(pattern)

    def apply_change(self, change: dict[str, Any]) -> None:
        pattern, member = change["pattern"], (change["channel"], change.get("client_id"))
        assert pattern in self.complete, f"{self.name} received {change} before a snapshot"
        assert pattern not in self._snapshots, f"{self.name} received {change} between the pages of a snapshot"
        if member[1] == HOSTILE:
            return
        known = self.watched[pattern]
        assert (member in known) == (change["action"] != "join"), f"{self.name} received {change}, and knew {known}"
        if change["action"] == "leave":
            assert change["sessions"] == 0, change
            del known[member]
        else:
            known[member] = change["sessions"], change.get("info")

    def knows_members_of(self, model: ReferenceModel, pattern: str) -> bool:
        """Whether it knows exactly the members of the model, and perhaps some that have lost their connection."""
        if pattern not in self.complete:
            return False
        wanted = {member: (1, info) for member, info in model.members(pattern).items()}
        known = self.watched[pattern]
        here = {member for member in known if member in wanted or member in model.joined - model.lost}
        return {member: state for member, state in known.items() if member in here} == wanted
