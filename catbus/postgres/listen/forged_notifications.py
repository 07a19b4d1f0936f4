"""Forged notifications: counted, logged, and a reason to stop listening while a flood of them delays polls."""

from __future__ import annotations

from math import inf

from ...observability.loggers import RateLimitedLog, get_logger

logger = get_logger("catbus.postgres")

FLOOD_COUNT = 1000
"""Forged notifications between two polls that may be a flood."""
FLOOD_POLL_TIME = 0.25
"""Seconds of a poll that a flood has delayed."""
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 480.0
"""Seconds without listening after a flood: the first time, and at most after repeated floods."""


class ForgedNotifications:
    """Counts forged notifications. Times are Trio's, in seconds.

    The server sends a connection all waiting notifications before the result of the next statement. A role that sends
    more than a replica can read delays the polls of the replica, and with them everything that it learns by polling.
    """

    def __init__(self) -> None:
        self.rejected = 0
        self.floods = 0
        """How often a flood has delayed a poll."""
        self._counted = 0
        self._logged = 0
        """How many have been logged."""
        self._warnings = RateLimitedLog(logger.warning)
        self._pause = FIRST_PAUSE
        self._paused_until = -inf
        """The time at which listening may begin again."""

    def note(self) -> bool:
        """Count a forged notification. Returns whether to poll now, to detect a flood."""
        self.rejected += 1
        return self.rejected - self._counted == FLOOD_COUNT

    def note_poll(self, now: float, took: float) -> None:
        """A poll has ended, and took so many seconds."""
        came, self._counted = self.rejected - self._counted, self.rejected
        flood = came >= FLOOD_COUNT and took >= FLOOD_POLL_TIME
        if flood:
            self._pause = min(self._pause * 2, LONGEST_PAUSE) if now < self._paused_until + self._pause else FIRST_PAUSE
            self._paused_until = now + self._pause
            self.floods += 1
        if self.rejected > self._logged and self._warnings.log(
            now,
            "forged notifications: check which roles may connect to the database",
            count=self.rejected - self._logged,
            listening=not flood,
        ):
            self._logged = self.rejected

    def may_listen(self, now: float) -> bool:
        """Whether listening is allowed."""
        return now >= self._paused_until
