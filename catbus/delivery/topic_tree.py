"""The topic tree: finds the subscriptions whose pattern matches a channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from ..protocol.channels import check_pattern, selectors

CACHED_CHANNELS = 4096
"""Channels for which a tree keeps the groups that match."""

T = TypeVar("T")


class Group(Generic[T]):
    """Everyone who is in a tree under one pattern, in the order of their coming."""

    __slots__ = ("members", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.members: dict[T, None] = {}

    def __repr__(self) -> str:
        return f"<Group {self.pattern} of {len(self.members)}>"


class TopicTree(Generic[T]):
    """Patterns, each with its members. A look-up costs the depth of the channel, whatever the number of patterns.

    The tree has no nodes: a point of it is known by the text of its pattern, and `selectors` names the points on the
    way down to a channel. So a pattern takes one dictionary entry, however deep it is.
    """

    __slots__ = ("_cache", "_groups", "_size")

    def __init__(self) -> None:
        self._groups: dict[str, Group[T]] = {}
        self._cache: dict[str, tuple[Group[T], ...]] = {}
        self._size = 0

    def __len__(self) -> int:
        """How many pairs of a pattern and a member there are."""
        return self._size

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def patterns(self) -> int:
        """How many patterns have members."""
        return len(self._groups)

    def __contains__(self, pattern: str) -> bool:
        """Whether it has members."""
        return pattern in self._groups

    def groups(self) -> Iterable[Group[T]]:
        """Every pattern with its members: a live view, the oldest pattern first."""
        return self._groups.values()

    def add(self, pattern: str, member: T) -> None:
        """Put a member under a pattern, where it may be already. Raises `PeerError` (invalid_pattern)."""
        group = self._groups.get(pattern)
        if group is None:
            check_pattern(pattern)
            group = self._groups[pattern] = Group(pattern)
            self._forget(pattern)
        if member not in group.members:
            group.members[member] = None
            self._size += 1

    def remove(self, pattern: str, member: T) -> bool:
        """Take a member from under a pattern; False where it was not there."""
        group = self._groups.get(pattern)
        if group is None or member not in group.members:
            return False
        del group.members[member]
        self._size -= 1
        if not group.members:
            del self._groups[pattern]
            self._forget(pattern)
        return True

    def match(self, channel: str) -> tuple[Group[T], ...]:
        """The groups whose pattern matches a valid channel, the widest pattern first; none of them is empty."""
        found = self._cache.get(channel)
        return self._search(channel) if found is None else found

    def _search(self, channel: str) -> tuple[Group[T], ...]:
        if len(self._cache) >= CACHED_CHANNELS:
            self._cache.clear()
        known = self._groups
        groups = tuple([known[pattern] for pattern in selectors(channel) if pattern in known])
        self._cache[channel] = groups
        return groups

    def _forget(self, pattern: str) -> None:
        # Only a wildcard can have a part in what another channel matches.
        if pattern.endswith("*"):
            self._cache.clear()
        else:
            self._cache.pop(pattern, None)
