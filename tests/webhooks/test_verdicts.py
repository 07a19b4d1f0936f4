"""What follows from attempts: retries, dead letters, pauses."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.webhooks.verdicts import (
    LONGEST_DELAY,
    LONGEST_RETRY_AFTER,
    WHOLE_ATTEMPTS,
    Action,
    AttemptResult,
    Outcome,
    backoff,
    judge,
    read_response,
    read_retry_after,
)

NOW = 1796082880.5
FAILURE = AttemptResult(Outcome.REJECTED, "500")


def date(offset: float) -> str:
    return format_datetime(datetime.fromtimestamp(NOW + offset, UTC), usegmt=True)


@pytest.mark.parametrize(
    ("status", "headers", "outcome", "wait"),
    [
        (200, {}, Outcome.DELIVERED, 0),
        (204, {"retry-after": "5"}, Outcome.DELIVERED, 0),
        (299, {}, Outcome.DELIVERED, 0),
        (199, {}, Outcome.REJECTED, 0),
        (300, {}, Outcome.REJECTED, 0),
        (301, {"location": "https://example.com"}, Outcome.REJECTED, 0),
        (307, {}, Outcome.REJECTED, 0),
        (400, {}, Outcome.REJECTED, 0),
        (404, {}, Outcome.REJECTED, 0),
        (410, {}, Outcome.GONE, 0),
        (429, {}, Outcome.THROTTLED, 0),
        (429, {"retry-after": "7"}, Outcome.THROTTLED, 7),
        (500, {"retry-after": "7"}, Outcome.REJECTED, 0),
        (503, {}, Outcome.REJECTED, 0),
        (503, {"retry-after": "x"}, Outcome.REJECTED, 0),
        (503, {"retry-after": "7"}, Outcome.THROTTLED, 7),
    ],
)
def test_status_decides(status: int, headers: dict[str, str], outcome: Outcome, wait: float) -> None:
    found = read_response(status, headers, NOW)
    assert (found.outcome, found.retry_after) == (outcome, wait)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        (" 120 ", 120),
        ("99999999999999999999999", None),
        ("999999999", LONGEST_RETRY_AFTER),
        ("-1", None),
        ("1.5", None),
        ("٣", None),
        ("", None),
        ("soon", None),
        (date(60), 59.5),
        (date(-60), 0),
        (date(86400), LONGEST_RETRY_AFTER),
        ("Sun, 99 Nov 99999 08:49:37 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float | None) -> None:
    found = read_retry_after(value, NOW)
    assert found is None if seconds is None else found == pytest.approx(seconds)


@given(st.text(max_size=40))
def test_any_text_is_a_valid_retry_after_or_none(value: str) -> None:
    found = read_retry_after(value, NOW)
    assert found is None or 0 <= found <= LONGEST_RETRY_AFTER


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_backoff_doubles_up_to_a_bound_with_jitter(failures: int, fraction: float) -> None:
    whole = min(2.0 ** min(failures - 1, 40), LONGEST_DELAY)
    assert whole / 2 <= backoff(failures, fraction) <= whole


@given(st.integers(1, 200), st.integers(0, 400), st.integers(1, 30))
def test_message_that_always_fails_becomes_a_dead_letter_alone(size: int, poison: int, attempts: int) -> None:
    """Its neighbours are delivered, all in order, and the number of attempts is bounded."""
    waiting, delivered, dead, tries = [*range(size)], [], [], 0
    batch, failures = [*waiting], 0
    while waiting:
        tries += 1
        result = FAILURE if poison in batch else AttemptResult(Outcome.DELIVERED, "")
        verdict = judge(result, size=len(batch), failures=failures, attempts=attempts, fraction=0.5)
        failures = failures + verdict.counted
        if verdict.action is Action.RETRY:
            assert failures < WHOLE_ATTEMPTS or verdict.take < len(batch) or len(batch) == 1
            batch = batch[: verdict.take]
            continue
        done, failures = (batch, 0) if verdict.action is Action.DELIVERED else (batch[:1], 0)
        if verdict.action is Action.REJECT:
            assert len(batch) == 1
            dead += done
        else:
            delivered += done
        waiting = waiting[len(done) :]
        batch = [*waiting]
    assert delivered == [seq for seq in range(size) if seq != poison]
    assert dead == [seq for seq in [poison] if seq < size]
    assert tries <= 8 * (8 + WHOLE_ATTEMPTS) + attempts


def test_message_gets_all_of_its_attempts() -> None:
    verdicts = [judge(FAILURE, size=1, failures=failures, attempts=4, fraction=0) for failures in range(4)]
    assert [verdict.action for verdict in verdicts] == [*[Action.RETRY] * 3, Action.REJECT]


@given(st.integers(1, 100), st.integers(0, 100), st.floats(0, 3600), st.floats(0, 1))
def test_receiver_that_asks_to_wait_loses_nothing(size: int, failures: int, wait: float, fraction: float) -> None:
    result = AttemptResult(Outcome.THROTTLED, "429", wait)
    verdict = judge(result, size=size, failures=failures, attempts=1, fraction=fraction)
    assert (verdict.action, verdict.take, verdict.counted) == (Action.RETRY, size, False)
    assert verdict.delay >= max(wait, 0.5)


def test_receiver_that_is_gone_pauses_the_consumer() -> None:
    verdict = judge(AttemptResult(Outcome.GONE, "410"), size=9, failures=0, attempts=1, fraction=0)
    assert (verdict.action, verdict.counted) == (Action.PAUSE, False)
