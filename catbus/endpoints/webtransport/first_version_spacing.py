"""Objects for a first-version client over WebTransport, one at a time. Pure.

Such a client takes what a read of its stream brings for one object, and a browser's read brings all that has arrived,
up to the end of a ring buffer. So the next object leaves when the one before is acknowledged and a little later, in
which the page can read it; and the size of each is a multiple of `UNIT`, so that none of up to a `UNIT` lies across the
end of the buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ...delivery.send_queue import QueueItem, SendQueue

SPACING = 0.025, 0.1
"""Seconds, at least and at most, from the acknowledgement of an object to the next one."""
BACKLOG_TIME = 1.0
"""Seconds in which all that waits leaves, as far as `SPACING` allows."""
UNIT = 1024
"""It fits into a packet, and a browser's buffer of 64 KiB holds a whole number of them."""
AT_A_TIME = 65_536
"""About how many bytes leave the send queue at a time."""


class ObjectSpacer:
    """What was taken from the send queue of one client and has not been sent."""

    __slots__ = ("_lines", "_sent", "_until", "due")

    def __init__(self) -> None:
        self.due: float | None = None
        """When there will be something to send, where that needs no acknowledgement."""
        self._lines: deque[bytes] = deque()
        self._sent = False
        """Whether an object was sent that is not known to be acknowledged."""
        self._until = 0.0
        """When the next one may be sent."""

    def __bool__(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._lines)

    def next_line(self, send_queue: SendQueue, now: float) -> bytes:
        """The next object, filled up, if it may be sent now. Call it when all that was sent is acknowledged."""
        self.due = None
        if not self._lines:
            self._lines.extend(first_version_lines(send_queue.take(AT_A_TIME)))
        if self._sent:
            self._sent, self._until = False, now + spacing(len(self._lines), more=bool(send_queue))
        if not self._lines:
            return b""
        if now < self._until:
            self.due = self._until
            return b""
        self._sent = True
        return fill_up(self._lines.popleft())

    def clear(self) -> list[bytes]:
        """Everything that waits, as it was in the send queue."""
        lines = list(self._lines)
        self._lines.clear()
        self.due = None
        return lines


def spacing(waiting: int, *, more: bool) -> float:
    """Seconds to the next of so many objects; `more`: the send queue holds still more."""
    least, most = SPACING
    return least if more else min(most, max(least, BACKLOG_TIME / max(1, waiting)))


def fill_up(line: bytes) -> bytes:
    """A line with white space before its end, so that its size is a multiple of `UNIT`."""
    return line[:-1].ljust(-(-len(line) // UNIT) * UNIT - 1) + b"\n"


def first_version_lines(items: Sequence[QueueItem]) -> list[bytes]:
    """What the send queue of a first-version client held, a line each."""
    lines: list[bytes] = []
    for item in items:
        lines += (item,) if isinstance(item, bytes) else item.first_version_lines
    return lines
