"""Which addresses a delivery may be sent to: public ones, and those in networks that the configuration allows. Pure.

The tables follow IANA's registries of special-purpose addresses (RFC 6890). They stand here, because those of Python's
`ipaddress` differ between its releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address

_NOT_PUBLIC = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, and the metadata of clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "2001::/23",  # protocol assignments, Teredo
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which encloses an IPv4 address
        "3fff::/20",  # documentation
    )
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
"""All other IPv6 addresses are private, link-local, multicast, loopback or reserved."""
_NAT64 = IPv6Network("64:ff9b::/96")
"""The addresses of IPv4 hosts in networks with IPv6 only (RFC 6052)."""


class AddressRules:
    """The rules for the addresses of receivers. `allowed` names networks, such as "10.0.0.0/8", and addresses."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._allowed = [ip_network(text, strict=False) for text in allowed]

    def permits(self, text: str, *, encrypted: bool) -> bool:
        """Whether a delivery may connect to this address. Without encryption, only to an allowed one."""
        address = _unwrap(ip_address(text))
        if any(address in network for network in self._allowed):
            return True
        return encrypted and is_public(address)


def is_public(address: Address) -> bool:
    """Whether an address is one that the whole internet routes to one host."""
    address = _unwrap(address)
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return not any(address in network for network in _NOT_PUBLIC)


def _unwrap(address: Address) -> Address:
    """The IPv4 address in an IPv6 address that stands for one."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address
