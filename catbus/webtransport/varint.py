"""The variable-length integers of QUIC (RFC 9000 section 16)."""

from __future__ import annotations

MAX = (1 << 62) - 1
MAX_LENGTH = 8


def encode(value: int) -> bytes:
    """Encode `value` in the shortest form."""
    for power in range(4):
        length = 1 << power
        if value < 1 << (8 * length - 2):
            return (value | power << (8 * length - 2)).to_bytes(length, "big")
    raise ValueError(f"too large for a variable-length integer: {value:#x}")


def decode(data: bytes | bytearray, position: int = 0) -> tuple[int, int] | None:
    """Return the integer at `position` and the position behind it, or None if it is incomplete."""
    if position >= len(data):
        return None
    power = data[position] >> 6
    end = position + (1 << power)
    if end > len(data):
        return None
    value = int.from_bytes(data[position:end], "big")
    return value & ((1 << (8 * (end - position) - 2)) - 1), end
