"""A client of event streams: h11 reads HTTP, and `EventParser` the events."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h11
import trio

from tests.brokers import TOKEN
from tests.server_sent_events import Event, EventParser


class EventSource:
    """One response to `GET /events`."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.ended = False
        """Whether the body has ended as HTTP says, and not because the connection broke."""
        self.parser = EventParser()
        self._http = h11.Connection(h11.CLIENT)
        self._events: deque[Event] = deque()

    async def send(self, target: str, headers: list[tuple[str, str]]) -> None:
        """Send the request, and read the head of the response. Raises `EOFError` if the connection ends before it."""
        request = h11.Request(method="GET", target=target, headers=[("Host", "bus.example"), *headers])
        await self.stream.send_all(self._http.send(request) + self._http.send(h11.EndOfMessage()))
        response = await self._next_event()
        if not isinstance(response, h11.Response):
            raise EOFError
        self.status, self.headers = response.status_code, dict(response.headers)

    async def body(self) -> bytes:
        """Return the body of a response that is not a stream."""
        parts = []
        while isinstance(event := await self._next_event(), h11.Data):
            parts.append(bytes(event.data))
        assert isinstance(event, h11.EndOfMessage)
        return b"".join(parts)

    async def next(self) -> Event:
        """Return the next event. Raises `EOFError` at the end of the stream."""
        while not self._events:
            await self.read()
        return self._events.popleft()

    async def read(self) -> None:
        """Read what comes next, which need not be an event. Raises `EOFError` at the end of the stream."""
        self._events += [block for block in await self.blocks() if block.type]

    async def blocks(self) -> list[Event]:
        """Read what comes next, also the blocks that fire no event. Raises `EOFError` at the end of the stream."""
        event = await self._next_event()
        if isinstance(event, h11.Data):
            return self.parser.blocks(bytes(event.data))
        self.ended = isinstance(event, h11.EndOfMessage)
        raise EOFError

    async def seqs(self, count: int) -> list[int]:
        """Return the seqs of the next messages. Raises `AssertionError` for another event."""
        found = []
        for _ in range(count):
            event = await self.next()
            assert event.type == "message", event
            found.append(event.data["seq"])
        return found

    async def _next_event(self) -> h11.Event:
        try:
            while not isinstance(event := self._http.next_event(), h11.Event):
                self._http.receive_data(bytes(await self.stream.receive_some(65_536)))
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            return h11.ConnectionClosed()
        return event


@asynccontextmanager
async def events(
    address: str, query: str, *, token: str = TOKEN, last_id: str = "", accept: bool = True
) -> AsyncIterator[EventSource]:
    """Request `/events` with a query, as an `EventSource` does, and close the connection at the end."""
    host, _, port = address.rpartition(":")
    headers = [("Accept", "text/event-stream")] if accept else []
    headers += [("Authorization", f"Bearer {token}")] if token else []
    headers += [("Last-Event-ID", last_id)] if last_id else []
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        source = EventSource(stream)
        await source.send(f"/events?{query}", headers)
        yield source
