"""How often the database is asked for news: seldom while notifications tell of everything, often where they do not."""

from __future__ import annotations

from math import inf

PACE = 2.0
"""Seconds between polls while every advance is announced."""
GRACE = 0.25
"""How much later than the poll a notification may come."""
IDLE_PACE, BUSY_PACE = 0.1, 0.01
"""The pause between polls while they are what tells of news, and while there are some."""
BUSY = 1.0
"""Seconds for which there are news once the head has moved."""
TRIAL = 30.0
"""For so long notifications have to have told of everything until they are relied on again."""


class PollingInterval:
    """Compares what polls find with what notifications have told of. Times are Trio's, in seconds."""

    def __init__(self) -> None:
        self.unannounced = 0
        """How often a poll found what no notification had told of."""
        self.polling = False
        """Whether it is the polls that news are expected from."""
        self._deaf = False
        self._begun = False
        self._advanced = self._missed = -inf
        self._led = True
        """Whether notifications have told of something since they last did not."""
        self._told = self._told_before = self._sure = 0
        self._settled = 0
        self._question: tuple[int, float] | None = None
        """A head, and when it was found: it is settled once a notification has had time to tell of it."""

    def begin(self, *, deaf: bool) -> None:
        """There is another connection, perhaps one (`deaf`) on which no notifications come."""
        self.polling = self._deaf = deaf
        self._begun = False
        self._missed = -inf
        self._led = True
        self._question = None

    def hear(self, last: int) -> None:
        """A notification says that everything up to `last` is committed."""
        self._told = max(self._told, last)

    def ask(self) -> None:
        """A poll begins."""
        self._told_before = self._told

    def note(self, head: int, now: float) -> int:
        """The poll has found this head. Returns up to where nobody else is expected to tell of anything any more."""
        first, self._begun = not self._begun, True
        if first or head < self._settled:
            self._settled = self._told = self._told_before = head
            self._question = None
        if self._told_before <= head:
            self._sure = self._told_before
        else:
            # It was told of what is not there: anybody may notify.
            self._told = self._sure
        if self._question is not None and now >= self._question[1] + GRACE:
            self._settled = self._question[0]
            self._question = None
            self._led = self._told >= self._settled
            if not self._led:
                self._missed = now
                self.unannounced += 1
        if self._question is None and head > self._settled:
            self._question = head, now
            self._advanced = now
        self.polling = self._deaf or not self._led or now < self._missed + TRIAL
        return head if self.polling else self._settled

    def pause(self, now: float) -> float:
        """How long to wait before the next poll."""
        if self.polling:
            return BUSY_PACE if now < self._advanced + BUSY else IDLE_PACE
        if self._question is not None and self._told < self._question[0]:
            return max(0.0, self._question[1] + GRACE - now)
        return PACE
