"""Clients of a broker whose workers come and go: subscribers, publishers, and short connections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from typing import NamedTuple

import trio

from catbus.client import Backoff, Bus, connect
from tests.brokers import request
from tests.postgres.processes import token


class DeliveryFaults(NamedTuple):
    """Deliveries that are missing or too many, and the subscribers with another order."""

    lost: int
    repeated: int
    reordered: int


class WorkerLoad:
    """The load on one broker, whose log is empty at first, and what came of it."""

    def __init__(self, url: str, address: str) -> None:
        self.acknowledged: list[tuple[int, str, int]] = []
        """Each published message: its seq, its publisher, and the publisher's number for it."""
        self.received: list[list[tuple[int, str, int]]] = []
        """By subscriber."""
        self.reached = 0
        """Short connections that got their response."""
        self.refused = 0
        """Those that could not be opened."""
        self.broken = 0
        """Those that were open and got no response."""
        self._url = url
        self._address = address
        self._over = trio.Event()

    def client(self, name: str) -> AbstractAsyncContextManager[Bus]:
        """A client that comes back quickly."""
        backoff = Backoff(0.05, 0.3)
        return connect(self._url, token=token(name), reconnect=backoff, keepalive=0.5, timeout=2, persist=True)

    @asynccontextmanager
    async def running(self, subscribers: int = 6, publishers: int = 2) -> AsyncIterator[None]:
        """Run the load, and end it when all that was acknowledged has been received."""
        async with trio.open_nursery() as nursery:
            for number in range(subscribers):
                await nursery.start(self._subscribe, f"subscriber-{number}")
            async with trio.open_nursery() as busy:
                for number in range(publishers):
                    busy.start_soon(self._publish, f"publisher-{number}")
                busy.start_soon(self._connect)
                yield
                self._over.set()
            await self.progress(0)
            nursery.cancel_scope.cancel()

    async def progress(self, more: int) -> None:
        """Wait until so many more messages are acknowledged and all of those received."""
        goal = len(self.acknowledged) + more
        while len(self.acknowledged) < goal or any(len(seen) < goal for seen in self.received):
            await trio.sleep(0.02)

    def faults(self) -> DeliveryFaults:
        """What subscribers saw that they must not see."""
        log = sorted(self.acknowledged)
        return DeliveryFaults(
            lost=sum(len({*log} - {*seen}) for seen in self.received),
            repeated=sum(
                len(seen) - len({(name, number) for _, name, number in seen}) for seen in (log, *self.received)
            ),
            reordered=sum(seen != sorted(seen) for seen in self.received),
        )

    def check(self) -> None:
        """Assert that nothing is lost, repeated or in another order, and that every connection was accepted."""
        assert self.faults() == (0, 0, 0)
        assert self.acknowledged
        assert self.refused == 0
        assert self.reached > 0

    async def _subscribe(self, name: str, *, task_status: trio.TaskStatus[None]) -> None:
        seen: list[tuple[int, str, int]] = []
        self.received.append(seen)
        async with self.client(name) as bus, bus.subscribe("*", since=0) as messages:
            task_status.started()
            async for message in messages:
                assert message.seq == len(seen) + 1
                seen.append((message.seq, *message.payload))

    async def _publish(self, name: str) -> None:
        async with self.client(name) as bus:
            for number in count():
                if self._over.is_set():
                    return
                self.acknowledged.append((await bus.publish("load", (name, number)), name, number))

    async def _connect(self) -> None:
        while not self._over.is_set():
            try:
                response = await request(self._address, "/health", "")
            except ConnectionRefusedError:
                self.refused += 1
            except (OSError, EOFError, trio.BrokenResourceError):
                self.broken += 1
            else:
                assert response.body == b"ok"
                self.reached += 1
