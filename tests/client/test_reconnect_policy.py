"""Whether a client reconnects, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.client.reconnect_policy import Backoff, ReconnectDecision, decide_by_close_code, decide_by_token_error
from catbus.close_codes import CloseCode
from catbus.error_codes import ErrorCode
from catbus.errors import Refused


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ((4000, 4001, 4002, 4009, 4399, 1002, 1003, 1007, 1009), ReconnectDecision.FINAL),
        ((4400, 4401, 4499), ReconnectDecision.NEW_TOKEN),
        ((None, 1000, 1001, 1006, 1011, 1012, 3000, 3999, 4500, 4503, 4504, 4529, 4999, 5000), ReconnectDecision.RETRY),
    ],
)
def test_range_of_a_close_code_decides(codes: tuple[int | None, ...], verdict: ReconnectDecision) -> None:
    assert {decide_by_close_code(code) for code in codes} == {verdict}


def test_decisions_agree_with_the_close_codes_of_the_broker() -> None:
    for code in CloseCode:
        assert (decide_by_close_code(code) is ReconnectDecision.FINAL) == code.final


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (ErrorCode.UNAUTHENTICATED, ReconnectDecision.FINAL),
        (ErrorCode.UNAUTHORIZED, ReconnectDecision.FINAL),
        (ErrorCode.TOKEN_EXPIRED, ReconnectDecision.NEW_TOKEN),
        (ErrorCode.UNAVAILABLE, ReconnectDecision.RETRY),
        (ErrorCode.SHUTTING_DOWN, ReconnectDecision.RETRY),
        (ErrorCode.INTERNAL, ReconnectDecision.RETRY),
    ],
)
def test_decision_after_a_rejected_token(code: ErrorCode, verdict: ReconnectDecision) -> None:
    assert decide_by_token_error(Refused(code, "no")) is verdict


def test_backoff_doubles_up_to_its_maximum() -> None:
    assert [Backoff().pause(failures, 0) for failures in (0, 1, 2, 3, 4, 5, 6, 10_000)] == [1, 2, 4, 8, 16, 30, 30, 30]
    assert Backoff().pause(0, 1) == pytest.approx(0.7)
    assert Backoff(first=0).pause(7, 0.5) == 0


@given(st.integers(0, 100), st.floats(0, 1), st.floats(0, 1))
def test_jitter_shortens_a_pause(failures: int, jitter: float, chance: float) -> None:
    backoff = Backoff(jitter=jitter)
    full = backoff.pause(failures, 0)
    assert full * (1 - jitter) - 1e-9 <= backoff.pause(failures, chance) <= full <= 30


@pytest.mark.parametrize("wrong", [{"first": -1}, {"first": 2, "most": 1}, {"jitter": 1.1}, {"jitter": -0.1}])
def test_invalid_backoff_is_a_value_error(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Backoff"):
        Backoff(**wrong)
