"""The log tail, with entries in any order: each is delivered once and in order, and missing ones are requested."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from catbus.log import Entry, LogPage, RecentMessages
from catbus.postgres.follow.log_tail import LogTail
from tests.log.harness import RecordingFollower


def stretch(first: int, last: int) -> list[Entry]:
    return [Entry(seq, 0, "a", b"%d" % seq) for seq in range(first, last + 1)]


def open_tail(applied: int = 0) -> tuple[LogTail, RecordingFollower]:
    tail, follower = LogTail(RecentMessages(1 << 20)), RecordingFollower()
    tail.follow(follower)
    tail.restart("e", applied, 1)
    tail.trust()
    return tail, follower


LAST = 60
pieces = st.tuples(st.integers(1, LAST), st.integers(0, 9)).map(lambda p: (p[0], min(LAST, p[0] + p[1])))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), pieces),
        st.tuples(st.just("announce"), pieces),
        st.tuples(st.just("expect"), pieces),
        st.tuples(st.just("resolve"), st.just((0, 0))),
        st.tuples(st.just("read"), st.integers(1, 10).map(lambda n: (n, n))),
    ),
    max_size=40,
)


@given(steps)
def test_entries_are_delivered_once_and_in_order_however_they_arrive(steps: list[tuple[str, tuple[int, int]]]) -> None:
    tail, follower = open_tail()
    known = expected = 0

    def read(rows: int) -> None:
        gap = tail.missing()
        assert gap is not None
        after, last = gap
        page = stretch(after + 1, min(last, after + rows))
        tail.fill(LogPage(after, page[-1].seq, page), tail.generation)

    for step, (first, last) in steps:
        match step:
            case "offer":
                tail.offer(stretch(first, last))
                known = max(known, last)
            case "announce":
                tail.announce(last)
                known = max(known, last)
            case "expect":
                tail.expect(last)
                expected = max(expected, last)
            case "resolve":
                tail.resolve()
                known = max(known, expected)
            case "read" if tail.missing() is not None:
                read(first)
        # The recorder has checked that nothing was skipped or repeated.
        assert follower.applied == tail.applied <= known
        assert tail.announced == known
        assert (tail.missing() is None) == (tail.applied == known)
        assert tail.recent.last == tail.applied
    while tail.missing() is not None:
        read(10)
    assert tail.applied == known
    assert [entry.seq for entry in follower.entries] == list(range(1, known + 1))


def test_only_entries_missing_before_an_own_batch_are_read() -> None:
    tail, follower = open_tail()
    tail.offer(stretch(11, 20))
    assert tail.missing() == (0, 10)
    tail.offer(stretch(26, 30))
    tail.fill(LogPage(0, 10, stretch(1, 10)), tail.generation)
    assert follower.applied == 20
    assert tail.missing() == (20, 25)
    assert tail.jumps == 1


def test_page_of_another_generation_is_ignored() -> None:
    tail, follower = open_tail()
    tail.announce(10)
    generation = tail.generation
    tail.restart("other", 5, 1)
    tail.fill(LogPage(0, 10, stretch(1, 10)), generation)
    assert follower.entries == []
    assert (tail.applied, tail.announced, tail.missing()) == (5, 5, None)


def test_false_announcement_is_forgotten() -> None:
    tail, _ = open_tail(3)
    tail.announce(99)
    assert tail.missing() == (3, 99)
    tail.fill(LogPage(3, 3, ()), tail.generation)
    assert tail.missing() is None


def test_follower_learns_where_the_tail_continues_after_retention() -> None:
    tail, follower = open_tail()
    tail.announce(20)
    tail.fill(LogPage(15, 18, stretch(16, 18)), tail.generation)
    assert follower.restarts == [0, 15]
    assert follower.applied == 18
    assert tail.missing() == (18, 20)


def test_waiting_entries_are_dropped_when_the_log_is_not_trusted() -> None:
    tail, follower = open_tail()
    tail.offer(stretch(2, 3))
    tail.distrust()
    tail.trust()
    assert tail.missing() == (0, 3)
    tail.fill(LogPage(0, 1, stretch(1, 1)), tail.generation)
    assert follower.texts == ["1"]
    assert tail.missing() == (1, 3)


def test_nothing_that_was_sent_or_read_before_an_erasure_is_applied_after_it() -> None:
    tail, follower = open_tail()
    tail.offer(stretch(1, 3))
    tail.offer(stretch(7, 8))
    generation = tail.generation
    assert tail.begin_erasure(10) == 1
    # Neither a notification that waited, nor one that comes later, nor a page, nor the reply to an append.
    tail.offer(stretch(9, 10))
    tail.offer(stretch(4, 6))
    tail.fill(LogPage(3, 6, stretch(4, 6)), generation)
    assert follower.applied == 3
    assert tail.generation != generation
    assert tail.missing() == (3, 10)
    tail.fill(LogPage(3, 10, stretch(4, 10)), tail.generation)
    assert follower.applied == 10
    for _ in tail.erase({2, 5}):
        assert [tail.recent[seq].channel for seq in (1, 2, 5, 6)] == ["a", "_erased", "_erased", "a"]
    assert follower.erased == {2, 5}
    tail.offer(stretch(11, 12))
    assert follower.applied == 12
