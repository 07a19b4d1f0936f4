"""The frames that a WebSocket client sends, on their way to trio-websocket: coalesced, and limited in size and number.

A frame costs trio-websocket about 50 µs, but an object inside a frame only 2 µs. The session reads a WebSocket as a
stream of text in which frames mean nothing, so text frames that arrived together can be joined.

The library processes all frames that it gets without a pause, and keeps each fragment of a message until the last one
has arrived. So it gets few frames at a time, and no message that is too large or has too many fragments.
"""

from __future__ import annotations

FRAMES_PER_CALL = 50
"""Frames that one `take` returns, approximately."""
FRAMES_PER_TURN = 400
"""Received frames that one call examines before other tasks run. Many of them may be joined."""
MAX_FRAGMENTS = 128
"""Fragments that every message may have."""
BYTES_PER_EXTRA_FRAGMENT = 32
"""Bytes of a message that allow one more fragment."""

TOO_LARGE = 1009, "a message is too large"
TOO_MANY_FRAGMENTS = 1009, "a message has too many fragments"

_FINAL = 0x80
_WHOLE_TEXT = 0x81
_CLOSE = 0x88
_CONTROL = 0x08
_OPCODE = 0x0F
_MASKED = 0x80
_MASK = 4
_UNMASKED = bytes(_MASK)


class InboundFrames:
    """Rewrites what a client sends: consecutive text frames are joined, up to about `limit` bytes.

    All other bytes pass unchanged, also invalid ones, which the library rejects: control frames, binary frames,
    fragments, incomplete frames, and text that is not ASCII, because each message must be valid UTF-8. An unfragmented
    text frame between fragments is an error, and stays one when frames are joined.

    Call `feed` with received bytes, then `take` until it returns none, then `feed` again. Call `discard` with bytes
    that must not reach the library. Other tasks may run between two calls.
    """

    __slots__ = (
        "_broken",
        "_data",
        "_fragments",
        "_limit",
        "_position",
        "_rest",
        "_size",
        "close_reason",
        "close_received",
        "max_message_size",
    )

    def __init__(self, limit: int = 65_536, max_message_size: int = 1 << 20) -> None:
        self.max_message_size = max_message_size
        """Bytes that a message may have."""
        self.close_reason: tuple[int, str] | None = None
        """The code and the reason to close with, once the client exceeded a limit. Then `take` returns nothing."""
        self.close_received = False
        """Whether the client's Close frame has arrived, or invalid bytes after which none could be recognized."""
        self._limit = limit
        self._data = b""
        self._position = 0
        """The start of the bytes in `_data` that `take` has not returned. In the end, an incomplete header is left."""
        self._rest = 0
        """Bytes still to arrive of a frame that passes unchanged."""
        self._broken = False
        """Whether bytes were no valid frame of a client. The library then closes the connection."""
        self._fragments = self._size = 0
        """Fragments and bytes of the current message."""

    def feed(self, data: bytes) -> None:
        """Add received bytes. Call `take` until it returns nothing first."""
        self._data += data

    def take(self) -> bytes:
        """Return the next bytes for the library, from a few hundred frames at most; empty until more bytes are fed."""
        if self.close_reason is not None:
            self.discard(b"")
            return b""
        data, position = self._data, min(self._position + self._rest, len(self._data))
        passed = [data[self._position : position]]
        run: list[tuple[int, int, int]] = []
        self._rest -= position - self._position
        examined = 0
        while position < len(data) and examined < FRAMES_PER_TURN and len(passed) < 2 * FRAMES_PER_CALL:
            examined += 1
            start, header = position, _header(data, position)
            if self._broken or _is_invalid_start(data[start : start + 2]):
                self._broken = self.close_received = True
                passed += (_join(data, run), data[start:])
                run, position = [], len(data)
                break
            if header is None:
                break
            payload, size = header
            first, end = data[start], payload + size
            if not self._is_allowed(first, size):
                break
            position = min(end, len(data))
            if first == _WHOLE_TEXT and data[start + 1] & _MASKED and end <= len(data):
                if run and position - run[0][0] > self._limit:
                    passed.append(_join(data, run))
                    run = []
                run.append((start, payload, position))
                continue
            passed += (_join(data, run), data[start:position])
            run = []
            self.close_received = self.close_received or first == _CLOSE
            self._rest = end - position
        complete = examined < FRAMES_PER_TURN and len(passed) < 2 * FRAMES_PER_CALL
        passed.append(_join(data, run))
        # What is left is an incomplete header, or everything from the frame that exceeded a limit.
        self._data, self._position = (data[position:], 0) if complete else (data, position)
        return b"".join(passed)

    def discard(self, data: bytes) -> bool:
        """Search bytes for the client's Close frame, without returning them from `take`.

        Returns whether bytes are left to examine: then let other tasks run, and call it again with no bytes.
        """
        data, examined = self._data[self._position :] + data, 0
        position, self._rest = self._rest, 0
        while position < len(data) and not self.close_received and examined < FRAMES_PER_TURN:
            examined += 1
            header = _header(data, position)
            self.close_received = data[position] == _CLOSE or _is_invalid_start(data[position : position + 2])
            if header is None:
                break
            position = sum(header)
        self._data, self._position, self._rest = data[position:], 0, max(0, position - len(data))
        return examined == FRAMES_PER_TURN

    def _is_allowed(self, first: int, size: int) -> bool:
        """Whether a frame with this first byte and this payload size is within the limits."""
        if first & _CONTROL:
            return True
        if first & _OPCODE:
            self._fragments = self._size = 0
        self._fragments += 1
        self._size += size
        if self._size > self.max_message_size:
            self.close_reason = TOO_LARGE
        elif self._fragments > MAX_FRAGMENTS + self._size // BYTES_PER_EXTRA_FRAGMENT:
            self.close_reason = TOO_MANY_FRAGMENTS
        return self.close_reason is None


