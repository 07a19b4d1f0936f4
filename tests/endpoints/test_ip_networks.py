"""The networks of addresses, and the order of eviction."""

from __future__ import annotations

import pytest

from catbus.endpoints.connection_eviction import EvictionQueue
from catbus.endpoints.ip_networks import network_of


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_ipv4_address_counts_by_itself_and_ipv6_address_by_its_64(host: str, network: str) -> None:
    assert network_of(host) == network


def test_oldest_peer_of_the_largest_network_is_evicted_first() -> None:
    newcomers: EvictionQueue[int] = EvictionQueue()
    assert newcomers.next_to_evict() is None
    for peer, network in enumerate(["a", "b", "b", "c", "b"]):
        newcomers.add(peer, network)
    gone = []
    while (oldest := newcomers.next_to_evict()) is not None:
        gone.append(oldest)
        newcomers.discard(oldest)
        newcomers.discard(oldest)
    assert gone == [1, 2, 0, 3, 4]
    assert len(newcomers) == 0


class Counted(str):
    """A network that counts comparisons."""

    __slots__ = ()
    looks = 0

    def __hash__(self) -> int:
        Counted.looks += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Counted.looks += 1
        return super().__eq__(other)


@pytest.mark.parametrize("networks", [1, 2, 5000])
def test_eviction_takes_constant_time(networks: int) -> None:
    newcomers: EvictionQueue[int] = EvictionQueue()
    # The peers of the largest network have arrived last.
    for number in range(5000):
        newcomers.add(number, Counted(0 if number > 4000 else number % networks))
    Counted.looks = 0
    for number in range(5000, 5100):
        peer = newcomers.next_to_evict()
        assert peer is not None
        newcomers.discard(peer)
        newcomers.add(number, Counted(number % networks))
    assert Counted.looks < 100 * 20
    assert len(newcomers) == 5000
    assert sum(newcomers.networks().values()) == 5000
