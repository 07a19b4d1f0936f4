"""Which addresses are counted as one: what a single peer can easily have many of is no way to be many."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address


@lru_cache(4096)
def address_of(host: str) -> IPv4Address | IPv6Address:
    """An IP address without its zone; IPv4 where IPv6 carries it. Raises `ValueError` for anything else."""
    address = ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(4096)
def network_of(host: str) -> str:
    """The network of an IP address: an IPv4 address by itself, also one that IPv6 carries, and a /64 in IPv6."""
    address = address_of(host)
    if not isinstance(address, IPv6Address):
        return str(address)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
