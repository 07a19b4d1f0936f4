"""A parser of event streams (WHATWG HTML, section 9.2.6), in pieces as they arrive. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_EVENT_SIZE = 16 << 20
"""Bytes that one event may have, by default."""

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventTooLarge(ValueError):
    """The stream has a line or an event over the limit."""


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event. `name` is "message" if the stream does not name it. `id` is the last one that the stream has set."""

    name: str
    data: str
    id: str


class EventStreamParser:
    """Parses one stream. `last_id` is the id of the last complete block, with or without data.

    `retry` is the reconnection time that the stream has set, in milliseconds, or None. An incomplete block at the end
    of a stream is not an event.
    """

    def __init__(self, max_event_size: int = MAX_EVENT_SIZE) -> None:
        self.last_id = ""
        self.retry: int | None = None
        self._max_event_size = max_event_size
        self._line: list[bytes] = []
        """The pieces of an incomplete line."""
        self._after_return = False
        """Whether a line feed at the start of the next piece belongs to the last line's end."""
        self._first = True
        self._name = ""
        self._data: list[str] = []
        self._id = ""
        self._size = 0
        """Bytes of the incomplete block."""

    def feed(self, data: bytes) -> Iterator[ServerSentEvent]:
        """Yield the events that are complete after these bytes. Take all of them before the next call.

        Raises `EventTooLarge`; the stream is unusable then.
        """
        if not data:
            return
        start = 1 if self._after_return and data.startswith(b"\n") else 0
        self._after_return = data.endswith(b"\r")
        *lines, rest = _LINE_END.split(data[start:])
        for line in lines:
            self._grow(line)
            whole = b"".join(self._line)
            self._line.clear()
            if self._first:
                whole, self._first = whole.removeprefix(_BYTE_ORDER_MARK), False
            event = self._take_line(whole.decode(errors="replace"))
            if event is not None:
                yield event
        if rest:
            self._grow(rest)

    def _grow(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._max_event_size:
            raise EventTooLarge(f"an event has more than {self._max_event_size} bytes")
        self._line.append(piece)

    def _take_line(self, line: str) -> ServerSentEvent | None:
        if not line:
            return self._end_block()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                self._name = value
            case "data":
                self._data.append(value)
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry = int(value[:9])
        return None

    def _end_block(self) -> ServerSentEvent | None:
        self.last_id = self._id
        event = ServerSentEvent(self._name or "message", "\n".join(self._data), self._id) if self._data else None
        self._name, self._size = "", 0
        self._data.clear()
        return event
