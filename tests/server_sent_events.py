"""A parser of event streams for tests, written from WHATWG HTML, section 9.2.6."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """An event: its type, its data as decoded JSON, and the last event id after it.

    `EventParser.blocks` also returns blocks that fire no event. Their type is empty.
    """

    type: str
    data: Any
    last_id: str


@dataclass
class EventParser:
    """Parses the bytes of an event stream in any pieces."""

    last_id: str = ""
    retry: int | None = None
    """The reconnection time in milliseconds."""
    _decoder: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"))
    _rest: str = ""
    _type: str = ""
    _data: list[str] = field(default_factory=list)
    _id: str | None = None

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that these bytes complete. A block of `id` alone changes `last_id` and is no event."""
        return [block for block in self.blocks(data) if block.type]

    def blocks(self, data: bytes) -> list[Event]:
        """Return the blocks that these bytes complete, also those that fire no event."""
        *lines, self._rest = (self._rest + self._decoder.decode(data)).split("\n")
        found: list[Event] = []
        for line in lines:
            if not line:
                found.append(self._dispatch())
                continue
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            match name:
                case "event":
                    self._type = value
                case "data":
                    self._data.append(value)
                case "id" if "\0" not in value:
                    self._id = value
                case "retry" if value.isdigit():
                    self.retry = int(value)
        return found

    def _dispatch(self) -> Event:
        if self._id is not None:
            self.last_id = self._id
        kind, data = (self._type or "message", json.loads("\n".join(self._data))) if self._data else ("", None)
        self._type, self._data, self._id = "", [], None
        return Event(kind, data, self.last_id)
