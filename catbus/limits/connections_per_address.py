"""The connections of each client address, over all transports, and their limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ..observability.loggers import RateLimitedLog, get_logger

logger = get_logger("catbus.limits")


class ConnectionsPerAddress:
    """Counts connections by network. Each network may have `limit`. A connection from the network "" does not count.

    `network_of` makes the network of an address: an IPv4 address, or a /64 of IPv6.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._connections: Counter[str] = Counter()
        """Only networks with connections."""
        self._warnings = RateLimitedLog(logger.warning)

    def count(self, network: str) -> int:
        """The number of connections of a network."""
        return self._connections[network]

    def allows(self, network: str, now: float) -> bool:
        """Whether a network may have one more connection; if not, it is logged. `now` is in seconds."""
        if self._connections[network] < self.limit:
            return True
        self._warnings.log(
            now,
            "an address has reached limits.address_connections; if it is the address of a proxy, "
            "add it to websocket.trusted_proxies",
            network=network,
            limit=self.limit,
        )
        return False

    def add(self, network: str) -> None:
        """Count one connection more."""
        if network:
            self._connections[network] += 1

    def remove(self, network: str) -> None:
        """Count one connection less."""
        if network:
            self._connections[network] -= 1
            if not self._connections[network]:
                del self._connections[network]

    @contextmanager
    def counted(self, network: str, now: float) -> Iterator[bool]:
        """Count one connection while the block runs, and give it True; give it False over the limit."""
        if not self.allows(network, now):
            yield False
            return
        self.add(network)
        try:
            yield True
        finally:
            self.remove(network)
