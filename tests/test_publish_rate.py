"""catbus.limits.publish_rate: the rate limit of each client."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.limits import publish_rate
from catbus.limits.publish_rate import PublishRateLimit, PublishRateLimits


def test_burst_of_one_second_is_free_and_then_the_rate_applies() -> None:
    some = PublishRateLimit(10, 1000, 5.0)
    assert [some.spend(1, 10, 5.0) for _ in range(11)] == [0.0] * 10 + [0.1]
    assert some.spend(0, 0, 5.0) == 0.1
    assert some.spend(0, 0, 5.1) == pytest.approx(0)


def test_bytes_are_limited_besides_messages() -> None:
    some = PublishRateLimit(10, 1000, 0.0)
    assert some.spend(1, 5000, 0.0) == 4.0
    assert some.spend(0, 0, 3.0) == 1.0
    assert some.spend(0, 0, 4.0) == 0.0


@given(st.integers(1, 50), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40)), max_size=40))
def test_client_that_waits_as_told_keeps_to_its_rate(rate: int, steps: list[tuple[int, int]]) -> None:
    limit, now, spent = PublishRateLimit(rate, 1 << 40, 0.0), 0.0, 0
    for pause, messages in steps:
        now += pause
        spent += messages
        now += limit.spend(messages, 0, now)
        assert spent <= rate * (now + 1) + 1e-6


def test_sessions_of_a_client_share_its_limit() -> None:
    some = PublishRateLimits(10, 1000)
    assert some.get("a", 0.0) is some.get("a", 1.0)
    assert some.get("a", 0.0) is not some.get("b", 0.0)
    assert some.new(0.0) is not some.new(0.0)


def test_idle_clients_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_rate, "MAX_REMEMBERED", 3)
    some = PublishRateLimits(10, 1000)
    quick = some.get("quick", 0.0)
    quick.spend(30, 0, 0.0)
    for client in "xy":
        some.get(client, 0.0).spend(1, 0, 0.0)
    some.get("z", 1.0)
    del quick
    assert some.get("quick", 1.0).spend(0, 0, 1.0) > 0, "it still owes what it has published"


def test_client_with_a_session_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_rate, "MAX_REMEMBERED", 3)
    some = PublishRateLimits(10, 1000)
    held = some.get("held", 0.0)
    for number in range(100):
        some.get(number, 5.0)
    assert some.get("held", 5.0) is held


def test_forgetting_a_busy_client_looks_at_few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    is_full = PublishRateLimit.is_full

    def counted(limit: PublishRateLimit, now: float) -> bool:
        nonlocal looks
        looks += 1
        return is_full(limit, now)

    monkeypatch.setattr(PublishRateLimit, "is_full", counted)
    monkeypatch.setattr(publish_rate, "MAX_REMEMBERED", 1000)
    some = PublishRateLimits(10, 1000)
    for network in range(3000):
        some.get(("token", network), 0.0).spend(1, 0, 0.0)
    assert looks <= 8 * 2000
