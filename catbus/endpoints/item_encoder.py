"""The items of send queues as the bytes of a transport, encoded once for all connections that send the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..delivery.encoded_messages import QueueItem
from ..protocol.wire_messages import ProtocolVersion


class ItemEncoder:
    """Encodes items of a send queue, in the version of the protocol that its client reads.

    Subscribers of a pattern mostly send the same items, one after another. So the last result is cached, and the items
    are encoded once for all subscribers.
    """

    def __init__(self, encoders: Mapping[ProtocolVersion, Callable[[Sequence[QueueItem]], bytes]]) -> None:
        self._encoders = encoders
        self._items: Sequence[QueueItem] = ()
        self._protocol = ProtocolVersion.V1
        self._encoded = b""

    def encode_items(self, items: Sequence[QueueItem], protocol: ProtocolVersion) -> bytes:
        """Encode `items` in order."""
        if items != self._items or protocol is not self._protocol:
            encoded = self._encoders[protocol](items) if items else b""
            self._items, self._protocol, self._encoded = items, protocol, encoded
        return self._encoded
