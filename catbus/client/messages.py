"""The `Messages` of a subscription, over which an application iterates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from anyio.lowlevel import checkpoint
from msgspec.structs import force_setattr

from ..errors import Refused
from .argument_checks import encode_cursor
from .connection_supervisor import ConnectionSupervisor
from .message_queue import CursorUpdate, Event, MessageQueue, QueuePhase
from .server_messages import Gap, Message
from .signals import Signal

MESSAGES_PER_CHECKPOINT = 100
"""Messages that an iteration returns before it lets other tasks run."""


class Messages(AsyncIterator[Message]):
    """The messages of one subscription, in the order of their seqs.

    The iteration continues after the loss of a connection: no message is missing, and none is repeated. It raises
    `Refused` with the code `revoked` if the permission is withdrawn, or with another code if the broker rejects the
    subscription on the next connection. It raises `Disconnected` if there will be no further connection, after the
    messages that have already arrived. Cancelling it loses no message.
    """

    def __init__(
        self,
        queue: MessageQueue,
        supervisor: ConnectionSupervisor,
        signal: Signal,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.gaps: list[Gap] = []
        """The messages that may be missing, oldest first."""
        self._queue = queue
        self._supervisor = supervisor
        self._signal = signal
        self._on_event = on_event
        self._low = queue.limit // 2
        self._since_checkpoint = 0

    @property
    def pattern(self) -> str:
        return self._queue.pattern

    @property
    def cursor(self) -> int:
        """The seq up to which the subscription is complete. Resume there, with `epoch`.

        It includes the last message that the iteration returned. Store it after that message has been processed.
        """
        return self._queue.cursor

    @property
    def epoch(self) -> str:
        """The epoch of the log to which `cursor` belongs."""
        return self._queue.epoch

    @property
    def resume_from(self) -> str:
        """`cursor` and `epoch` as opaque text for `since`."""
        return encode_cursor(self._queue.cursor, self._queue.epoch)

    async def __anext__(self) -> Message:
        queue = self._queue
        items = queue.items
        if self._since_checkpoint >= MESSAGES_PER_CHECKPOINT:
            await checkpoint()
            self._since_checkpoint = 0
        while True:
            if items:
                item = items.popleft()
                if queue.notify_half_empty and len(items) <= self._low:
                    self._supervisor.subscriptions.queue_drained(queue)
                    self._supervisor.signals.notify_request()
                if type(item) is Message:
                    if item.seq is not None:
                        queue.cursor = item.seq
                        force_setattr(item, "epoch", queue.epoch)
                    self._since_checkpoint += 1
                    return item
                self._apply(item)  # type: ignore[arg-type]
            elif queue.error is not None:
                raise Refused(queue.error.code, queue.error.message)
            elif queue.phase is QueuePhase.ENDED:
                raise StopAsyncIteration
            else:
                self._supervisor.check_not_closed()
                self._since_checkpoint = 0
                await self._supervisor.signals.wait_for_message(self._signal)

    def _apply(self, update: CursorUpdate) -> None:
        self._queue.cursor, self._queue.epoch = update.cursor, update.epoch
        if isinstance(update.event, Gap):
            self.gaps.append(update.event)
        if self._on_event is not None and update.event is not None:
            self._on_event(update.event)
