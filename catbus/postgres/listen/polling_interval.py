"""The interval of polling: long while notifications announce all commits, short while they do not."""

from __future__ import annotations

from math import inf

NOTIFIED_INTERVAL = 2.0
"""Seconds between polls while notifications announce all commits."""
NOTIFICATION_GRACE = 0.25
"""Seconds by which a notification may arrive later than the poll that found its commit."""
IDLE_INTERVAL, BUSY_INTERVAL = 0.1, 0.01
"""Seconds between polls that replace notifications: without, and with, recent commits."""
BUSY_TIME = 1.0
"""Seconds after a commit for which there are recent commits."""
DISTRUST_TIME = 30.0
"""Seconds for which notifications have to announce everything before they are relied on again."""


class PollingInterval:
    """Compares the heads that polls find with those that notifications announce. Times are Trio's, in seconds."""

    def __init__(self) -> None:
        self.unannounced = 0
        """How often a poll found commits that no notification had announced."""
        self.polling = False
        """Whether polls replace notifications."""
        self._listening = True
        self._begun = False
        self._advanced = self._missed = -inf
        self._announced_all = True
        """Whether notifications announced the last head that was checked."""
        self._announced = self._announced_before = self._verified = 0
        self._settled = 0
        self._unconfirmed: tuple[int, float] | None = None
        """A head, and when a poll found it. It is settled when a notification has had time to announce it."""

    def begin(self, *, listening: bool) -> None:
        """A new connection begins. `listening`: whether it receives notifications."""
        self._listening = listening
        self.polling = not listening
        self._begun = False
        self._missed = -inf
        self._announced_all = True
        self._unconfirmed = None

    def note_notification(self, last: int) -> None:
        """A notification announces that everything up to `last` is committed."""
        self._announced = max(self._announced, last)

    def begin_poll(self) -> None:
        """A poll begins."""
        self._announced_before = self._announced

    def note_poll(self, head: int, now: float) -> int:
        """A poll has found this head. Returns the seq up to which no more notifications are expected."""
        first, self._begun = not self._begun, True
        if first or head < self._settled:
            self._settled = self._announced = self._announced_before = head
            self._unconfirmed = None
        if self._announced_before <= head:
            self._verified = self._announced_before
        else:
            # The announced seq does not exist: any role may notify.
            self._announced = self._verified
        if self._unconfirmed is not None and now >= self._unconfirmed[1] + NOTIFICATION_GRACE:
            self._settled = self._unconfirmed[0]
            self._unconfirmed = None
            self._announced_all = self._announced >= self._settled
            if not self._announced_all:
                self._missed = now
                self.unannounced += 1
        if self._unconfirmed is None and head > self._settled:
            self._unconfirmed = head, now
            self._advanced = now
        self.polling = not self._listening or not self._announced_all or now < self._missed + DISTRUST_TIME
        return head if self.polling else self._settled

    def seconds_to_next(self, now: float) -> float:
        """Seconds until the next poll."""
        if self.polling:
            return BUSY_INTERVAL if now < self._advanced + BUSY_TIME else IDLE_INTERVAL
        if self._unconfirmed is not None and self._announced < self._unconfirmed[0]:
            return max(0.0, self._unconfirmed[1] + NOTIFICATION_GRACE - now)
        return NOTIFIED_INTERVAL
