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
def test_tokens_taken_in_any_period_are_at_most_rate_and_burst(
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


def test_debt_is_refilled_before_tokens_are_given() -> None:
    bucket = TokenBucket(2, 10, 0)
    bucket.spend(16)
    assert bucket.level(0) == -6
    assert not bucket.take(1, 3)
    assert bucket.take(2, 4)
    assert bucket.level(100) == 10


def test_charge_returns_when_nothing_is_owed() -> None:
    bucket = TokenBucket(2, 10, 0)
    assert bucket.charge(10, 0) == 0
    assert bucket.charge(6, 0) == 3
    assert bucket.charge(0, 1) == 2
    assert bucket.charge(0, 3) == 0
