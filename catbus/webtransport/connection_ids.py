"""The connection IDs of workers that share an address: the first byte of each ID names its worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ConnectionIdShare:
    """The connection IDs of the worker `number` out of `count`: those whose first byte is `number` modulo `count`.

    The kernel steers datagrams by the same rule, so a client whose address changes stays with its worker. A server
    without workers has all IDs (`ALL_CONNECTION_IDS`). `count` is 256 at most.
    """

    number: int
    count: int

    def name(self, connection_id: bytes) -> bytes:
        """Return a random ID with its first byte changed so that the ID is in this share."""
        first = connection_id[0]
        named = first - first % self.count + self.number
        return bytes([named if named < 256 else named - self.count]) + connection_id[1:]

    def __contains__(self, connection_id: bytes) -> bool:
        """Whether datagrams with this ID are for this worker. An empty ID names no worker, and is for each."""
        return not connection_id or connection_id[0] % self.count == self.number


ALL_CONNECTION_IDS = ConnectionIdShare(0, 1)
"""The share of a server without workers."""
