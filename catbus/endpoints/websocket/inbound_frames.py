"""What a WebSocket client sends, on its way to trio-websocket: joined where that is possible, and bounded.

A frame costs trio-websocket some fifty microseconds, an object in one costs two. To the session a WebSocket is a stream
of text whose frames mean nothing, so that text frames that have arrived together can go on as one.

The library takes all frames of what it is given in one go, and keeps a part for each fragment of a message until the
last one has come. So it is given few frames at a time, and no message that is too large or comes in too many fragments.
"""

from __future__ import annotations

FRAMES = 50
"""About how many frames go on at a time."""
LOOKED_AT = 400
"""How many frames are looked at before others have their turn, of which many may be joined."""
FRAGMENTS = 128
"""How many fragments any message may have."""
FRAGMENT_SIZE = 32
"""Bytes of a message for which it may have one fragment more."""

TOO_LARGE = 1009, "a message is too large"
TOO_MANY_FRAGMENTS = 1009, "a message comes in too many fragments"

_FINAL = 0x80
_WHOLE_TEXT = 0x81
_CLOSE = 0x88
_CONTROL = 0x08
_OPCODE = 0x0F
_MASKED = 0x80
_MASK = 4
_UNMASKED = bytes(_MASK)


class InboundFrames:
    """Rewrites what a client sends: whole text frames in a row become one, of up to about `limit` bytes.

    Everything else passes as it came, faults included, for the library to judge: control frames, binary ones,
    fragments, frames that did not arrive whole, and text that is not ASCII, of which each message must be valid UTF-8.
    A whole text frame amid fragments is a fault, and so is what is made of several.

    `feed` takes bytes, and `take` gives those to pass on, until it gives none: then it is time for more. `skip` takes
    bytes of which nothing is passed on any more. Between two calls others may have their turn.
    """

    __slots__ = (
        "_broken",
        "_data",
        "_fragments",
        "_limit",
        "_position",
        "_rest",
        "_size",
        "ended",
        "largest",
        "refused",
    )

    def __init__(self, limit: int = 65_536, largest: int = 1 << 20) -> None:
        self.largest = largest
        """How many bytes a message may have."""
        self.refused: tuple[int, str] | None = None
        """The code and the reason to close with, of a client of which nothing more is taken."""
        self.ended = False
        """Whether the client's Close frame has come, or something after which none could be told from the rest."""
        self._limit = limit
        self._data = b""
        self._position = 0
        """Where in it that begins which has not been passed on: in the end, a header that has not come whole."""
        self._rest = 0
        """How much of a frame that passes as it is has yet to come."""
        self._broken = False
        """Whether there was something that is no frame of a client: the library will end the connection over it."""
        self._fragments = self._size = 0
        """Of the message that has begun."""

    def feed(self, data: bytes) -> None:
        """Take bytes, after all that could be passed on has been taken."""
        self._data += data

    def take(self) -> bytes:
        """What can be passed on next, of a few hundred frames at the most; empty until more has been fed."""
        if self.refused is not None:
            self.skip(b"")
            return b""
        data, position = self._data, min(self._position + self._rest, len(self._data))
        passed = [data[self._position : position]]
        run: list[tuple[int, int, int]] = []
        self._rest -= position - self._position
        looked = 0
        while position < len(data) and looked < LOOKED_AT and len(passed) < 2 * FRAMES:
            looked += 1
            start, header = position, _header(data, position)
            if self._broken or _is_faulty(data[start : start + 2]):
                self._broken = self.ended = True
                passed += (_joined(data, run), data[start:])
                run, position = [], len(data)
                break
            if header is None:
                break
            payload, size = header
            first, end = data[start], payload + size
            if not self._is_welcome(first, size):
                break
            position = min(end, len(data))
            if first == _WHOLE_TEXT and data[start + 1] & _MASKED and end <= len(data):
                if run and position - run[0][0] > self._limit:
                    passed.append(_joined(data, run))
                    run = []
                run.append((start, payload, position))
                continue
            passed += (_joined(data, run), data[start:position])
            run = []
            self.ended = self.ended or first == _CLOSE
            self._rest = end - position
        ended = looked < LOOKED_AT and len(passed) < 2 * FRAMES
        passed.append(_joined(data, run))
        # In the end there is left a header that has not come whole, or all from where the client was refused.
        self._data, self._position = (data[position:], 0) if ended else (data, position)
        return b"".join(passed)

    def skip(self, data: bytes) -> bool:
        """Take bytes that are not passed on, to see whether the client's Close frame is among them.

        Returns whether there is more to be looked at: then call it again with none, when others have had their turn.
        """
        data, looked = self._data[self._position :] + data, 0
        position, self._rest = self._rest, 0
        while position < len(data) and not self.ended and looked < LOOKED_AT:
            looked += 1
            header = _header(data, position)
            self.ended = data[position] == _CLOSE or _is_faulty(data[position : position + 2])
            if header is None:
                break
            position = sum(header)
        self._data, self._position, self._rest = data[position:], 0, max(0, position - len(data))
        return looked == LOOKED_AT

    def _is_welcome(self, first: int, size: int) -> bool:
        """Whether a frame may pass that begins with this byte and has a payload of this size."""
        if first & _CONTROL:
            return True
        if first & _OPCODE:
            self._fragments = self._size = 0
        self._fragments += 1
        self._size += size
        if self._size > self.largest:
            self.refused = TOO_LARGE
        elif self._fragments > FRAGMENTS + self._size // FRAGMENT_SIZE:
            self.refused = TOO_MANY_FRAGMENTS
        return self.refused is None


def _header(data: bytes, start: int) -> tuple[int, int] | None:
    """Where the payload of a frame begins, and its size; None when the header has not come whole."""
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


def _is_faulty(begin: bytes) -> bool:
    """Whether a client's frame cannot begin like this: RFC 6455, sections 5.2 and 5.5."""
    first, second = begin[0], begin[-1] if len(begin) > 1 else _MASKED
    control = first & 0x08
    return first & 0x77 > 2 or not second & _MASKED or bool(control and (not first & _FINAL or second & 0x7F > 125))


def _joined(data: bytes, run: list[tuple[int, int, int]]) -> bytes:
    """A run of text frames (where each begins, its payload begins, and it ends), as one frame if that is possible."""
    if not run:
        return b""
    whole = data[run[0][0] : run[-1][2]]
    if len(run) == 1:
        return whole
    text = b"".join([_unmasked(data[payload - _MASK : payload], data[payload:end]) for _, payload, end in run])
    if not text.isascii() or any(_wasteful(start, payload, end) for start, payload, end in run):
        return whole
    size = len(text)
    if size < 126:
        length = bytes((_MASKED | size,))
    elif size < 65_536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes((_WHOLE_TEXT,)) + length + _UNMASKED + text


def _wasteful(start: int, payload: int, end: int) -> bool:
    """Whether a length is written with more bytes than it needs, which is a fault (RFC 6455, section 5.2)."""
    size, width = end - payload, payload - start - 2 - _MASK
    return (width == 2 and size < 126) or (width == 8 and size < 65_536)


def _unmasked(mask: bytes, payload: bytes) -> bytes:
    size = len(payload)
    key = (mask * (size // _MASK + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
