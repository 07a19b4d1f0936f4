"""What `catbus bench` has measured: counts, latencies, and what is missing. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ..observability.histogram import Histogram
from .text_tables import format_table

_BOUNDS = tuple(1e-5 * 1.05**step for step in range(330))
"""Upper bounds in seconds, from 10 us to 95 s, in steps of 5 %."""
PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_ROWS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the rows of a printed histogram, in seconds."""
_BAR = 40
"""Characters of its longest bar."""


class Latencies:
    """Times in seconds, of which their distribution is kept."""

    def __init__(self) -> None:
        self.histogram = Histogram(_BOUNDS)
        self.largest = 0.0

    def observe(self, seconds: float) -> None:
        self.histogram.observe(seconds)
        self.largest = max(self.largest, seconds)

    def percentile(self, percent: float) -> float | None:
        """The time that so many percent do not exceed, at most 5 % too high. None without times."""
        wanted = self.histogram.count * percent / 100
        if not self.histogram.count:
            return None
        for bound, count in zip(_BOUNDS, accumulate(self.histogram.counts), strict=False):
            if count >= wanted:
                return min(bound, self.largest)
        return self.largest

    def rows(self) -> Iterator[tuple[str, int]]:
        """Yield the ranges of the printed histogram with their counts, from the first to the last that has any."""
        counts = [0] * (len(_ROWS) + 1)
        for bound, count in zip((*_BOUNDS, float("inf")), self.histogram.counts, strict=True):
            counts[next((row for row, upper in enumerate(_ROWS) if bound <= upper * 1.05), len(_ROWS))] += count
        names = [f"up to {upper * 1000:g} ms" for upper in _ROWS] + [f"over {_ROWS[-1] * 1000:g} ms"]
        filled = [row for row, count in enumerate(counts) if count]
        for row in range(filled[0], filled[-1] + 1) if filled else ():
            yield names[row], counts[row]


@dataclass
class Receipts:
    """What one subscriber has received of one channel, whose messages are numbered from 0."""

    received: set[int] = field(default_factory=set)
    repeated: int = 0
    disordered: int = 0
    newest_seq: int = -1

    def note(self, number: int, seq: int | None) -> None:
        """Note a message. Ephemeral ones have no seq, and no order."""
        self.repeated += number in self.received
        self.received.add(number)
        if seq is not None:
            self.disordered += seq < self.newest_seq
            self.newest_seq = max(self.newest_seq, seq)


@dataclass
class LoadReport:
    """The result of a run. Latencies are from the time for which a publish was scheduled."""

    seconds: float
    """From the first scheduled publish to the last delivery."""
    published: int
    delivered: int
    lost: int
    """Deliveries that did not come."""
    repeated: int
    disordered: int
    rejected: dict[str, int]
    """Publishes that were rejected, by their code."""
    acknowledged: Latencies
    delivery: Latencies
    durable: bool

    @property
    def kept_promises(self) -> bool:
        """Whether nothing was lost, repeated, or out of order. An ephemeral message may be lost."""
        return not (self.repeated or self.disordered or (self.lost and self.durable) or self.rejected)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types, with times in seconds."""
        return {
            "seconds": self.seconds,
            "published": self.published,
            "delivered": self.delivered,
            "published_per_second": self.published / self.seconds,
            "delivered_per_second": self.delivered / self.seconds,
            "lost": self.lost,
            "repeated": self.repeated,
            "disordered": self.disordered,
            "rejected": self.rejected,
            "acknowledgement_seconds": _percentiles(self.acknowledged),
            "delivery_seconds": _percentiles(self.delivery),
        }

    def lines(self) -> Iterator[str]:
        """Yield it as text for people."""
        rates = [
            (name, f"{count:,}", f"{count / self.seconds:,.1f}")
            for name, count in (("published", self.published), ("delivered", self.delivered))
        ]
        yield from format_table(("", "messages", "per second"), rates)
        yield ""
        columns = ("latency in ms", *(f"p{percent:g}" for percent in PERCENTILES), "max")
        times = [("publish to acknowledgement", self.acknowledged), ("publish to delivery", self.delivery)]
        rows = [(name, *map(_milliseconds, _percentiles(each).values())) for name, each in times]
        yield from format_table(columns, rows)
        yield ""
        most = max((count for _, count in self.delivery.rows()), default=0)
        for name, count in self.delivery.rows():
            yield f"  {name:>14}  {'#' * round(count / most * _BAR):<{_BAR}}  {count:,}"
        yield ""
        yield f"  {self.lost:,} lost, {self.repeated:,} repeated, {self.disordered:,} out of order"
        for code, count in sorted(self.rejected.items()):
            yield f"  {count:,} publishes rejected: {code}"


def _percentiles(latencies: Latencies) -> dict[str, float | None]:
    found = {f"p{percent:g}": latencies.percentile(percent) for percent in PERCENTILES}
    return {**found, "max": latencies.largest if latencies.histogram.count else None}


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.2f}"
