"""Channels, the patterns that select them, and the tree that finds who asked for a channel.

A channel is dot-separated segments: `project.abc123.updates`. A pattern is a channel, or a channel followed by `.*`
(everything below it, at any depth, and not itself), or `*` alone (everything).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from .errors import Code, PeerError

MAX_LENGTH = 255
"""How many bytes a channel or a pattern may have."""

MAX_SEGMENTS = 32
"""How many segments a channel or a pattern may have; the `*` of a pattern is one."""

CACHED_CHANNELS = 4096
"""For how many channels a tree remembers what matches."""

T = TypeVar("T")

_SEGMENTS = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_STRANGER = re.compile(r"[^A-Za-z0-9_.-]")


def check_channel(text: str) -> None:
    """Raise `PeerError` (invalid_channel) unless `text` is a channel."""
    fault = _fault(text, text)
    if fault is not None:
        raise PeerError(Code.INVALID_CHANNEL, f"not a channel: {_clip(text)}: {fault}")


def check_pattern(text: str) -> None:
    """Raise `PeerError` (invalid_pattern) unless `text` is a pattern."""
    if text == "*":
        return
    fault = _fault(text, text.removesuffix(".*"))
    if fault is not None:
        raise PeerError(Code.INVALID_PATTERN, f"not a pattern: {_clip(text)}: {fault}")


def matches(pattern: str, channel: str) -> bool:
    """Whether the pattern selects the channel. Both are taken to be valid."""
    if pattern == "*":
        return True
    if pattern.endswith(".*"):
        return channel.startswith(pattern[:-1])
    return channel == pattern


def selectors(text: str) -> Iterator[str]:
    """Every pattern that matches a valid channel, the widest first; of a valid pattern, every grant that covers it."""
    if text != "*":
        yield "*"
    end = text.find(".")
    while end > 0:
        wildcard = text[: end + 1] + "*"
        if wildcard != text:
            yield wildcard
        end = text.find(".", end + 1)
    yield text


def covers(grant: str, pattern: str) -> bool:
    """Whether every channel that `pattern` can match matches `grant` too. Both are taken to be valid patterns."""
    # A pattern with a wildcard begins as all that it matches begins, so it is covered where it would be matched.
    return matches(grant, pattern)


def prefix_range(pattern: str) -> tuple[str, str] | None:
    """The bounds (`>=`, `<`) in byte order of what `a.b.*` matches; None for a channel and for `*`."""
    if not pattern.endswith(".*"):
        return None
    return pattern[:-1], pattern[:-2] + "/"


def _fault(text: str, channel: str) -> str | None:
    if _SEGMENTS.fullmatch(channel) and len(text) <= MAX_LENGTH and text.count(".") < MAX_SEGMENTS:
        return None
    if not text:
        return "it is empty"
    if len(text) > MAX_LENGTH:
        return f"longer than {MAX_LENGTH} bytes"
    stranger = _STRANGER.search(channel)
    if stranger is None:
        return f"more than {MAX_SEGMENTS} segments" if _SEGMENTS.fullmatch(channel) else "a segment is empty"
    if stranger[0] == "*":
        return "a wildcard may only be the last segment of a pattern"
    return f"{stranger[0]!a} may not stand in it"


def _clip(text: str) -> str:
    return ascii(text if len(text) <= 64 else text[:61] + "...")


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
