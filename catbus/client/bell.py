"""A bell that tasks wait for."""

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
