"""Spacing of the objects that a first-version client gets over WebTransport, one at a time. Pure.

Such a client takes the result of one read of its stream for one object, and a read in a browser returns everything that
has arrived, up to the end of a ring buffer. So each object is sent a little after the one before was acknowledged, when
the page has read it. The size of each is a multiple of `UNIT`, so that no object of up to one `UNIT` lies across the
end of the buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ...delivery.encoded_messages import QueueItem
from ...delivery.send_queue import SendQueue

SPACING = 0.025, 0.1
"""Minimum and maximum seconds from the acknowledgement of an object to the next object."""
BACKLOG_TIME = 1.0
"""Seconds in which all waiting objects are sent, as far as `SPACING` allows."""
UNIT = 1024
"""Bytes. One unit fits into a packet, and a browser's buffer of 64 KiB is a multiple of it."""
TAKE_SIZE = 65_536
"""Bytes taken from the send queue at a time, approximately."""


class ObjectSpacer:
    """The lines that were taken from the send queue of one client and are not sent yet."""

    __slots__ = ("_lines", "_sent", "_until", "next_send_time")

    def __init__(self) -> None:
        self.next_send_time: float | None = None
        """The time of the next object if it needs no acknowledgement, else None."""
        self._lines: deque[bytes] = deque()
        self._sent = False
        """Whether an object was sent whose acknowledgement has not been seen."""
        self._until = 0.0
        """The time from which the next object may be sent."""

    def __bool__(self) -> bool:
        """Whether lines wait to be sent."""
        return bool(self._lines)

    def next_object(self, send_queue: SendQueue, now: float) -> bytes:
        """Return the next object, padded, if it may be sent now, else b"". Call it when nothing is unacknowledged."""
        self.next_send_time = None
        if not self._lines:
            self._lines.extend(first_version_lines(send_queue.take(TAKE_SIZE)))
        if self._sent:
            self._sent, self._until = False, now + spacing(len(self._lines), more=bool(send_queue))
        if not self._lines:
            return b""
        if now < self._until:
            self.next_send_time = self._until
            return b""
        self._sent = True
        return pad_object(self._lines.popleft())

    def clear(self) -> list[bytes]:
        """Remove and return all waiting lines, without padding."""
        lines = list(self._lines)
        self._lines.clear()
        self.next_send_time = None
        return lines


def spacing(waiting: int, *, more: bool) -> float:
    """Return the seconds to the next of `waiting` objects. `more` says whether the send queue is not empty."""
    least, most = SPACING
    return least if more else min(most, max(least, BACKLOG_TIME / max(1, waiting)))


def pad_object(line: bytes) -> bytes:
    """Pad a line with spaces before its end, so that its size is a multiple of `UNIT`."""
    return line[:-1].ljust(-(-len(line) // UNIT) * UNIT - 1) + b"\n"


def first_version_lines(items: Sequence[QueueItem]) -> list[bytes]:
    """Return the lines of items from the send queue of a first-version client."""
    lines: list[bytes] = []
    for item in items:
        lines += (item,) if isinstance(item, bytes) else item.first_version_lines
    return lines
