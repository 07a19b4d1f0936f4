"""What follows from an attempt to deliver a batch: delivered, another attempt, a dead letter, or a pause. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum

FIRST_DELAY = 1.0
"""Seconds from the first failure to the second attempt. Each further failure doubles it."""
LONGEST_DELAY = 600.0
"""Seconds between two attempts at most."""
LONGEST_RETRY_AFTER = 3600.0
"""Seconds of a `Retry-After` that are respected."""
WHOLE_ATTEMPTS = 3
"""Attempts to deliver a whole batch, before a part of it is tried."""


class Outcome(StrEnum):
    """How an attempt ended, for the metrics."""

    DELIVERED = "delivered"
    REJECTED = "rejected"
    """The receiver has responded with another status."""
    THROTTLED = "throttled"
    """The receiver asks to wait."""
    GONE = "gone"
    UNREACHABLE = "unreachable"
    """No connection, or it ended before a response."""
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """The result of an attempt. `text` describes it. `retry_after` is in seconds, if the receiver asks to wait."""

    outcome: Outcome
    text: str
    retry_after: float = 0.0


class Action(StrEnum):
    """What is done with a batch after an attempt: see `catbus.settle_batch`."""

    DELIVERED = "delivered"
    RETRY = "retry"
    REJECT = "reject"
    PAUSE = "pause"
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`delay`: seconds until the next attempt, with the first `take` messages. `counted`: as a failure."""

    action: Action
    delay: float = 0.0
    take: int = 0
    counted: bool = False


def read_response(status: int, headers: Mapping[str, str], now: float) -> AttemptResult:
    """The result of an attempt that got a response. The names of `headers` are in lower case.

    Standard Webhooks, "Delivery success and failure"; `Retry-After`: RFC 9110, section 10.2.3.
    """
    text = f"the receiver responded with status {status}"
    if 200 <= status < 300:
        return AttemptResult(Outcome.DELIVERED, text)
    if status == 410:
        return AttemptResult(Outcome.GONE, text)
    wait = read_retry_after(headers.get("retry-after", ""), now)
    if status == 429 or (status == 503 and wait is not None):
        return AttemptResult(Outcome.THROTTLED, text, wait or 0.0)
    return AttemptResult(Outcome.REJECTED, text)


def read_retry_after(value: str, now: float) -> float | None:
    """The seconds of a `Retry-After` header, at most an hour; None if it is not valid. `now`: seconds since 1970."""
    value = value.strip()
    if value.isascii() and value.isdecimal() and len(value) <= 18:
        seconds = float(value)
    else:
        try:
            time = parsedate_to_datetime(value)
            seconds = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, OverflowError, TypeError, IndexError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def backoff(failures: int, fraction: float) -> float:
    """Seconds to wait after so many failures. `fraction`, from 0 to 1 and random, spreads it over the upper half."""
    delay = min(FIRST_DELAY * 2.0 ** min(failures - 1, 30), LONGEST_DELAY)
    return delay * (0.5 + 0.5 * fraction)


def judge(result: AttemptResult, *, size: int, failures: int, attempts: int, fraction: float) -> Verdict:
    """Decide what follows from an attempt to deliver `size` messages, after `failures` earlier failures.

    The messages of a partition are delivered in order, so only the first one of a batch is known to have failed as
    often as the batch. After some failures the batch is halved, again and again: if the first message is the reason,
    it fails alone, and after `attempts` failures it is rejected. Its neighbours are delivered before or after it.
    """
    if result.outcome is Outcome.DELIVERED:
        return Verdict(Action.DELIVERED)
    if result.outcome is Outcome.GONE:
        return Verdict(Action.PAUSE)
    if result.outcome is Outcome.THROTTLED:
        # The receiver works. Its wish to wait is no reason to give a message up.
        delay = max(result.retry_after, backoff(1, fraction)) * (1.0 + 0.1 * fraction)
        return Verdict(Action.RETRY, delay, size)
    failures += 1
    if size == 1 and failures >= attempts:
        return Verdict(Action.REJECT, counted=True)
    take = size if failures < WHOLE_ATTEMPTS else (size + 1) // 2
    return Verdict(Action.RETRY, backoff(failures, fraction), take, counted=True)
