"""Output of lines from a process that may not have threads, because it forks."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from contextlib import suppress

from ..observability.loggers import dropped_log_lines


class UnthreadedLineWriter:
    """Writes each line at once, or drops it if the output cannot take it now, so that no reader blocks the process."""

    def __init__(self, descriptor: int) -> None:
        self._format_notice: Callable[[int], bytes] | None = None
        self._descriptor = descriptor
        self._missed = 0
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def replace_notice(self, format_notice: Callable[[int], bytes]) -> None:
        """Set the function that formats the line written in place of a number of dropped lines."""
        self._format_notice = format_notice

    def put(self, line: bytes) -> None:
        """Write a line, with its line break, or drop and count it. A pipe that can be written takes 4 KiB."""
        if not self._poll.poll(0):
            self._missed += 1
            dropped_log_lines.number += 1
            return
        missed, self._missed = self._missed, 0
        if missed and self._format_notice is not None:
            line = self._format_notice(missed) + line
        with suppress(OSError):
            os.write(self._descriptor, line)

    def close(self) -> None:
        """Do nothing: no line waits."""
