"""The queue that feeds a live map. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic

from .live_state import K, LiveState, V
from .message_queue import CursorUpdate, MessageQueue
from .server_messages import Message


class StateQueue(MessageQueue, Generic[K, V]):
    """A queue that is emptied at once, into the state of a live map. So it is never full.

    `wake` is called when the state becomes `ready`, when the queue ends, and when there will be no further connection.
    """

    __slots__ = ("_notify", "ready", "state")

    def __init__(self, pattern: str, content: Callable[[V], object], wake: Callable[[], None]) -> None:
        super().__init__(pattern, None, "", 1000, wake=self._empty)
        self.state: LiveState[K, V] = LiveState(content)
        self.ready = False
        """Whether the state has ever been complete. Without a connection it is what it was."""
        self._notify = wake

    def _take(self, item: Message | CursorUpdate) -> None:
        """Take an item of the queue."""

    def _show(self, entries: dict[K, V]) -> None:
        """Replace the state by a whole snapshot."""
        self.state.replace(entries)
        if not self.ready:
            self.ready = True
            self._notify()

    def _empty(self) -> None:
        if not self.items:
            self._notify()
        while self.items:
            self._take(self.items.popleft())
