"""How many messages each channel had lately, in bounded memory. Pure: no I/O, no clock."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from operator import itemgetter

from ..log import Entry

INTERVAL = 10.0
"""Seconds of messages that are counted together."""
INTERVALS = 6
"""Finished intervals that are kept."""
MAX_CHANNELS = 500
"""Channels that an interval keeps at least, when it has had more. It has up to twice as many at times."""


@dataclass(frozen=True, slots=True)
class ChannelCounts:
    """Messages by channel over the last `seconds`, the busiest channel first.

    `total` counts the messages of all channels. Each count is too low by `missed` at most, and a channel that is not
    here had no more than `missed` messages.
    """

    seconds: float
    total: int
    missed: int
    channels: Sequence[tuple[str, int]]


class _Interval:
    """The counts of one interval, which began at the time `began`, or at an unknown one."""

    __slots__ = ("began", "counts", "missed", "total")

    def __init__(self, began: float | None) -> None:
        self.began = began
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.total = self.missed = 0


class ChannelRates:
    """Counts the messages of the last minute by channel. The busiest channels are known, however many there are.

    When an interval has too many channels, the count of the largest one that does not fit is subtracted from all
    (Misra and Gries, 1982; merged as by Agarwal and others, 2012). So with `n` messages, a count is too low by
    n / `most` at most, and memory does not grow with the number of channels that clients invent.
    """

    def __init__(self, most: int = MAX_CHANNELS) -> None:
        self._most = most
        self._present = _Interval(None)
        self._finished: deque[_Interval] = deque(maxlen=INTERVALS)

    def clear(self) -> None:
        """Forget all channels: the names of some may not be kept any longer."""
        self._present = _Interval(self._present.began)
        self._finished.clear()

    def count(self, entries: Sequence[Entry]) -> None:
        """Count messages."""
        present = self._present
        counts = present.counts
        for entry in entries:
            counts[entry.channel] += 1
        present.total += len(entries)
        if len(counts) > 2 * self._most:
            self._shrink(present)

    def _shrink(self, interval: _Interval) -> None:
        """Keep the channels with the largest counts."""
        largest = sorted(interval.counts.values(), reverse=True)
        subtracted = largest[self._most]
        kept = {channel: count - subtracted for channel, count in interval.counts.items() if count > subtracted}
        interval.counts = defaultdict(int, kept)
        interval.missed += subtracted

    def advance(self, now: float) -> None:
        """Begin another interval if the present one is over. Call it at the start, and then about once a second."""
        if self._present.began is None:
            self._present.began = now
        elif now - self._present.began >= INTERVAL:
            self._finished.append(self._present)
            self._present = _Interval(now)

    def report(self, now: float, limit: int) -> ChannelCounts:
        """Return the counts of the `limit` busiest channels of the last minute, or since the start."""
        intervals = [*self._finished, self._present]
        began = intervals[0].began
        counts: Counter[str] = Counter()
        for interval in intervals:
            counts.update(interval.counts)
        busiest = nlargest(limit, counts.items(), key=itemgetter(1))
        return ChannelCounts(
            seconds=0.0 if began is None else now - began,
            total=sum(interval.total for interval in intervals),
            missed=sum(interval.missed for interval in intervals),
            channels=busiest,
        )
