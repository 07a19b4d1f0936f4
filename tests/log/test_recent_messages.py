"""The ring of recent messages, compared with a list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.log import Entry, RecentMessages
from catbus.log.recent_messages import ENTRY_OVERHEAD


def entry(seq: int, size: int = 10) -> Entry:
    return Entry(seq, 0, "a", b"x" * (size - 1))


def weight(entries: list[Entry]) -> int:
    return sum(ENTRY_OVERHEAD + len(e.channel) + len(e.payload) for e in entries)


@given(
    limit=st.integers(0, 20_000),
    begin=st.integers(0, 1000),
    batches=st.lists(st.lists(st.integers(1, 2000), min_size=1, max_size=20), max_size=20),
    data=st.data(),
)
def test_ring_holds_the_newest_messages_that_fit(
    limit: int, begin: int, batches: list[list[int]], data: st.DataObject
) -> None:
    recent, everything, dropped = RecentMessages(limit, begin), list[Entry](), 0
    for sizes in batches:
        batch = [entry(begin + len(everything) + 1 + i, size) for i, size in enumerate(sizes)]
        everything.extend(batch)
        dropped += recent.append(batch)
        held = everything[dropped:]
        assert weight(held) == recent.size <= limit
        assert not dropped or weight(everything[dropped - 1 :]) > limit or weight(held) + len(batch) > 0
        assert len(recent) == len(held)
        assert recent.first == begin + dropped + 1
        assert recent.last == begin + len(everything)
        for one in held:
            assert recent[one.seq] is one

    after = data.draw(st.integers(begin, begin + len(everything) + 3))
    rows, size = data.draw(st.integers(1, 50)), data.draw(st.integers(0, 5000))
    page = recent.since(after, rows, size)
    if after < recent.first - 1:
        assert page is None
        return
    assert page is not None
    expected: list[Entry] = []
    for one in everything[after - begin :][:rows]:
        size -= len(one.channel) + len(one.payload)
        if size < 0 and expected:
            break
        expected.append(one)
    assert page.after == after
    assert list(page.entries) == expected
    assert page.last == (expected[-1].seq if expected else after)


def test_ring_drops_no_more_than_it_must() -> None:
    recent = RecentMessages(3 * (ENTRY_OVERHEAD + 10))
    assert recent.append([entry(1), entry(2), entry(3)]) == 0
    assert recent.append([entry(4)]) == 1
    assert recent.append([entry(5), entry(6)]) == 2
    assert recent.first == 4


def test_ring_returns_the_messages_that_it_drops() -> None:
    recent = RecentMessages(100 * (ENTRY_OVERHEAD + 10))
    for seq in range(1, 10_001):
        recent.append([entry(seq)])
    assert len(recent) == 100
    assert len(recent._entries) < 110


def test_ring_does_not_return_messages_that_it_does_not_hold() -> None:
    recent = RecentMessages(1000, 5)
    recent.append([entry(6)])
    for seq in (5, 7):
        with pytest.raises(IndexError):
            recent[seq]


def test_ring_continues_after_a_clear() -> None:
    recent = RecentMessages(1000)
    recent.append([entry(1)])
    recent.clear(40)
    assert (recent.first, recent.last, len(recent), recent.size) == (41, 40, 0, 0)
    assert recent.since(39, 10, 100) is None
    recent.append([entry(41)])
    page = recent.since(40, 10, 100)
    assert page is not None
    assert [e.seq for e in page.entries] == [41]
