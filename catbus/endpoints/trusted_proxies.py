"""The address of a client: the other end of its connection, or the address that a trusted proxy reports."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import NamedTuple

from ..observability.loggers import get_logger
from .http.forwarded_headers import forwarded_addresses
from .http.http_request import HttpRequest
from .ip_networks import address_of, network_of

logger = get_logger("catbus.endpoints")


class ClientAddress(NamedTuple):
    """The network of a client, and the network whose limit its connections count for ("" for no limit)."""

    network: str
    limited_network: str


UNKNOWN_ADDRESS = ClientAddress("", "")


class TrustedProxies:
    """The proxies whose `Forwarded` and `X-Forwarded-For` headers are believed, by their networks.

    Connections from these proxies and from this machine have no limit, because they may serve many clients.
    """

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ip_network(each) for each in networks]
        self._warned = False
        self.connection_address = lru_cache(4096)(self._connection_address)

    def client_address(self, peer: str, request: HttpRequest) -> ClientAddress:
        """Return the address of the client that sent a request over a connection from `peer`.

        Each proxy appends the address of its own peer to a list, and the items before that may be forged. So the
        client is the last address in the list that is not a trusted proxy. If that is not an address, the proxy counts
        as the client.
        """
        found = self.connection_address(peer)
        listed = forwarded_addresses(request)
        if not self._trusts(peer):
            if listed and peer:
                self._warn_untrusted(peer)
            return found
        for hop in reversed(listed):
            if _address(hop) is None:
                return self.connection_address(peer)
            found = self.connection_address(hop)
            if not self._trusts(hop):
                break
        return found

    def _connection_address(self, host: str) -> ClientAddress:
        """Return the address to count for a connection from `host`."""
        address = _address(host)
        if address is None:
            return UNKNOWN_ADDRESS
        network = network_of(host)
        return ClientAddress(network, "" if address.is_loopback or self._trusts(host) else network)

    def _trusts(self, host: str) -> bool:
        address = _address(host)
        return address is not None and any(address in network for network in self._networks)

    def _warn_untrusted(self, peer: str) -> None:
        """Log the first request with such headers from an untrusted peer. More lines could be forced by any peer."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "an untrusted proxy forwards requests, so its clients count as one address: if the proxy is "
                "yours, add it to websocket.trusted_proxies (CATBUS_TRUSTED_PROXIES)",
                address=peer,
            )


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return address_of(host)
    except ValueError:
        return None
