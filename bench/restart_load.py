"""Clients that have to reconnect while replicas are restarted: what they receive, and what is lost or repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial

import trio

from catbus.client import Bus, Reconnected, Transport, open_bus

TRANSPORTS = "websocket", "webtransport"
PUBLISHERS = 4
WARM = 3.0
"""Seconds of load before the first replica is restarted, and after the last."""
DELIVERY_TIMEOUT = 60.0
WIDTH = 60


Dial = Callable[[str], Awaitable[Transport]]


@dataclass
class Seen:
    """What one subscriber received."""

    cursor: int = -1
    delivered: int = 0
    lost: int = 0
    repeated: int = 0
    last: float = 0.0
    pause: float = 0.0


@dataclass
class Load:
    """Subscribers and publishers that connect with `dial`, given a transport's name, and authenticate with `token`.

    Publishers connect with `dial_publisher`, if it is given.
    """

    dial: Dial
    token: str
    transports: Sequence[str] = TRANSPORTS
    publishers: int = PUBLISHERS
    dial_publisher: Dial | None = None
    began: float = 0.0
    over: bool = False
    published: int = 0
    acknowledged: int = 0
    head: int = 0
    seen: list[Seen] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)
    """When sessions were on another replica, in seconds since the beginning."""

    @property
    def delivered(self) -> int:
        return sum(seen.delivered for seen in self.seen)

    @property
    def lost(self) -> int:
        return sum(seen.lost + max(self.head - seen.cursor, 0) for seen in self.seen)

    @property
    def repeated(self) -> int:
        return sum(seen.repeated for seen in self.seen)

    @property
    def pauses(self) -> list[float]:
        """The longest time without a message of each subscriber, in ascending order."""
        return sorted(seen.pause for seen in self.seen)

    async def play(self, sessions: int, rate: float, restart: Callable[[], Awaitable[None]]) -> None:
        """Run `sessions` subscribers over all transports, and `rate` messages per second, and call `restart`."""
        async with trio.open_nursery() as nursery:
            for first in range(0, sessions, 20):
                async with trio.open_nursery() as starting:
                    for number in range(first, min(first + 20, sessions)):
                        transport = self.transports[number % len(self.transports)]
                        starting.start_soon(nursery.start, self._subscribe, transport)
            self.began = trio.current_time()
            for seen in self.seen:
                seen.last, seen.pause = self.began, 0.0
            async with trio.open_nursery() as publishing:
                for number in range(self.publishers):
                    transport = self.transports[number % len(self.transports)]
                    publishing.start_soon(self._publish, transport, self.publishers / rate)
                await trio.sleep(WARM)
                await restart()
                await trio.sleep(WARM)
                self.over = True
            with trio.move_on_after(DELIVERY_TIMEOUT):
                while any(seen.cursor < self.head for seen in self.seen):
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()

    def _connect(self, dial: Dial, transport: str) -> AbstractAsyncContextManager[Bus]:
        def note(event: object) -> None:
            if isinstance(event, Reconnected):
                self.moves.append(trio.current_time() - self.began)

        return open_bus(partial(dial, transport), token=self.token, persist=True, on_event=note)

    async def _subscribe(self, transport: str, *, task_status: trio.TaskStatus[None]) -> None:
        seen = Seen()
        self.seen.append(seen)
        async with self._connect(self.dial, transport) as bus, bus.subscribe("*") as messages:
            seen.cursor, seen.last = messages.cursor, trio.current_time()
            task_status.started()
            async for message in messages:
                now = trio.current_time()
                seen.delivered += 1
                seen.pause, seen.last = max(seen.pause, now - seen.last), now
                if message.seq <= seen.cursor:
                    seen.repeated += 1
                else:
                    seen.lost += message.seq - seen.cursor - 1
                    seen.cursor = message.seq

    async def _publish(self, transport: str, pause: float) -> None:
        async with self._connect(self.dial_publisher or self.dial, transport) as bus:
            due = trio.current_time()
            while not self.over:
                self.published += 1
                self.head = max(self.head, await bus.publish("bench.rolling", self.published))
                self.acknowledged += 1
                due = max(due + pause, trio.current_time())
                await trio.sleep_until(due)


def plot(moves: Sequence[float]) -> list[str]:
    """Draw the reconnects of each second as lines of text."""
    counts = Counter(int(at) for at in moves)
    most = max(counts.values(), default=1)
    seconds = range(max(counts, default=0) + 1)
    return [f"{second:4} s {counts[second]:5} {'#' * round(WIDTH * counts[second] / most)}" for second in seconds]