def _header(data: bytes, start: int) -> tuple[int, int] | None:
    """Return the start and the size of a frame's payload, or None if the header is incomplete."""
    if start + 2 > len(data):
        return None
    size = data[start + 1] & 0x7F
    payload = start + 2
    if size >= 126:
        width = 2 if size == 126 else 8
        payload += width
        size = int.from_bytes(data[payload - width : payload], "big")
    if data[start + 1] & _MASKED:
        payload += _MASK
    return (payload, size) if payload <= len(data) else None


def _is_invalid_start(begin: bytes) -> bool:
    """Whether the first one or two bytes are invalid for a client's frame (RFC 6455, sections 5.2 and 5.5)."""
    first, second = begin[0], begin[-1] if len(begin) > 1 else _MASKED
    control = first & 0x08
    return first & 0x77 > 2 or not second & _MASKED or bool(control and (not first & _FINAL or second & 0x7F > 125))


def _join(data: bytes, run: list[tuple[int, int, int]]) -> bytes:
    """Join text frames, given as (start, start of the payload, end), into one frame if that is possible."""
    if not run:
        return b""
    whole = data[run[0][0] : run[-1][2]]
    if len(run) == 1:
        return whole
    text = b"".join([_unmask(data[payload - _MASK : payload], data[payload:end]) for _, payload, end in run])
    if not text.isascii() or any(_has_overlong_length(start, payload, end) for start, payload, end in run):
        return whole
    size = len(text)
    if size < 126:
        length = bytes((_MASKED | size,))
    elif size < 65_536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes((_WHOLE_TEXT,)) + length + _UNMASKED + text


def _has_overlong_length(start: int, payload: int, end: int) -> bool:
    """Whether a length is encoded with more bytes than it needs, which is invalid (RFC 6455, section 5.2)."""
    size, width = end - payload, payload - start - 2 - _MASK
    return (width == 2 and size < 126) or (width == 8 and size < 65_536)


def _unmask(mask: bytes, payload: bytes) -> bytes:
    size = len(payload)
    key = (mask * (size // _MASK + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
