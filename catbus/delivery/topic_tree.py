"""The topic tree: finds the subscriptions whose pattern matches a channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from ..protocol.channels import check_pattern, selectors

CACHED_CHANNELS = 4096
"""Channels for which a tree keeps the groups that match."""

T = TypeVar("T")


class Group(Generic[T]):
    """The members of a tree with one pattern, in order of arrival."""

    __slots__ = ("members", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.members: dict[T, None] = {}

    def __repr__(self) -> str:
        return f"<Group {self.pattern} of {len(self.members)}>"


class TopicTree(Generic[T]):
    """Patterns, each with its members. The cost of a lookup depends on the depth of the channel alone.

    The tree has no nodes: its positions are the texts of patterns, and `selectors` returns the positions on the path to
    a channel. So a pattern takes one dictionary entry, however deep it is.
    """

    __slots__ = ("_cache", "_groups", "_size")

    def __init__(self) -> None:
        self._groups: dict[str, Group[T]] = {}
        self._cache: dict[str, tuple[Group[T], ...]] = {}
        self._size = 0

    def __len__(self) -> int:
        """Return the number of pairs of a pattern and a member."""
        return self._size

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def patterns(self) -> int:
        """Number of patterns that have members."""
        return len(self._groups)

    def __contains__(self, pattern: str) -> bool:
        """Return whether a pattern has members."""
        return pattern in self._groups

    def members(self, pattern: str) -> int:
        """Return the number of members of a pattern."""
        group = self._groups.get(pattern)
        return 0 if group is None else len(group.members)

    def listed(self, pattern: str) -> tuple[T, ...]:
        """Return the members of a pattern, in order of arrival."""
        group = self._groups.get(pattern)
        return () if group is None else tuple(group.members)

    def groups(self) -> Iterable[Group[T]]:
        """Return each pattern with its members: a live view, the oldest pattern first."""
        return self._groups.values()

    def add(self, pattern: str, member: T) -> None:
        """Add a member to a pattern, if it is not there already. Raises `PeerError` (invalid_pattern)."""
        group = self._groups.get(pattern)
        if group is None:
            check_pattern(pattern)
            group = self._groups[pattern] = Group(pattern)
            self._forget(pattern)
        if member not in group.members:
            group.members[member] = None
            self._size += 1

    def remove(self, pattern: str, member: T) -> bool:
        """Remove a member from a pattern. Return False if it is not there."""
        group = self._groups.get(pattern)
        if group is None or member not in group.members:
            return False
        del group.members[member]
        self._size -= 1
        if not group.members:
            del self._groups[pattern]
            self._forget(pattern)
        return True

    def forget_channels(self) -> None:
        """Forget the channels that were looked up."""
        self._cache.clear()

    def match(self, channel: str) -> tuple[Group[T], ...]:
        """Return the groups whose pattern matches a valid channel, the widest pattern first. None of them is empty."""
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
        # Only a wildcard can match other channels.
        if pattern.endswith("*"):
            self._cache.clear()
        else:
            self._cache.pop(pattern, None)
