"""The connections that may be evicted to make room for another one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class EvictionQueue(Generic[T]):
    """Peers that have not shown yet who they are, the oldest first, each with its network.

    All methods take constant time: a flood makes each newcomer the end of another one.
    """

    __slots__ = ("_networks", "_peers", "_ranks")

    def __init__(self) -> None:
        self._peers: dict[T, str] = {}
        self._networks: dict[str, OrderedDict[T, None]] = {}
        """The peers of each network, the oldest first. The first one of a plain dict takes long to find when those
        before it were deleted."""
        self._ranks: list[OrderedDict[str, None]] = [OrderedDict()]
        """By how many peers they have: the networks. The last one is not empty, but for the first."""

    def __len__(self) -> int:
        return len(self._peers)

    def networks(self) -> dict[str, int]:
        """How many of them each network has."""
        return {network: len(peers) for network, peers in self._networks.items()}

    def add(self, peer: T, network: str) -> None:
        """One more has come."""
        self._peers[peer] = network
        peers = self._networks.setdefault(network, OrderedDict())
        peers[peer] = None
        self._move(network, len(peers) - 1, len(peers))

    def discard(self, peer: T) -> None:
        """It is none any more, if it was one."""
        network = self._peers.pop(peer, None)
        if network is None:
            return
        peers = self._networks[network]
        del peers[peer]
        self._move(network, len(peers) + 1, len(peers))
        if not peers:
            del self._networks[network]

    def next_to_go(self) -> T | None:
        """Which gives way where there is no room for one more: of a network that has most of them, the oldest."""
        if not self._peers:
            return None
        return next(iter(self._networks[next(iter(self._ranks[-1]))]))

    def _move(self, network: str, before: int, after: int) -> None:
        """A network has one peer more or less."""
        ranks = self._ranks
        ranks[before].pop(network, None)
        if after == len(ranks):
            ranks.append(OrderedDict())
        if after:
            ranks[after][network] = None
        while len(ranks) > 1 and not ranks[-1]:
            ranks.pop()
