"""Items of a send queue as the body of an event stream, in chunks (RFC 9112, section 7.1)."""

from __future__ import annotations

from collections.abc import Sequence

from ...delivery.encoded_messages import QueueItem
from ...protocol.wire_messages import ProtocolVersion
from ..item_encoder import ItemEncoder

LAST_CHUNK = b"0\r\n\r\n"


def make_event_encoder(*, chunked: bool = True) -> ItemEncoder:
    """Return an encoder of event streams. Without `chunked` it is for HTTP/1.0, where the connection ends the body."""
    return ItemEncoder({ProtocolVersion.EVENTS: _encode_chunk if chunked else encode_blocks})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def encode_blocks(items: Sequence[QueueItem]) -> bytes:
    return b"".join([item if isinstance(item, bytes) else item.events for item in items])


def _encode_chunk(items: Sequence[QueueItem]) -> bytes:
    return chunk(encode_blocks(items))
