"""The signals of a process without an event loop: they wait in a queue, and one call waits for them and for pipes."""

from __future__ import annotations

import os
import select
import signal
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

QUEUED = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD


class SignalQueue:
    """Queues the signals of `QUEUED` while its context lasts."""

    def __init__(self) -> None:
        self._received: deque[signal.Signals] = deque()
        self._wake_reader, self._wake_writer = os.pipe()
        self._earlier: dict[signal.Signals, Any] = {}
        for descriptor in (self._wake_reader, self._wake_writer):
            os.set_blocking(descriptor, False)

    def __enter__(self) -> SignalQueue:
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        self._earlier = {number: signal.signal(number, self._receive) for number in QUEUED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._close()

    def close_in_child(self) -> None:
        """Restore the default handlers in a process that was forked."""
        for number in QUEUED:
            signal.signal(number, signal.SIG_DFL)
        self._close()

    def _close(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received.append(signal.Signals(number))

    def wait(self, seconds: float | None, pipes: Collection[int] = ()) -> list[signal.Signals]:
        """Wait until a signal has come, one of `pipes` can be read, or the time is over. Return the signals."""
        poll = select.poll()
        for descriptor in (self._wake_reader, *pipes):
            poll.register(descriptor, select.POLLIN)
        if not self._received:
            poll.poll(None if seconds is None else max(0.0, seconds) * 1000)
        with suppress(BlockingIOError):
            while os.read(self._wake_reader, 512):
                pass
        found = list(self._received)
        self._received.clear()
        return found
