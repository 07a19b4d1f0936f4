"""A token bucket: a rate and a burst. No clock: times are arguments, in seconds."""

from __future__ import annotations


class TokenBucket:
    """A bucket that fills with `rate` tokens per second up to `burst`. It is full at the time `now`."""

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at = now

    def level(self, now: float) -> float:
        """The number of tokens; negative if more were spent than there were."""
        self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level

    def spend(self, tokens: float) -> None:
        """Take tokens, even if there are too few."""
        self._level -= tokens

    def take(self, tokens: float, now: float) -> bool:
        """Take tokens if there are enough; return whether there were."""
        if self.level(now) < tokens:
            return False
        self._level -= tokens
        return True

    def charge(self, tokens: float, now: float) -> float:
        """Take tokens, even if there are too few. Returns after how many seconds none are owed."""
        self._level = left = min(self.burst, self._level + (now - self._at) * self.rate) - tokens
        self._at = now
        return -left / self.rate if left < 0 else 0.0
