"""The token bucket against sums over all of its time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from catbus.limits.token_bucket import TokenBucket


@given(
    st.integers(1, 50),
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 60)), max_size=40),
)
def test_no_more_is_taken_in_any_time_than_its_rate_and_a_burst(
    rate: int, burst: int, steps: list[tuple[int, int]]
) -> None:
    bucket, now = TokenBucket(rate, burst, 0), 0
    taken: list[tuple[int, int]] = []
    for wait, tokens in steps:
        now += wait
        before = bucket.level(now)
        if bucket.take(tokens, now):
            taken.append((now, tokens))
            assert bucket.level(now) == before - tokens >= 0
        else:
            assert before < tokens
    for index, (since, _) in enumerate(taken):
        for until, _ in taken[index:]:
            assert sum(tokens for at, tokens in taken if since <= at <= until) <= burst + rate * (until - since)


def test_what_was_spent_beyond_what_there_was_has_to_come_again_first() -> None:
    bucket = TokenBucket(2, 10, 0)
    bucket.spend(16)
    assert bucket.level(0) == -6
    assert not bucket.take(1, 3)
    assert bucket.take(2, 4)
    assert bucket.level(100) == 10


def test_what_is_charged_says_when_nothing_is_owed_any_more() -> None:
    bucket = TokenBucket(2, 10, 0)
    assert bucket.charge(10, 0) == 0
    assert bucket.charge(6, 0) == 3
    assert bucket.charge(0, 1) == 2
    assert bucket.charge(0, 3) == 0
