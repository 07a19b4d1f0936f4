"""Which addresses are counted as one: what a single peer can easily have many of is no way to be many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


@lru_cache(4096)
def network_of(host: str) -> str:
    """The network of an IP address: an IPv4 address by itself, also one that IPv6 carries, and a /64 in IPv6."""
    address = ip_address(host.partition("%")[0])
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"


class Newcomers(Generic[T]):
    """Peers that have not shown yet who they are, the oldest first, each with its network."""

    __slots__ = ("_networks", "_peers")

    def __init__(self) -> None:
        self._peers: dict[T, str] = {}
        self._networks: Counter[str] = Counter()
        """How many of them each network has."""

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, peer: T, network: str) -> None:
        """One more has come."""
        self._peers[peer] = network
        self._networks[network] += 1

    def discard(self, peer: T) -> None:
        """It is none any more, if it was one."""
        network = self._peers.pop(peer, None)
        if network is not None:
            self._networks[network] -= 1
            if not self._networks[network]:
                del self._networks[network]

    def next_to_go(self) -> T | None:
        """Which gives way where there is no room for one more: of the network that has most of them, the oldest."""
        if not self._peers:
            return None
        network = max(self._networks, key=self._networks.__getitem__)
        return next(peer for peer, own in self._peers.items() if own == network)
