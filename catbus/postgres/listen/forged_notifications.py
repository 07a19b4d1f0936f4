"""Notifications that no replica has sent: counted, told of seldom, and not listened to when they hold things up."""

from __future__ import annotations

from math import inf

from ...observability.loggers import RateLimitedLog, get_logger

logger = get_logger("catbus.postgres")

MANY = 1000
"""So many are a reason to see whether they hold anything up."""
SLOW = 0.25
"""Seconds that a poll takes when it has to wait for them."""
DEAF, LONGEST_DEAF = 30.0, 480.0
"""Seconds for which nobody listens then: at first, and when they have held things up again and again."""


class ForgedNotifications:
    """Counts them. Times are Trio's, in seconds.

    The server sends a connection all notifications that wait before it answers the next statement. A role that sends
    more than a replica can read delays the replica's polls, and with them all that a notification would have told of.
    """

    def __init__(self) -> None:
        self.rejected = 0
        self.floods = 0
        """How often they held something up."""
        self._counted = 0
        self._told = 0
        """How many the log has told of."""
        self._warnings = RateLimitedLog(logger.warning)
        self._deaf = DEAF
        self._quiet = -inf
        """Until when nobody listens."""

    def note(self) -> bool:
        """A notification was not of this log. Returns whether it is time to poll."""
        self.rejected += 1
        return self.rejected - self._counted == MANY

    def look(self, now: float, took: float) -> None:
        """A poll has ended, and took so long."""
        came, self._counted = self.rejected - self._counted, self.rejected
        flood = came >= MANY and took >= SLOW
        if flood:
            self._deaf = min(self._deaf * 2, LONGEST_DEAF) if now < self._quiet + self._deaf else DEAF
            self._quiet = now + self._deaf
            self.floods += 1
        if self.rejected > self._told and self._warnings.log(
            now,
            "somebody sends notifications that are not ours: see who may connect to the database",
            count=self.rejected - self._told,
            listening=not flood,
        ):
            self._told = self.rejected

    def may_listen(self, now: float) -> bool:
        """Whether there are few enough to listen."""
        return now >= self._quiet
