"""Where clients are: at the other end of their connections, or where proxies that are trusted say."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import NamedTuple

from ..observability.loggers import get_logger
from .http.forwarded_headers import hops
from .http.http_request import HttpRequest
from .ip_networks import address_of, network_of

logger = get_logger("catbus.endpoints")


class ClientAddress(NamedTuple):
    """Where a client is: the network, and the one under which its connections count ("" where they have no limit)."""

    network: str
    limited: str


NOWHERE = ClientAddress("", "")


class TrustedProxies:
    """The proxies whose word is taken for where a client is: those with an address in one of these networks.

    Connections of their own, and those from this machine, have no limit: behind them there may be many clients.
    """

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ip_network(each) for each in networks]
        self._suspected = False
        self.source_of = lru_cache(4096)(self._source_of)

    def client_of(self, peer: str, request: HttpRequest) -> ClientAddress:
        """Where the client of a request is that has come over a connection from `peer`.

        Each proxy adds where its own peer is to the end of a list, and what stands before that may be forged. So the
        client is the last in it that is no trusted proxy. Where that makes no sense, it is the proxy itself.
        """
        found = self.source_of(peer)
        listed = hops(request)
        if not self._trusts(peer):
            if listed and peer:
                self._suspect(peer)
            return found
        for hop in reversed(listed):
            if _address(hop) is None:
                return self.source_of(peer)
            found = self.source_of(hop)
            if not self._trusts(hop):
                break
        return found

    def _source_of(self, host: str) -> ClientAddress:
        """Where a connection from this address is from."""
        address = _address(host)
        if address is None:
            return NOWHERE
        network = network_of(host)
        return ClientAddress(network, "" if address.is_loopback or self._trusts(host) else network)

    def _trusts(self, host: str) -> bool:
        address = _address(host)
        return address is not None and any(address in network for network in self._networks)

    def _suspect(self, peer: str) -> None:
        """Say once that somebody is a proxy, or says so: later there would be a line for each who likes to."""
        if not self._suspected:
            self._suspected = True
            logger.warning(
                "a proxy that is not trusted hands requests on, so that its clients count as one address: if it is "
                "yours, name it in websocket.trusted_proxies (CATBUS_TRUSTED_PROXIES)",
                address=peer,
            )


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return address_of(host)
    except ValueError:
        return None
