"""The state behind a live map: its entries, the snapshot that will replace them, and the changes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakSet

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Change(NamedTuple, Generic[K, V]):
    """One entry of a live map has changed. `value` is None if it was removed, `previous` if it was not there."""

    key: K
    value: V | None
    previous: V | None


class ChangeQueue(Generic[K, V]):
    """The changes that one iteration has not taken yet.

    Changes of one key are merged, and cancel each other out. So there are never more than the keys that the iteration
    knows and those that the map has. `wake` is called when an empty queue gets a change.
    """

    def __init__(self, state: LiveState[K, V], wake: Callable[[], None]) -> None:
        self._state = state
        self._wake = wake
        self._previous: dict[K, V | None] = {}
        """What the iteration knows, by the keys that have changed since."""
        state.queues.add(self)

    def add(self, change: Change[K, V]) -> None:
        previous = self._previous.setdefault(change.key, change.previous)
        if self._state.are_equal(previous, change.value):
            del self._previous[change.key]
        elif len(self._previous) == 1:
            self._wake()

    def take(self) -> Change[K, V] | None:
        """Take the oldest change, with the present value. None if there is none."""
        for key in self._previous:
            return Change(key, self._state.entries.get(key), self._previous.pop(key))
        return None


class LiveState(Generic[K, V]):
    """The entries of a live map, and those to whom their changes are reported.

    `content` returns what tells two values of a key apart. `entries` is another object after each `replace`.
    """

    def __init__(self, content: Callable[[V], object]) -> None:
        self.entries: dict[K, V] = {}
        self.callbacks: dict[object, Callable[[Change[K, V]], object]] = {}
        self.queues: WeakSet[ChangeQueue[K, V]] = WeakSet()
        """An iteration that the application has dropped is forgotten."""
        self._content = content

    def are_equal(self, one: V | None, other: V | None) -> bool:
        if one is None or other is None:
            return one is other
        return self._content(one) == self._content(other)

    def set(self, key: K, value: V | None) -> None:
        """Set an entry, or with None remove it, and report the change if there is one."""
        previous = set_entry(self.entries, key, value)
        self._report(key, value, previous)

    def replace(self, entries: dict[K, V]) -> None:
        """Replace all entries, and report the differences afterwards."""
        old, self.entries = self.entries, entries
        for key in old.keys() - entries.keys():
            self._report(key, None, old[key])
        for key, value in list(entries.items()):
            self._report(key, value, old.get(key))

    def _report(self, key: K, value: V | None, previous: V | None) -> None:
        if self.are_equal(value, previous):
            return
        change = Change(key, value, previous)
        for queue in self.queues:
            queue.add(change)
        for callback in list(self.callbacks.values()):
            callback(change)


def set_entry(entries: dict[K, V], key: K, value: V | None) -> V | None:
    """Set an entry, or with None remove it. Returns what it was before."""
    previous = entries.get(key)
    if value is not None:
        entries[key] = value
    elif previous is not None:
        del entries[key]
    return previous
