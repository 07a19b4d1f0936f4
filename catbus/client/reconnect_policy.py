"""Whether to come back after a connection is lost, and when. Pure: no clock, no chance of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from ..errors import RETRYABLE, ErrorCode, Refused

_OUR_MISTAKES = frozenset({1002, 1003, 1007, 1009})
"""WebSocket's own codes for what should not have been sent."""

_LONGEST_RUN = 60


class State(StrEnum):
    """How a `Bus` is connected. CLOSED is for good."""

    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    CLOSED = "closed"


class Verdict(Enum):
    """What the end of a connection says of the next one."""

    FINAL = auto()
    NEW_TOKEN = auto()
    AGAIN = auto()


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before connecting again, in seconds: `first`, then twice as long each time, `most` at most.

    Up to `jitter` of each pause, a fraction, is left out at random, so that not everybody comes back at once.
    """

    first: float = 1.0
    most: float = 30.0
    jitter: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.most or not 0 <= self.jitter <= 1:
            raise ValueError("a back-off has 0 <= first <= most, and a jitter from 0 to 1")

    def pause(self, failures: int, chance: float) -> float:
        """How long to wait after so many failures in a row; `chance` is from 0 to 1."""
        return float(min(self.most, self.first * 2.0 ** min(failures, _LONGEST_RUN)) * (1 - self.jitter * chance))


@dataclass(frozen=True, slots=True)
class Reconnecting:
    """There is no connection: the next `attempt` (1, 2, ...) is made in `delay` seconds.

    `reason` and `code`, a closing code where there was one, say how the last one ended.
    """

    reason: str
    code: int | None
    attempt: int
    delay: float


@dataclass(frozen=True, slots=True)
class Reconnected:
    """There is a new connection. `moved`: it was made before the last one ended, because the broker asked for that."""

    moved: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """There will be no further connection. `reason` and `code`, a closing code where there was one, say why."""

    reason: str
    code: int | None


class SignedOut(Refused):
    """The token function says that there is no token any more."""


def judge(code: int | None) -> Verdict:
    """What a closing code says, by its range (protocol/README.md, section 11)."""
    if code is None:
        return Verdict.AGAIN
    if 4000 <= code <= 4399 or code in _OUR_MISTAKES:
        return Verdict.FINAL
    return Verdict.NEW_TOKEN if 4400 <= code <= 4499 else Verdict.AGAIN


def judge_refusal(refusal: Refused) -> Verdict:
    """What a refused token says."""
    if isinstance(refusal, SignedOut):
        return Verdict.FINAL
    if refusal.code is ErrorCode.TOKEN_EXPIRED:
        return Verdict.NEW_TOKEN
    return Verdict.AGAIN if refusal.code in RETRYABLE else Verdict.FINAL
