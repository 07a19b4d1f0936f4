"""WebSocket frames of a server (RFC 6455, section 5). They are unmasked, so the same bytes serve every client."""

from __future__ import annotations

from collections.abc import Sequence

from ...delivery.encoded_messages import QueueItem
from ...protocol.wire_messages import ProtocolVersion
from ..item_encoder import ItemEncoder

FRAME_SIZE = 65_536
"""Bytes of lines in one frame, approximately. A single longer item makes a longer frame."""

PING = b"\x89\x00"

_CLOSE = b"\x88"
_MAX_REASON = 123


def text_header(size: int) -> bytes:
    """Return the frame header of a text message of `size` bytes."""
    if size < 126:
        return bytes((0x81, size))
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2, "big")
    return b"\x81\x7f" + size.to_bytes(8, "big")


def close_frame(code: int, reason: str) -> bytes:
    """Return a Close frame. A reason that is too long is cut between characters."""
    text = reason.encode()[:_MAX_REASON].decode(errors="ignore").encode()
    return _CLOSE + bytes((2 + len(text),)) + code.to_bytes(2, "big") + text


def is_close(data: bytes) -> bool:
    """Whether a frame is a Close frame."""
    return data.startswith(_CLOSE)


def make_frame_encoder() -> ItemEncoder:
    """Return an encoder of frames.

    A `catbus.v1` client gets as many lines in a frame as fit. A first-version client gets one frame for each line.
    """
    return ItemEncoder({ProtocolVersion.V1: _encode_lines, ProtocolVersion.FIRST: _encode_first_version})


def _encode_lines(items: Sequence[QueueItem]) -> bytes:
    parts: list[bytes] = []
    begun: list[bytes] = []
    size = 0
    for item in items:
        lines = item if isinstance(item, bytes) else item.lines
        if size and size + len(lines) > FRAME_SIZE:
            parts += [text_header(size), *begun]
            begun, size = [], 0
        begun.append(lines)
        size += len(lines)
    if size:
        parts += [text_header(size), *begun]
    return b"".join(parts)


def _encode_first_version(items: Sequence[QueueItem]) -> bytes:
    parts: list[bytes] = []
    for item in items:
        for line in (item,) if isinstance(item, bytes) else item.first_version_lines:
            text = line.removesuffix(b"\n")
            parts += (text_header(len(text)), text)
    return b"".join(parts)
