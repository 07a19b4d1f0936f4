"""The last messages before a subscription began, fetched page by page. Pure."""

from __future__ import annotations

from collections import deque

from .inbox import Inbox
from .messages import Message, Page


class Recent:
    """The newest `count` messages up to where an inbox has begun, to be put before all that it gets.

    The subscription is there already, so no message falls between the pages and what is new. Ask for what is `wanted`
    and hand each page to `take`, until nothing is.
    """

    def __init__(self, inbox: Inbox, count: int) -> None:
        self._inbox = inbox
        self._epoch = inbox.epoch
        self._missing = count
        self._before = inbox.cursor + 1
        self._messages: deque[Message] = deque()

    @property
    def wanted(self) -> tuple[int, int] | None:
        """How many messages to ask for, and below which seq; None when there is nothing more to ask for."""
        return (self._missing, self._before) if self._missing else None

    def take(self, page: Page) -> None:
        """Keep a page; with the last one, put all of them into the inbox."""
        messages = page.messages[-self._missing :]
        self._messages.extendleft(reversed(messages))
        self._missing -= len(messages)
        if messages:
            self._before = messages[0].seq or 0
        if self._missing and messages and page.more:
            return
        self._missing = 0
        inbox = self._inbox
        # In another epoch the pages may be of another log: the gap that the inbox has says what may be missing.
        if self._messages and inbox.arrived_epoch == self._epoch:
            inbox.cursor = (self._messages[0].seq or 1) - 1
            inbox.items.extendleft(reversed(self._messages))
