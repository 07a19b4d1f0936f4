"""The reconnect policy: whether and when to reconnect, and the events that report it. Pure: no clock, no randomness."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from ..error_codes import RETRYABLE, ErrorCode
from ..errors import Refused

_PROTOCOL_ERROR_CODES = frozenset({1002, 1003, 1007, 1009})
"""Close codes of WebSocket for messages that the client should not have sent."""

_MAX_DOUBLINGS = 60


class State(StrEnum):
    """The state of a `Bus`. CLOSED is final."""

    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    CLOSED = "closed"


class ReconnectDecision(Enum):
    """What to do after the end of a connection: nothing, or reconnect, with a new token or with the same one."""

    FINAL = auto()
    NEW_TOKEN = auto()
    RETRY = auto()


@dataclass(frozen=True, slots=True)
class Backoff:
    """The pauses before reconnecting, in seconds: `first`, then twice as long each time, at most `most`.

    Each pause is shortened at random by up to the fraction `jitter`, so that clients do not reconnect all at once.
    """

    first: float = 1.0
    most: float = 30.0
    jitter: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.most or not 0 <= self.jitter <= 1:
            raise ValueError("a Backoff has 0 <= first <= most, and a jitter from 0 to 1")

    def pause(self, failures: int, chance: float) -> float:
        """Return the pause after so many failures in a row, in seconds. `chance` is a random number from 0 to 1."""
        return float(min(self.most, self.first * 2.0 ** min(failures, _MAX_DOUBLINGS)) * (1 - self.jitter * chance))


@dataclass(frozen=True, slots=True)
class Reconnecting:
    """There is no connection. The next `attempt` (1, 2, ...) is made in `delay` seconds.

    `reason` says how the last connection or attempt ended. `code` is its close code, or None.
    """

    reason: str
    code: int | None
    attempt: int
    delay: float


@dataclass(frozen=True, slots=True)
class Reconnected:
    """There is a new connection. `moved`: it was made while the last one was still open."""

    moved: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """There will be no further connection. `reason` says why. `code` is the close code, or None."""

    reason: str
    code: int | None


class SignedOut(Refused):
    """The token function returned None or raised `Refused`: the user has signed out."""


def decide_by_close_code(code: int | None) -> ReconnectDecision:
    """Decide by the range of a close code (protocol/README.md, section 11)."""
    if code is None:
        return ReconnectDecision.RETRY
    if 4000 <= code <= 4399 or code in _PROTOCOL_ERROR_CODES:
        return ReconnectDecision.FINAL
    return ReconnectDecision.NEW_TOKEN if 4400 <= code <= 4499 else ReconnectDecision.RETRY


def decide_by_token_error(error: Refused) -> ReconnectDecision:
    """Decide by the error for a rejected token."""
    if isinstance(error, SignedOut):
        return ReconnectDecision.FINAL
    if error.code in (ErrorCode.TOKEN_EXPIRED, ErrorCode.REVOKED):
        return ReconnectDecision.NEW_TOKEN
    return ReconnectDecision.RETRY if error.code in RETRYABLE else ReconnectDecision.FINAL
