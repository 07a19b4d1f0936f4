"""The network that an IP address counts for in limits, because one peer may easily use a whole IPv6 /64."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address


@lru_cache(4096)
def address_of(host: str) -> IPv4Address | IPv6Address:
    """Parse an IP address, without its zone; an IPv4-mapped IPv6 address becomes IPv4. Raises `ValueError`."""
    address = ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(4096)
def network_of(host: str) -> str:
    """Return the network of an IP address: an IPv4 address itself (also when IPv4-mapped), or an IPv6 /64."""
    address = address_of(host)
    if not isinstance(address, IPv6Address):
        return str(address)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
