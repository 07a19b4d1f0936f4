"""Lines for an output that is read slowly, or not at all: a thread writes them, and nobody waits for it."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import TextIO

import trio

from ..observability.loggers import lost_lines

MAX_QUEUED_BYTES = 1 << 20
"""Bytes that wait for a reader. What is more is dropped, until the reader has caught up."""
FLUSH_TIMEOUT = 1.0
"""Seconds that a process which ends gives to a reader."""
_ATOMIC_WRITE_SIZE = select.PIPE_BUF
"""Bytes that go in one system call, unless a line is longer: a pipe takes so many as a whole."""


class LineWriter:
    """Writes to a file descriptor, in order, from a thread that starts with the first line.

    Safe to use from any thread. `report` makes the line that stands in the place of a number of dropped ones.
    """

    def __init__(self, descriptor: int) -> None:
        self.report: Callable[[int], bytes] = _drop_notice
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._waiting = 0
        """Bytes of the lines, those that are being written included."""
        self._full = False
        self._missed = 0
        self._torn = False
        """Whether the last line was cut off."""
        self._thread: threading.Thread | None = None
        self._closed = False
        self._given_up = False

    def put(self, line: bytes) -> None:
        """Have a line written, with its line break. It is dropped, and counted, where too much waits."""
        with self._changed:
            self._full = self._full or (self._waiting > 0 and self._waiting + len(line) > MAX_QUEUED_BYTES)
            if self._full or self._closed:
                self._miss(1)
                return
            self._lines.append(line)
            self._waiting += len(line)
            self._changed.notify_all()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="catbus output", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # There are too many threads; the next line tries again.
                    return
                self._thread = thread

    def flush(self) -> None:
        """Wait until everything has been written, for `FLUSH_TIME` at most. It waits for a stuck reader only once."""
        with self._changed:
            if self._thread is not None and not self._given_up:
                self._given_up = not self._changed.wait_for(lambda: not self._waiting, FLUSH_TIMEOUT)

    def close(self) -> None:
        """Flush, and take no more lines."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _miss(self, number: int) -> None:
        self._missed += number
        lost_lines.number += number

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed)
                if not self._lines:
                    return
                batch = [self._lines.popleft()]
                size = len(batch[0])
                while self._lines and size + len(self._lines[0]) <= _ATOMIC_WRITE_SIZE:
                    batch.append(self._lines.popleft())
                    size += len(batch[-1])
            written = self._write(b"".join(batch))
            with self._changed:
                if not written:
                    self._miss(len(batch))
                missed = 0
                if not self._lines:
                    self._full = False
                    if written:
                        missed, self._missed = self._missed, 0
            if missed:
                # Before the lines that are put from now on, which this thread has not taken yet.
                self._write(self.report(missed))
            with self._changed:
                self._waiting -= size
                self._changed.notify_all()

    def _write(self, data: bytes) -> bool:
        """Whether all of it was written."""
        data = b"\n" + data if self._torn else data
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:  # The reader has gone, or the disk is full.
                break
        self._torn = (self._torn or len(left) < len(data)) if left else False
        return not left


def _drop_notice(number: int) -> bytes:
    return b"catbus: %d lines were dropped, because the output was not read\n" % number


_writers: dict[int, LineWriter] = {}
"""By descriptor: log lines and others for the same output keep their order."""


def writer_of(stream: TextIO) -> LineWriter | None:
    """The writer for the file descriptor behind a stream; None for a stream in memory, which blocks nobody."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    if descriptor not in _writers:
        stream.flush()
        _writers[descriptor] = LineWriter(descriptor)
    return _writers[descriptor]


def write_line(text: str, stream: TextIO) -> None:
    """Write a line, or several, without waiting for a reader."""
    writer = writer_of(stream)
    if writer is None:
        print(text, file=stream, flush=True)
    else:
        writer.put(f"{text}\n".encode(errors="backslashreplace"))


async def write_stdout(data: bytes) -> None:
    """Write to stdout, in a thread: a reader that is slow holds up what is printed, and not the connection.

    Cancelling it leaves the thread behind, and open how much of the data is written.
    """
    await trio.to_thread.run_sync(_write_all, data, abandon_on_cancel=True)


def _write_all(data: bytes) -> None:
    # Past sys.stdout, so that nothing stays in a buffer.
    while data:
        data = data[os.write(1, data) :]


def close_writers() -> None:
    """Flush and forget all writers. The next line starts a new one."""
    while _writers:
        _writers.popitem()[1].close()
