"""A subscription, as the application iterates over it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from anyio.lowlevel import checkpoint
from msgspec.structs import force_setattr

from ..errors import Refused
from .arguments import encode_cursor
from .bell import Bell
from .inbox import Event, Inbox, Mark, Phase
from .messages import Gap, Message
from .supervisor import Supervisor

FAIRNESS = 100
"""How many messages are handed out in one go before other tasks have their turn."""


class Messages(AsyncIterator[Message]):
    """The messages of one subscription, in the order of their seqs.

    They go on over the loss of a connection, none left out and none twice. Iterating raises `Refused` when the
    permission is withdrawn (with the code `revoked`; with another when the next connection's broker refuses to go on),
    and `Disconnected` when there will be no further connection, after what had arrived before has been handed out.
    Cancelling it loses no message.
    """

    def __init__(
        self,
        inbox: Inbox,
        supervisor: Supervisor,
        bell: Bell,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.gaps: list[Gap] = []
        """What may have been missed, oldest first."""
        self._inbox = inbox
        self._supervisor = supervisor
        self._bell = bell
        self._on_event = on_event
        self._low = inbox.limit // 2
        self._turns = 0

    @property
    def pattern(self) -> str:
        return self._inbox.pattern

    @property
    def cursor(self) -> int:
        """Complete up to this seq: where to go on from, together with `epoch`.

        It counts the last message that was handed out as taken: keep it once that message has been dealt with.
        """
        return self._inbox.cursor

    @property
    def epoch(self) -> str:
        """The incarnation of the log that `cursor` belongs to."""
        return self._inbox.epoch

    @property
    def resume_from(self) -> str:
        """`cursor` and `epoch` as opaque text that `since` takes."""
        return encode_cursor(self._inbox.cursor, self._inbox.epoch)

    async def __anext__(self) -> Message:
        inbox = self._inbox
        items = inbox.items
        if self._turns >= FAIRNESS:
            await checkpoint()
            self._turns = 0
        while True:
            if items:
                item = items.popleft()
                if inbox.pressed and len(items) <= self._low:
                    self._supervisor.subscriptions.relieve(inbox)
                    self._supervisor.lobby.requested()
                if type(item) is Message:
                    if item.seq is not None:
                        inbox.cursor = item.seq
                        force_setattr(item, "epoch", inbox.epoch)
                    self._turns += 1
                    return item
                self._pass(item)  # type: ignore[arg-type]
            elif inbox.ending is not None:
                raise Refused(inbox.ending.code, inbox.ending.message)
            elif inbox.phase is Phase.ENDED:
                raise StopAsyncIteration
            else:
                self._supervisor.check()
                self._turns = 0
                await self._supervisor.lobby.listen(self._bell)

    def _pass(self, mark: Mark) -> None:
        self._inbox.cursor, self._inbox.epoch = mark.cursor, mark.epoch
        if isinstance(mark.event, Gap):
            self.gaps.append(mark.event)
        if self._on_event is not None and mark.event is not None:
            self._on_event(mark.event)
