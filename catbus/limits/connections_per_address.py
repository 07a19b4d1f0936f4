"""How many connections the clients at one address have, over all transports, and how many they may have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ..observability.loggers import RateLimitedLog, get_logger

logger = get_logger("catbus.limits")


class ConnectionsPerAddress:
    """Counts connections by network, of which each may have `most`. A connection from the network "" counts nowhere.

    A network is what `network_of` makes of an address: an IPv4 address, or a /64 of IPv6.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._connections: Counter[str] = Counter()
        """Only of networks that have some."""
        self._warnings = RateLimitedLog(logger.warning)

    def of(self, network: str) -> int:
        """How many connections it has."""
        return self._connections[network]

    def has_room(self, network: str, now: float) -> bool:
        """Whether it may have one more; the log says where not. `now` is in seconds."""
        if self._connections[network] < self.most:
            return True
        self._warnings.log(
            now,
            "an address has as many connections as it may have (limits.address_connections); if it is that of a proxy, "
            "name it in websocket.trusted_proxies",
            network=network,
            limit=self.most,
        )
        return False

    def enter(self, network: str) -> None:
        """Count one more."""
        if network:
            self._connections[network] += 1

    def leave(self, network: str) -> None:
        """One that has entered is gone."""
        if network:
            self._connections[network] -= 1
            if not self._connections[network]:
                del self._connections[network]

    @contextmanager
    def holding(self, network: str, now: float) -> Iterator[bool]:
        """Count one for as long as the block runs, unless there is no room for it: then the block gets False."""
        if not self.has_room(network, now):
            yield False
            return
        self.enter(network)
        try:
            yield True
        finally:
            self.leave(network)
