"""Signals that tasks wait for."""

from __future__ import annotations

import anyio


class Bell:
    """Wakes whoever is waiting, and nobody who waits later.

    All tasks run in one thread, so a condition that is tested right before `wait` cannot change unnoticed.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def ring(self) -> None:
        """Wake everyone who waits."""
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        """Wait for the next ring. Cancelling it harms nothing."""
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()


class Lobby:
    """The bells that a client's connections and its application ring for each other."""

    def __init__(self) -> None:
        self.outbound = Bell()
        """There may be something to send."""
        self.inbound = Bell()
        """There may be somebody who waits for what comes."""
        self.room = Bell()
        """Something has come or gone, so there may be room; or the state has changed."""
        self.listeners = 0

    def requested(self) -> None:
        """There is something to send, and perhaps somebody who waits for the reply."""
        self.outbound.ring()
        self.inbound.ring()

    async def listen(self, bell: Bell) -> None:
        """Wait for the next message of a subscription. Others that are full do not keep it from coming."""
        self.listeners += 1
        self.inbound.ring()
        try:
            await bell.wait()
        finally:
            self.listeners -= 1
