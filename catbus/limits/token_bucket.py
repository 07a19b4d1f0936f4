"""A token bucket: so much in a second, and somewhat more at once. No clock: times are arguments."""

from __future__ import annotations


class TokenBucket:
    """Fills with `rate` tokens a second up to `burst`, and is full in the beginning, which is at the time `now`."""

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at = now

    def level(self, now: float) -> float:
        """How many tokens there are; less than none after more was spent than there was."""
        self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level

    def spend(self, tokens: float) -> None:
        """Take tokens, whether they are there or not."""
        self._level -= tokens

    def take(self, tokens: float, now: float) -> bool:
        """Take tokens if they are there."""
        if self.level(now) < tokens:
            return False
        self._level -= tokens
        return True

    def charge(self, tokens: float, now: float) -> float:
        """Take tokens, whether they are there or not. Returns after how many seconds none are owed; 0 for at once."""
        self._level = left = min(self.burst, self._level + (now - self._at) * self.rate) - tokens
        self._at = now
        return -left / self.rate if left < 0 else 0.0
