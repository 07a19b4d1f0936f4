"""Which addresses count as one."""

from __future__ import annotations

import pytest

from catbus.endpoints.networks import Newcomers, network_of


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
def test_an_ipv4_address_counts_by_itself_and_ipv6_addresses_by_their_64(host: str, network: str) -> None:
    assert network_of(host) == network


def test_the_oldest_newcomer_of_the_network_that_has_most_gives_way_first() -> None:
    newcomers: Newcomers[int] = Newcomers()
    assert newcomers.next_to_go() is None
    for peer, network in enumerate(["a", "b", "b", "c", "b"]):
        newcomers.add(peer, network)
    gone = []
    while (peer := newcomers.next_to_go()) is not None:
        gone.append(peer)
        newcomers.discard(peer)
        newcomers.discard(peer)
    assert gone == [1, 2, 0, 4, 3]
    assert len(newcomers) == 0
