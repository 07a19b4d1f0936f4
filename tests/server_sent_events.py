"""A parser of event streams for tests, written from WHATWG HTML, section 9.2.6."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """An event: its type, its data as decoded JSON, and the last event id after it."""

    type: str
    data: Any
    last_id: str


@dataclass
class EventParser:
    """Parses the bytes of an event stream in any pieces."""

    last_id: str = ""
    retry: int | None = None
    """The reconnection time in milliseconds."""
    _rest: str = ""
    _type: str = ""
    _data: list[str] = field(default_factory=list)
    _id: str | None = None

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that these bytes complete. A block of `id` alone changes `last_id` and is no event."""
        *lines, self._rest = (self._rest + data.decode()).split("\n")
        found: list[Event] = []
        for line in lines:
            if not line:
                found += self._dispatch()
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

    def _dispatch(self) -> list[Event]:
        if self._id is not None:
            self.last_id = self._id
        events = [Event(self._type or "message", json.loads("\n".join(self._data)), self.last_id)] if self._data else []
        self._type, self._data, self._id = "", [], None
        return events
