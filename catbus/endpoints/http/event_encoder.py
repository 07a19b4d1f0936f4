"""Items of a send queue as the blocks of an event stream."""

from __future__ import annotations

from collections.abc import Sequence

from ...delivery.encoded_messages import QueueItem
from ...protocol.wire_messages import ProtocolVersion
from ..item_encoder import ItemEncoder


def make_event_encoder() -> ItemEncoder:
    """Return an encoder of event streams."""
    return ItemEncoder({ProtocolVersion.EVENTS: _encode_blocks})


def _encode_blocks(items: Sequence[QueueItem]) -> bytes:
    return b"".join([item if isinstance(item, bytes) else item.events for item in items])
