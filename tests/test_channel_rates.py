"""catbus.delivery.channel_rates"""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from catbus.delivery.channel_rates import INTERVAL, INTERVALS, ChannelCounts, ChannelRates
from catbus.log import Entry


def entries(*channels: str) -> list[Entry]:
    return [Entry(0, 0, channel, b"1") for channel in channels]


def test_messages_are_counted_by_channel_and_the_busiest_comes_first() -> None:
    rates = ChannelRates()
    rates.advance(100.0)
    rates.count(entries("a", "b", "b"))
    rates.count(entries("b", "c", "c"))
    assert rates.report(103.0, 2) == ChannelCounts(3.0, 6, 0, [("b", 3), ("c", 2)])


def test_messages_older_than_a_minute_are_forgotten() -> None:
    rates = ChannelRates()
    rates.advance(0.0)
    rates.count(entries("old"))
    for second in range(1, 121):
        rates.count(entries("each"))
        rates.advance(float(second))
    report = rates.report(120.0, 10)
    assert report.seconds == INTERVAL * INTERVALS
    assert report.channels == [("each", report.total)]
    assert report.total == INTERVAL * INTERVALS


@given(st.lists(st.lists(st.integers(0, 30), max_size=40), max_size=20), st.integers(1, 5))
def test_counts_are_within_their_bounds_and_memory_is_bounded(batches: list[list[int]], most: int) -> None:
    """A count is never too high, and too low by `missed` at most; no channel that was left out had more than that."""
    rates = ChannelRates(most)
    true: Counter[str] = Counter()
    for number, batch in enumerate(batches):
        channels = [f"c{each}" for each in batch]
        rates.count(entries(*channels))
        true.update(channels)
        assert len(rates._present.counts) <= 2 * most
        rates.advance(number * INTERVAL / 4)
    report = rates.report(0.0, 1000)
    counted = dict(report.channels)
    assert report.total == sum(true.values())
    assert report.missed <= report.total / most
    assert all(true[channel] - report.missed <= count <= true[channel] for channel, count in counted.items())
    assert all(number <= report.missed for channel, number in true.items() if channel not in counted)
