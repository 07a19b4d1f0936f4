"""A blocking client of `GET /events` (section 14 of the specification), without the client library."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

import h11

from ..client.broker_address import make_ssl_context

HEAD_TIMEOUT = 10.0
"""Seconds to wait for a connection, and for the head of the response."""


@dataclass(frozen=True, slots=True)
class EventBlock:
    """A block of an event stream. `event` is empty for a block of `id` alone, for `retry` and for a comment.

    `data` is decoded JSON. `id` is the id that the block has itself, or empty.
    """

    event: str
    data: Any
    id: str


class EventStream:
    """One response to `GET /events`. Its methods block.

    `url` is the origin of the HTTP endpoint; `options`, parameters that are set to 1 ("retained", "presence"); `ca`, a
    file of certificate authorities to trust for https. Raises `OSError` if there is no response.
    """

    def __init__(
        self,
        url: str,
        token: str,
        patterns: Sequence[str],
        *,
        last_id: str = "",
        since: str = "",
        options: Sequence[str] = (),
        ca: str | os.PathLike[str] | None = None,
    ) -> None:
        parts = urlsplit(url)
        secure, host = parts.scheme == "https", parts.hostname or ""
        address = host, parts.port or (443 if secure else 80)
        self._socket: socket.socket = socket.create_connection(address, HEAD_TIMEOUT)
        if secure:
            self._socket = make_ssl_context(ca).wrap_socket(self._socket, server_hostname=host)
        self._http = h11.Connection(h11.CLIENT)
        self._rest = b""
        self._blocks: deque[EventBlock] = deque()
        query = [("pattern", pattern) for pattern in patterns] + ([("since", since)] if since else [])
        query += [(option, "1") for option in options]
        headers = [("Host", parts.netloc), ("Accept", "text/event-stream"), ("Authorization", f"Bearer {token}")]
        headers += [("Last-Event-ID", last_id)] if last_id else []
        request = h11.Request(method="GET", target=f"/events?{urlencode(query)}", headers=headers)
        self._socket.sendall(self._http.send(request) + self._http.send(h11.EndOfMessage()))
        response = self._read(time.monotonic() + HEAD_TIMEOUT)
        if not isinstance(response, h11.Response):
            raise ConnectionResetError(f"{url} has closed the connection without a response")
        self.status: int = response.status_code

    def receive(self, timeout: float) -> EventBlock | None:
        """Return the next block, or None at the end of the response. Raises `TimeoutError` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self._blocks:
            event = self._read(deadline)
            if not isinstance(event, h11.Data):
                return None
            *blocks, self._rest = (self._rest + bytes(event.data)).split(b"\n\n")
            self._blocks += map(parse_block, blocks)
        return self._blocks.popleft()

    def close(self) -> None:
        """Close the connection. Call it once or more."""
        self._socket.close()

    def _read(self, deadline: float) -> h11.Event:
        while not isinstance(event := self._http.next_event(), h11.Event):
            # The least time is above 0, which would make the socket fail at once.
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                self._http.receive_data(self._socket.recv(65_536))
            except TimeoutError:
                raise TimeoutError("no block of an event stream arrived in time") from None
            except ConnectionError:
                return h11.ConnectionClosed()
        return event


def parse_block(block: bytes) -> EventBlock:
    """Parse a block without the empty line at its end. The broker ends lines with LF, and writes data in one line."""
    fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if not line.startswith(b":"))
    assert fields.keys() <= {b"event", b"data", b"id", b"retry"}, f"unknown fields in {block!r}"
    data = json.loads(fields[b"data"]) if b"data" in fields else None
    kind = fields.get(b"event", b"message").decode() if b"data" in fields else ""
    return EventBlock(kind, data, fields.get(b"id", b"").decode())
