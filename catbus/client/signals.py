"""Signals that tasks wait for: one `Signal`, and the `ClientSignals` that the connections of a client share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio


class Signal:
    """An event that repeats: `notify` wakes the tasks that wait, and has no effect on a later `wait`.

    All tasks run in one thread, so a condition that is tested right before `wait` cannot change unnoticed.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def notify(self) -> None:
        """Wake all waiting tasks."""
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        """Wait for the next `notify`. Safe to cancel."""
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()


class ClientSignals:
    """Signals between the application and all connections of one client."""

    def __init__(self) -> None:
        self.send_ready = Signal()
        """There may be bytes to send."""
        self.read_wanted = Signal()
        """A task may have begun to wait for something that the broker sends."""
        self.progress = Signal()
        """Bytes were sent or received, so there may be room, or the state of the connection changed."""
        self.waiting_readers = 0
        """Tasks that wait for the next message of a subscription, and live maps."""

    def notify_request(self) -> None:
        """Wake the writer for a new request, and the reader for its reply."""
        self.send_ready.notify()
        self.read_wanted.notify()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Want everything that the broker sends: meanwhile full queues do not pause reading."""
        self.waiting_readers += 1
        self.read_wanted.notify()
        try:
            yield
        finally:
            self.waiting_readers -= 1

    async def wait_for_message(self, signal: Signal) -> None:
        """Wait for the next message of a subscription."""
        with self.reading():
            await signal.wait()
