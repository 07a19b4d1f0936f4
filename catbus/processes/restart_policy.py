"""When a worker that has died is started again, and when its supervisor gives up."""

from __future__ import annotations

from collections import deque

MAX_DEATHS = 5
"""Deaths of one worker within `PERIOD` with which the broker ends."""
PERIOD = 60.0
FIRST_DELAY = 0.5
"""Seconds until a worker is started again after its second death within `PERIOD`; after each further one, twice as
long. After the first one it is started at once."""


class RestartPolicy:
    """The recent deaths of one worker. A worker that ended as it was told has not died."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()

    def record_death(self, now: float) -> float | None:
        """Record a death at the time `now`, and return the seconds until the next start, or None to give up."""
        while self._deaths and self._deaths[0] <= now - PERIOD:
            self._deaths.popleft()
        self._deaths.append(now)
        number = len(self._deaths)
        if number >= MAX_DEATHS:
            return None
        return 0.0 if number == 1 else FIRST_DELAY * 2 ** (number - 2)
