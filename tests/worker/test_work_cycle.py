"""The pure part of a worker: what it does next."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus import Backoff, WorkStatistics
from catbus.worker.work_cycle import COALESCE_PAUSE, FIRST_PAUSE, POSTPONE, REJECT, Turn, WorkCycle, clean_reason

NOW = datetime.now(UTC)
IDLE = [(None, None, None, None, None, None, False)]
FAR = [(*IDLE[0][:6], True)]


def make_cycle(batch: int | None = None, attempts: int | None = 3, poll: float = 1.0, most: float = 60.0) -> WorkCycle:
    backoff = Backoff(1.0, most, jitter=0.5)
    return WorkCycle("c", WorkStatistics(), batch=batch, attempts=attempts, backoff=backoff, poll=poll)


def rows(*seqs: int, attempt: int = 1) -> list[tuple[object, ...]]:
    return [(seq, "a.x", "1", NOW, None, attempt, None) for seq in seqs]


@dataclass
class Partition:
    """What PostgreSQL does, for one partition: catbus.receive with attempts, postpone, reject, and a rollback."""

    messages: list[int]
    cursor: int = 0
    alone: int = 0
    counter: tuple[int, int] = (0, 0)
    postponed_until: float = 0.0
    dead: list[int] = field(default_factory=list)

    def receive(self, batch: int, now: float) -> tuple[list[tuple[object, ...]], int]:
        """The rows, and the cursor after a commit."""
        found = [seq for seq in self.messages if seq > self.cursor][:batch]
        if not found or now < self.postponed_until:
            return IDLE, self.cursor
        tries = 0
        if self.counter[0] == found[0]:
            tries = self.counter[1]
            self.alone = max(self.alone, found[-1])
        if found[0] <= self.alone:
            found = found[:1]
        tries = tries + 1 if len(found) == 1 else 0
        self.counter = found[0], tries
        return rows(*found, attempt=max(tries, 1)), found[-1]


@given(
    batch=st.integers(1, 5),
    attempts=st.integers(1, 3),
    always=st.sets(st.integers(1, 9)),
    sometimes=st.dictionaries(st.integers(1, 9), st.integers(1, 3)),
    crashes=st.sets(st.integers(0, 30)),
)
def test_each_message_is_processed_in_order_or_rejected_after_its_own_attempts(
    batch: int, attempts: int, always: set[int], sometimes: dict[int, int], crashes: set[int]
) -> None:
    """Some messages fail always, some as often as given, and some transactions end without a word."""
    cycle = make_cycle(batch, attempts)
    partition = Partition([*range(1, 10)])
    processed: list[int] = []
    alone: dict[int, int] = {}
    now, number = 0.0, 0
    while partition.cursor < 9:
        found, upto = partition.receive(batch, now)
        turn = cycle.begin(found)
        seqs = [message.seq for message in turn.messages]
        number += 1
        assert number < 500
        if not seqs:
            cycle.end(turn, now)
            pause = cycle.pause(now)
            assert 0 <= pause <= 1.0
            # A postponed message is not slept over.
            assert now + pause <= max(partition.postponed_until, now + FIRST_PAUSE)
            now += pause + COALESCE_PAUSE
            continue
        if turn.statement is None:
            if len(seqs) == 1:
                alone[seqs[0]] = alone.get(seqs[0], 0) + 1
            if number in crashes:
                continue
            failing = [seq for seq in seqs if seq in always or sometimes.get(seq, 0) > 0]
            if failing:
                sometimes[failing[0]] = sometimes.get(failing[0], 0) - 1
                turn.fail("broken", 0.0)
        if turn.statement is None:
            processed += seqs
            partition.cursor = upto
        elif turn.statement.sql == REJECT:
            assert len(seqs) == 1
            assert alone[seqs[0]] >= attempts
            partition.dead += seqs
            partition.cursor = upto
        else:
            _, delay, _ = turn.statement.arguments
            assert (delay == 0.0) == (len(seqs) > 1)
            partition.alone = max(partition.alone, upto)
            partition.postponed_until = now + float(str(delay))
        cycle.end(turn, now)
    assert processed == sorted(set(processed))
    assert sorted(processed + partition.dead) == partition.messages
    assert all(count <= attempts for count in alone.values())
    assert always <= set(partition.dead)
    assert (cycle.statistics.processed, cycle.statistics.dead_letters) == (len(processed), len(partition.dead))


def fail(cycle: WorkCycle, *seqs: int, attempt: int = 1, chance: float = 0.0) -> Turn:
    turn = cycle.begin(rows(*seqs, attempt=attempt))
    turn.fail("broken", chance)
    return turn


def test_pauses_of_a_failing_message_grow_with_jitter_up_to_the_bound() -> None:
    cycle = make_cycle(attempts=None, most=5.0)
    assert [fail(cycle, 1, attempt=n).delay for n in (1, 2, 3, 4, 900)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert fail(cycle, 1, attempt=2, chance=1.0).delay == 1.0


def test_several_messages_are_tried_again_at_once_and_never_rejected() -> None:
    turn = fail(make_cycle(batch=9, attempts=1), 1, 2)
    assert turn.statement == (POSTPONE, ("c", 0.0, "broken"))


def test_message_becomes_a_dead_letter_after_its_last_attempt_with_the_reason() -> None:
    assert fail(make_cycle(), 7, attempt=2).rejected is None
    assert fail(make_cycle(), 7, attempt=3).statement == (REJECT, ("c", 7, "broken"))


def test_message_whose_attempts_ended_without_a_word_is_rejected_before_it_is_handled() -> None:
    assert make_cycle().begin(rows(7, attempt=3)).statement is None
    turn = make_cycle().begin(rows(7, attempt=4))
    assert turn.statement == (REJECT, ("c", 7, "3 attempts have not ended with a commit"))


def test_pauses_grow_while_nothing_is_found_and_begin_again_after_a_message() -> None:
    cycle = make_cycle(poll=0.1)
    idle = [cycle.pause(0.0) for _ in range(5)]
    assert idle == [0.02, 0.04, 0.08, 0.1, 0.1]
    cycle.end(cycle.begin(rows(1)), 0.0)
    assert cycle.pause(0.0) == FIRST_PAUSE


def test_worker_that_is_far_behind_looks_on_without_a_pause() -> None:
    cycle = make_cycle()
    for _ in range(3):
        cycle.end(cycle.begin(FAR), 0.0)
        assert cycle.pause(0.0) == 0.0
    cycle.end(cycle.begin(IDLE), 0.0)
    assert cycle.pause(0.0) == FIRST_PAUSE


def test_pauses_before_the_next_connection_grow_until_a_transaction_is_committed() -> None:
    cycle = make_cycle()
    assert [cycle.lost(0.0) for _ in range(9)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    cycle.end(cycle.begin(IDLE), 0.0)
    assert cycle.lost(0.0) == 0.5
    assert cycle.statistics.reconnects == 10


def test_progress_is_reported_once_a_minute_while_messages_are_processed() -> None:
    cycle = make_cycle()
    reports = []
    for now in range(0, 300, 10):
        if now < 150:
            cycle.end(cycle.begin(rows(now + 1)), float(now))
        if (report := cycle.report(float(now))) is not None:
            reports.append((now, report["processed"]))
    assert reports == [(60, 7), (120, 13), (180, 15)]


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_reason_is_text_that_postgresql_takes(reason: str) -> None:
    cleaned = clean_reason(reason)
    assert "\0" not in cleaned
    assert len(cleaned.encode()) <= 4000


@pytest.mark.parametrize("options", [{"batch": 0}, {"batch": 10_001}, {"attempts": 0}, {"poll": 0.0}])
def test_wrong_options_are_rejected(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make_cycle(**options)
