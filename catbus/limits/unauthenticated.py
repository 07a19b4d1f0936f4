"""What is kept for peers that have shown no token: little for each of them, and not much for all together."""

from __future__ import annotations

from collections.abc import Callable

UNAUTHENTICATED_OBJECT_BYTES = 16_384
"""Bytes that an object may have before a good token: that of an `auth`, whose token has up to 8,192."""
UNAUTHENTICATED_PEER_BYTES = 3 * UNAUTHENTICATED_OBJECT_BYTES
"""Bytes that are counted for one peer at the most: more of it is never kept, whatever it sends."""
UNAUTHENTICATED_TOTAL_BYTES = 64 << 20
"""Bytes that all of them may take."""
TOO_MUCH = "too much is kept of peers that have shown no token"


def _nothing() -> None:
    """It has no connection to end any more."""


class UnauthenticatedPeers:
    """Peers that have shown no token, and what they have sent. When that is too much, the oldest of them give way."""

    def __init__(self, limit: int = UNAUTHENTICATED_TOTAL_BYTES) -> None:
        self.size = 0
        """Bytes that are kept for them at the most."""
        self.ended = 0
        """How many had to give way."""
        self._limit = limit
        self._charged: dict[UnauthenticatedPeer, None] = {}

    def charge(self, stranger: UnauthenticatedPeer, size: int) -> None:
        """It has sent so many bytes more, which may be kept."""
        more = min(size, UNAUTHENTICATED_PEER_BYTES - stranger.size)
        if more <= 0 or stranger.known:
            return
        self._charged[stranger] = None
        stranger.size += more
        self.size += more
        while self.size > self._limit:
            oldest = next(iter(self._charged))
            self.clear(oldest)
            self.ended += 1
            oldest.give_way()

    def clear(self, stranger: UnauthenticatedPeer) -> None:
        """Nothing of what it has sent is kept any more."""
        if stranger in self._charged:
            del self._charged[stranger]
            self.size -= stranger.size
            stranger.size = 0


class UnauthenticatedPeer:
    """One of them. `give_way` ends its connection; it is synchronous and must not raise."""

    __slots__ = ("_unauthenticated", "give_way", "known", "size")

    def __init__(self, unauthenticated: UnauthenticatedPeers, give_way: Callable[[], None]) -> None:
        self.give_way = give_way
        self.size = 0
        self.known = False
        """Whether it has shown a token, or has left: it is counted no more."""
        self._unauthenticated = unauthenticated

    def heard(self, size: int) -> None:
        """It has sent so many bytes."""
        self._unauthenticated.charge(self, size)

    def understood(self) -> None:
        """All that it has sent has been answered, and nothing of it is kept."""
        self._unauthenticated.clear(self)

    def leave(self) -> None:
        """It is no stranger any more."""
        self.known = True
        self.give_way = _nothing
        self._unauthenticated.clear(self)
