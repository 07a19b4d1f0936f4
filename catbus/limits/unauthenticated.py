"""The memory of unauthenticated peers: little for each of them, and a bounded amount for all together."""

from __future__ import annotations

from collections.abc import Callable

UNAUTHENTICATED_OBJECT_BYTES = 16_384
"""Bytes that an object may have before authentication: those of an `auth` with a token of up to 8,192 bytes."""
UNAUTHENTICATED_PEER_BYTES = 3 * UNAUTHENTICATED_OBJECT_BYTES
"""Bytes that are counted for one peer at most: more is never kept, whatever it sends."""
UNAUTHENTICATED_TOTAL_BYTES = 64 << 20
"""Bytes that all unauthenticated peers may take."""
TOO_MUCH = "unauthenticated connections use too much memory"


def _nothing() -> None:
    """Replaces `evict` of a peer without a connection."""


class UnauthenticatedPeers:
    """The unauthenticated peers that have sent something. Over the limit, the oldest are evicted."""

    def __init__(self, limit: int = UNAUTHENTICATED_TOTAL_BYTES) -> None:
        self.size = 0
        """Bytes that are kept for them at most."""
        self.evicted = 0
        """How many were evicted."""
        self._limit = limit
        self._charged: dict[UnauthenticatedPeer, None] = {}

    def charge(self, peer: UnauthenticatedPeer, size: int) -> None:
        """Count bytes that a peer has sent and that may be kept; evict the oldest peers over the limit."""
        more = min(size, UNAUTHENTICATED_PEER_BYTES - peer.size)
        if more <= 0 or peer.released:
            return
        self._charged[peer] = None
        peer.size += more
        self.size += more
        while self.size > self._limit:
            oldest = next(iter(self._charged))
            self.clear(oldest)
            self.evicted += 1
            oldest.evict()

    def clear(self, peer: UnauthenticatedPeer) -> None:
        """Count nothing for a peer any more: nothing that it has sent is kept."""
        if peer in self._charged:
            del self._charged[peer]
            self.size -= peer.size
            peer.size = 0


class UnauthenticatedPeer:
    """An unauthenticated peer. `evict` closes its connection; it is synchronous and must not raise."""

    __slots__ = ("_unauthenticated", "evict", "released", "size")

    def __init__(self, unauthenticated: UnauthenticatedPeers, evict: Callable[[], None]) -> None:
        self.evict = evict
        self.size = 0
        self.released = False
        """Whether it was authenticated, or is gone: it counts no more."""
        self._unauthenticated = unauthenticated

    def received(self, size: int) -> None:
        """Count bytes that the peer has sent."""
        self._unauthenticated.charge(self, size)

    def processed(self) -> None:
        """Count nothing: all that the peer has sent was processed, and nothing of it is kept."""
        self._unauthenticated.clear(self)

    def release(self) -> None:
        """Count the peer no more: it was authenticated, or is gone."""
        self.released = True
        self.evict = _nothing
        self._unauthenticated.clear(self)
