"""Capsules on the CONNECT stream (RFC 9297 section 3). The close capsule is decoded, others are skipped unbuffered."""

from __future__ import annotations

from dataclasses import dataclass

from . import varint

CLOSE_SESSION = 0x2843
"""CLOSE_WEBTRANSPORT_SESSION, draft-ietf-webtrans-http3 section 6."""

FORBIDDEN_CAPSULES = {0x190B4D3E: "WT_MAX_STREAM_DATA", 0x190B4D42: "WT_STREAM_DATA_BLOCKED"}
"""Capsules that a peer must not send, because QUIC limits each stream itself (draft-ietf-webtrans-http3 section 5.4).

The other flow-control capsules are ignored, because flow control of sessions was not negotiated (section 5.1). So is
WT_DRAIN_SESSION: a client decides itself when to leave."""

MAX_REASON_LENGTH = 1024

_MAX_HEADER_LENGTH = 2 * varint.MAX_LENGTH


class CapsuleError(Exception):
    """The peer sent malformed capsules, so the stream cannot be read further (RFC 9297 section 3.3)."""


@dataclass(frozen=True, slots=True)
class CloseCapsule:
    """CLOSE_WEBTRANSPORT_SESSION: the peer ends the session."""

    code: int
    reason: str


class CapsuleReader:
    """An incremental decoder. It buffers one header and one close reason at most."""

    __slots__ = ("_buffer", "_expected", "_to_skip")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._to_skip = 0
        self._expected = 0

    @property
    def at_boundary(self) -> bool:
        """Whether no capsule is incomplete. A stream may end only here."""
        return not (self._buffer or self._to_skip or self._expected)

    def feed(self, data: bytes) -> CloseCapsule | None:
        """Decode the next bytes of the stream. Feed nothing after a `CloseCapsule`: bytes behind it have no meaning.

        Raises CapsuleError for a forbidden capsule, and for a CLOSE_WEBTRANSPORT_SESSION with an invalid length or a
        reason that is not UTF-8.
        """
        position = 0
        while position < len(data):
            if self._to_skip:
                skipped = min(self._to_skip, len(data) - position)
                self._to_skip -= skipped
                position += skipped
                continue
            wanted = self._expected or _MAX_HEADER_LENGTH
            taken = data[position : position + wanted - len(self._buffer)]
            before = len(self._buffer)
            self._buffer += taken
            position += len(taken)
            if self._expected:
                if len(self._buffer) < self._expected:
                    return None
                try:
                    reason = self._buffer[4:].decode()
                except UnicodeDecodeError:
                    raise CapsuleError("the reason is not UTF-8") from None
                return CloseCapsule(int.from_bytes(self._buffer[:4], "big"), reason)
            header = _header(self._buffer)
            if header is None:
                continue
            kind, length, end = header
            # The bytes behind the header belong to the value: the next iteration reads them again.
            position += end - before - len(taken)
            self._buffer.clear()
            if kind in FORBIDDEN_CAPSULES:
                raise CapsuleError(FORBIDDEN_CAPSULES[kind])
            if kind != CLOSE_SESSION:
                self._to_skip = length
            elif 4 <= length <= 4 + MAX_REASON_LENGTH:
                self._expected = length
            else:
                raise CapsuleError(f"CLOSE_WEBTRANSPORT_SESSION of {length} bytes")
        return None


def _header(data: bytearray) -> tuple[int, int, int] | None:
    kind = varint.decode(data)
    length = kind and varint.decode(data, kind[1])
    return (kind[0], length[0], length[1]) if kind and length else None


def encode_close(code: int, reason: str) -> bytes:
    """Encode CLOSE_WEBTRANSPORT_SESSION. The reason is truncated to 1,024 bytes, at a character boundary."""
    text = reason.encode("utf-8", "replace")[:MAX_REASON_LENGTH].decode("utf-8", "ignore").encode()
    value = code.to_bytes(4, "big") + text
    return varint.encode(CLOSE_SESSION) + varint.encode(len(value)) + value
