"""Non-blocking output of lines. A thread writes them, so that a slow reader of the output blocks nothing else."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import TextIO

import trio

from ..observability.loggers import dropped_log_lines
from .unthreaded_line_writer import UnthreadedLineWriter

MAX_QUEUED_BYTES = 1 << 20
"""Bytes that may wait for the reader. Above it, lines are dropped until the queue is empty."""
FLUSH_TIMEOUT = 1.0
"""Seconds that an exiting process waits for the reader."""
_ATOMIC_WRITE_SIZE = select.PIPE_BUF
"""Bytes of one system call, unless a line is longer. A pipe writes this many atomically."""


class LineWriter:
    """Writes lines to a file descriptor, in order, from a thread that starts with the first line.

    It is thread-safe.
    """

    def __init__(self, descriptor: int) -> None:
        self._format_notice: Callable[[int], bytes] = _drop_notice
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._waiting = 0
        """Bytes of the queued lines and of those being written."""
        self._full = False
        self._missed = 0
        self._torn = False
        """Whether the last line was cut off."""
        self._thread: threading.Thread | None = None
        self._closed = False
        self._given_up = False

    def replace_notice(self, format_notice: Callable[[int], bytes]) -> None:
        """Set the function that formats the line written in place of a number of dropped lines."""
        self._format_notice = format_notice

    def put(self, line: bytes) -> None:
        """Queue a line, with its line break. It is dropped and counted if the queue is full."""
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
                except RuntimeError:  # Too many threads; the next line tries again.
                    return
                self._thread = thread

    def flush(self) -> None:
        """Wait until all lines are written, for `FLUSH_TIMEOUT` at most. It waits only once for a blocked reader."""
        with self._changed:
            if self._thread is not None and not self._given_up:
                self._given_up = not self._changed.wait_for(lambda: not self._waiting, FLUSH_TIMEOUT)

    def close(self) -> None:
        """Flush, and accept no more lines."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _miss(self, number: int) -> None:
        self._missed += number
        dropped_log_lines.number += number

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
                # Before the lines queued from now on, which this thread has not taken yet.
                self._write(self._format_notice(missed))
            with self._changed:
                self._waiting -= size
                self._changed.notify_all()

    def _write(self, data: bytes) -> bool:
        """Write all of `data`. Return False if the output failed."""
        data = b"\n" + data if self._torn else data
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:  # The reader is gone, or the disk is full.
                break
        self._torn = (self._torn or len(left) < len(data)) if left else False
        return not left


def _drop_notice(number: int) -> bytes:
    return b"catbus: %d lines were dropped, because the output was not read\n" % number


OutputWriter = LineWriter | UnthreadedLineWriter

_make_writer: type[LineWriter] | type[UnthreadedLineWriter] = LineWriter
_writers: dict[int, OutputWriter] = {}
"""Writers by file descriptor, so that log lines and other lines of the same output keep their order."""


def writer_of(stream: TextIO) -> OutputWriter | None:
    """Return the writer for the file descriptor of a stream, or None for a stream in memory, which does not block."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    if descriptor not in _writers:
        stream.flush()
        _writers[descriptor] = _make_writer(descriptor)
    return _writers[descriptor]


def write_line(text: str, stream: TextIO) -> None:
    """Write one or more lines without waiting for the reader."""
    writer = writer_of(stream)
    if writer is None:
        print(text, file=stream, flush=True)
    else:
        writer.put(f"{text}\n".encode(errors="backslashreplace"))


async def write_stdout(data: bytes) -> None:
    """Write to stdout in a thread, so that a slow reader blocks the output but not the connection.

    Cancellation abandons the thread: an unknown part of the data is written.
    """
    await trio.to_thread.run_sync(_write_all, data, abandon_on_cancel=True)


def _write_all(data: bytes) -> None:
    # Bypass sys.stdout, so that nothing remains in a buffer.
    while data:
        data = data[os.write(1, data) :]


def use_threads(allowed: bool) -> None:
    """Close all writers, and make the next ones with threads, as at first, or without, for a process that forks."""
    global _make_writer
    close_writers()
    _make_writer = LineWriter if allowed else UnthreadedLineWriter


def close_writers() -> None:
    """Flush and remove all writers. The next line creates a new one."""
    while _writers:
        _writers.popitem()[1].close()
