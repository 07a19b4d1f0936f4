"""Which addresses count as one."""

from __future__ import annotations

import pytest

from catbus.endpoints.networks import network_of


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
