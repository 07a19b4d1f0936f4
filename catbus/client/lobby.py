"""Where tasks wait for what any connection of a client's may bring, and are seen waiting."""

from __future__ import annotations

from .bell import Bell


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
