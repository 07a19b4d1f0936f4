"""The connections that may be evicted to make room for another one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class EvictionQueue(Generic[T]):
    """Unauthenticated peers in the order of their arrival, each with its network.

    All methods take constant time, because in a flood each new peer evicts another one.
    """

    __slots__ = ("_networks", "_peers", "_ranks")

    def __init__(self) -> None:
        self._peers: dict[T, str] = {}
        self._networks: dict[str, OrderedDict[T, None]] = {}
        """The peers of each network, the oldest first. In a plain dict, finding the first item takes long after the
        items before it were deleted."""
        self._ranks: list[OrderedDict[str, None]] = [OrderedDict()]
        """The networks with 0, 1, 2 ... peers. The last set is never empty, unless it is the only one."""

    def __len__(self) -> int:
        return len(self._peers)

    def networks(self) -> dict[str, int]:
        """The number of peers of each network."""
        return {network: len(peers) for network, peers in self._networks.items()}

    def add(self, peer: T, network: str) -> None:
        """Add a peer."""
        self._peers[peer] = network
        peers = self._networks.setdefault(network, OrderedDict())
        peers[peer] = None
        self._move(network, len(peers) - 1, len(peers))

    def discard(self, peer: T) -> None:
        """Remove a peer if it is in the queue."""
        network = self._peers.pop(peer, None)
        if network is None:
            return
        peers = self._networks[network]
        del peers[peer]
        self._move(network, len(peers) + 1, len(peers))
        if not peers:
            del self._networks[network]

    def next_to_evict(self) -> T | None:
        """Return the oldest peer of a network with the most peers, or None if there is no peer."""
        if not self._peers:
            return None
        return next(iter(self._networks[next(iter(self._ranks[-1]))]))

    def _move(self, network: str, before: int, after: int) -> None:
        """Move a network that has one peer more or less."""
        ranks = self._ranks
        ranks[before].pop(network, None)
        if after == len(ranks):
            ranks.append(OrderedDict())
        if after:
            ranks[after][network] = None
        while len(ranks) > 1 and not ranks[-1]:
            ranks.pop()
