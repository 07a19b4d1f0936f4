"""The live maps of an application: retained messages and members, as they are now."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping

from anyio.lowlevel import checkpoint

from ..errors import Refused
from .argument_checks import check_function
from .connection_supervisor import ConnectionSupervisor
from .live_state import Change, ChangeQueue, K, V
from .message_queue import QueuePhase
from .signals import Signal
from .state_queue import StateQueue

CHANGES_PER_CHECKPOINT = 100
"""Changes that an iteration returns before it lets other tasks run."""


class LiveMap(Mapping[K, V]):
    """A mapping that the broker keeps up to date. It is complete when you get it.

    It may change at each `await`: copy it with `dict` before a loop that awaits. Without a connection it is what it
    was, and the next connection brings the differences. It is kept in memory as a whole.
    """

    def __init__(self, queue: StateQueue[K, V], supervisor: ConnectionSupervisor, signal: Signal) -> None:
        self._queue = queue
        self._supervisor = supervisor
        self._signal = signal

    def __getitem__(self, key: K) -> V:
        return self._queue.state.entries[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._queue.state.entries)

    def __len__(self) -> int:
        return len(self._queue.state.entries)

    def __repr__(self) -> str:
        return f"<LiveMap of {self._queue.pattern}: {len(self)} entries>"

    @property
    def pattern(self) -> str:
        return self._queue.pattern

    @property
    def error(self) -> Refused | None:
        """Why the broker has ended it: it does not change any more. The code is `revoked`, or that of a rejection."""
        return self._queue.error

    def on_change(self, callback: Callable[[Change[K, V]], object]) -> Callable[[], None]:
        """Call a function with each change, in order, after the map has changed. Returns a function that ends this.

        The connection waits for the function: it must return soon, and an exception of it ends the bus.
        """
        check_function("callback", callback)
        callbacks, token = self._queue.state.callbacks, object()
        callbacks[token] = callback
        return lambda: callbacks.pop(token, None) and None

    def changes(self) -> Changes[K, V]:
        """Iterate over the changes from now on. Several tasks may do so.

        An iteration that is slower than the changes gets the newest one of each key: `previous` is what it knows, and
        `value` what there is now. So no more than the keys of the map wait for it, and nothing waits for the iteration.
        """
        return Changes(self._queue, self._supervisor, self._signal)


class Changes(AsyncIterator[Change[K, V]]):
    """The changes of a live map. Every change is a true one: an entry that comes and goes unseen is not reported.

    The iteration continues after the loss of a connection. It ends when the map's block is left. It raises `Refused`
    with the code `revoked` if the permission is withdrawn, or with another code if the broker rejects the subscription
    on the next connection, and `Disconnected` if there will be no further connection. Cancelling it loses nothing.
    """

    def __init__(self, queue: StateQueue[K, V], supervisor: ConnectionSupervisor, signal: Signal) -> None:
        self._queue = queue
        self._supervisor = supervisor
        self._signal = signal
        self._waiting = ChangeQueue(queue.state, signal.notify)
        self._since_checkpoint = 0

    async def __anext__(self) -> Change[K, V]:
        if self._since_checkpoint >= CHANGES_PER_CHECKPOINT:
            await checkpoint()
            self._since_checkpoint = 0
        queue = self._queue
        while (change := self._waiting.take()) is None:
            if queue.error is not None:
                raise Refused(queue.error.code, queue.error.message)
            if queue.phase is QueuePhase.ENDED:
                raise StopAsyncIteration
            self._supervisor.check_not_closed()
            self._since_checkpoint = 0
            await self._signal.wait()
        self._since_checkpoint += 1
        return change
