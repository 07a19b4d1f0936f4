"""Capsules on the CONNECT stream (RFC 9297 section 3): what they say is read, the rest is skipped, not kept."""

from __future__ import annotations

from dataclasses import dataclass

from . import varint

CLOSE_SESSION = 0x2843
"""CLOSE_WEBTRANSPORT_SESSION, draft-ietf-webtrans-http3 section 6."""

FORBIDDEN = {0x190B4D3E: "WT_MAX_STREAM_DATA", 0x190B4D42: "WT_STREAM_DATA_BLOCKED"}
"""QUIC limits single streams itself. The other capsules about flow control are ignored, as nobody has agreed on it
(draft-ietf-webtrans-http3 sections 5.1 and 5.4), and so is WT_DRAIN_SESSION: a client leaves when it likes."""

MAX_REASON = 1024

_HEADER = 2 * varint.MAX_LENGTH


class CapsuleError(Exception):
    """The peer's capsules cannot be read on; the stream is malformed (RFC 9297 section 3.3)."""


@dataclass(frozen=True, slots=True)
class Close:
    """The session ends with these words."""

    code: int
    reason: str


class CapsuleReader:
    """Reads capsules, however they are cut. Never keeps more than one header and one reason."""

    __slots__ = ("_begun", "_skip", "_wanted")

    def __init__(self) -> None:
        self._begun = bytearray()
        self._skip = 0
        self._wanted = 0

    @property
    def between(self) -> bool:
        """Whether no capsule has been begun and not finished: a stream may only end here."""
        return not (self._begun or self._skip or self._wanted)

    def feed(self, data: bytes) -> Close | None:
        """Take what comes next. What follows a `Close` has no meaning: feed nothing more.

        Raises CapsuleError when a CLOSE_WEBTRANSPORT_SESSION has a length that it cannot have, or a reason that is no
        UTF-8, and for what must not be sent.
        """
        position = 0
        while position < len(data):
            if self._skip:
                skipped = min(self._skip, len(data) - position)
                self._skip -= skipped
                position += skipped
                continue
            wanted = self._wanted or _HEADER
            taken = data[position : position + wanted - len(self._begun)]
            before = len(self._begun)
            self._begun += taken
            position += len(taken)
            if self._wanted:
                if len(self._begun) < self._wanted:
                    return None
                try:
                    reason = self._begun[4:].decode()
                except UnicodeDecodeError:
                    raise CapsuleError("a reason that is no UTF-8") from None
                return Close(int.from_bytes(self._begun[:4], "big"), reason)
            header = _header(self._begun)
            if header is None:
                continue
            kind, length, end = header
            # What stands behind the header is read again, as what it is.
            position += end - before - len(taken)
            self._begun.clear()
            if kind in FORBIDDEN:
                raise CapsuleError(FORBIDDEN[kind])
            if kind != CLOSE_SESSION:
                self._skip = length
            elif 4 <= length <= 4 + MAX_REASON:
                self._wanted = length
            else:
                raise CapsuleError(f"CLOSE_WEBTRANSPORT_SESSION of {length} bytes")
        return None


def _header(data: bytearray) -> tuple[int, int, int] | None:
    kind = varint.decode(data)
    length = kind and varint.decode(data, kind[1])
    return (kind[0], length[0], length[1]) if kind and length else None


def encode_close(code: int, reason: str) -> bytes:
    """CLOSE_WEBTRANSPORT_SESSION, its reason cut to 1024 bytes without cutting a character."""
    text = reason.encode("utf-8", "replace")[:MAX_REASON].decode("utf-8", "ignore").encode()
    value = code.to_bytes(4, "big") + text
    return varint.encode(CLOSE_SESSION) + varint.encode(len(value)) + value
