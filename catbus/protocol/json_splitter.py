"""A splitter of a byte stream into JSON objects, which need no separator and may arrive in any pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ..close_codes import CloseCode
from ..error_codes import ErrorCode
from ..errors import PeerError
from .wire_messages import UNDECODABLE, decoding_error

M = TypeVar("M")

_LINES = 4096
"""Bytes of lines that are split at a time."""
_OPEN = ord("{")
_SPACE = re.compile(rb"[ \t\r\n]+")

# The states of the scanner: each pattern matches up to the next byte (in the group) that changes the state.
_OBJECT = re.compile(rb'[^"{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*"[^"{}]*+)*(["{}]?)', re.DOTALL)
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*(["\\]?)', re.DOTALL)
_ESCAPED = re.compile(rb"(.)", re.DOTALL)


class JsonSplitter(Generic[M]):
    """Splits a byte stream into JSON objects and decodes them.

    `decode` takes the bytes of one object, perhaps with white space around it, and raises one of `wire.UNDECODABLE`
    for anything else. Between two feeds only an incomplete object is kept, and at most `limit` bytes of it.
    """

    __slots__ = ("_begun", "_decode", "_level", "_until", "limit")

    def __init__(self, decode: Callable[[bytes], M], limit: int = 65536) -> None:
        self._decode = decode
        self.limit = limit
        """Bytes that an object may have. It may be changed whenever an object has been yielded."""
        self._begun = bytearray()
        self._level = 0
        self._until = _OBJECT

    def feed(self, data: bytes) -> Iterator[M | PeerError]:
        """Take the next bytes and yield the messages that they complete, one at a time.

        For an object that does not decode, the `PeerError` (bad_message) to reply with is yielded. Raises `PeerError`
        with `close`, after the messages before it: bad_message for anything but white space between objects, too_large
        for an object of more than `limit` bytes. Exhaust the iterator before the next call; after an error there must
        be none.
        """
        decode = self._decode
        result: M | PeerError
        position, lines_tried = 0, False
        while position < len(data):
            if not self._level:
                if not lines_tried:
                    # Most often every line is one object. From the first other line on, the scanner finds their ends.
                    for line in _next_lines(data, position):
                        if line:
                            if len(line) > self.limit:
                                lines_tried = True
                                break
                            try:
                                result = decode(line)
                            except UNDECODABLE:
                                lines_tried = True
                                break
                            position += len(line)
                            yield result
                        position += 1
                    continue
                if data[position] != _OPEN:
                    position = _skip_space(data, position)
                    continue
            end = self._scan(data, position)
            if end is None:
                return
            text = data[position:end]
            if self._begun:
                text = bytes(self._begun) + text
                self._begun.clear()
            try:
                result = decode(text)
            except UNDECODABLE as error:
                result = decoding_error(error, text)
            position = end
            yield result

    def _scan(self, data: bytes, start: int) -> int | None:
        """Continue with an object. Returns its end, or None if `data` does not contain it; then the rest is kept."""
        room = self.limit - len(self._begun)
        stop = len(data) if len(data) - start <= room else start + room
        position, level, until = start, self._level, self._until
        while position < stop and (match := until.match(data, position, stop)):
            byte = match[1]
            if not byte:
                break
            position = match.end()
            if until is _ESCAPED:
                until = _STRING
            elif byte == b"{":
                level += 1
            elif byte == b"}":
                level -= 1
                if not level:
                    break
            elif byte == b'"':
                until = _OBJECT if until is _STRING else _STRING
            elif byte == b"\\":
                until = _ESCAPED
        self._level, self._until = level, until
        if not level:
            return position
        if stop < len(data):
            raise PeerError(ErrorCode.TOO_LARGE, f"larger than {self.limit} bytes", CloseCode.TOO_LARGE)
        self._begun += data[start:]
        return None


def _next_lines(data: bytes, start: int) -> list[bytes]:
    """The next lines, at least one. They are about `_LINES` bytes, as they may be kept for long."""
    stop = start + _LINES
    end = len(data) if stop >= len(data) else data.rfind(b"\n", start, stop)
    if end < 0:
        end = data.find(b"\n", stop)
    return data[start : end if end >= 0 else len(data)].split(b"\n")


def _skip_space(data: bytes, position: int) -> int:
    space = _SPACE.match(data, position)
    if space is None:
        raise PeerError(ErrorCode.BAD_MESSAGE, "only JSON objects may be sent", CloseCode.BAD_MESSAGE)
    return space.end()
