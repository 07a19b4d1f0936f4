"""`GET /events`: a session whose messages are server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from typing import Annotated

import trio
from msgspec import UNSET, Meta, Struct, UnsetType

from ...error_codes import ErrorCode
from ...errors import PeerError
from ...limits.cpu_scheduler import CpuScheduler
from ...protocol.server_sent_events import event, retry_block
from ..connection_registry import ConnectionRegistry
from ..graceful_close import close_gracefully
from ..queue_writer import QueueWriter
from ..replica_interface import ReplicaInterface, SessionInterface
from ..socket_writer import SocketWriter, limit_send_buffer
from .error_responses import error_response
from .formats import CURSOR, OPTIONAL_CURSOR, PATTERN
from .http_request import Headers, HttpRequest, request_token
from .http_response import HttpResponse
from .query import distinct_patterns, flag, parse_cursor, parse_query, since

PATH = "/events"
CONTENT_TYPE = b"text/event-stream"
HEADERS: Headers = [
    # A proxy must neither store nor compress the stream, as it would hold back events to do so.
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class EventsQuery(Struct):
    """The parameters of `GET /events`."""

    pattern: Annotated[
        list[Annotated[str, Meta(extra_json_schema=PATTERN)]],
        Meta(min_length=1, description="A channel, or a pattern such as `room.*`. It may be repeated."),
    ]
    since: (
        Annotated[str, Meta(description="Resume after this position, `SEQ.EPOCH` or `SEQ`.", extra_json_schema=CURSOR)]
        | UnsetType
    ) = UNSET
    epoch: Annotated[str, Meta(description="The epoch of `since`, if that is a `SEQ`.")] | UnsetType = UNSET
    retained: (
        Annotated[
            str,
            Meta(
                description="`1`: begin with the retained messages, unless the stream is resumed.",
                extra_json_schema={"enum": ["0", "1"]},
            ),
        ]
        | UnsetType
    ) = UNSET
    presence: (
        Annotated[
            str,
            Meta(
                description="`1`: send the members of the channels, and each change of them.",
                extra_json_schema={"enum": ["0", "1"]},
            ),
        ]
        | UnsetType
    ) = UNSET


class EventsHeaders(Struct, rename={"last_event_id": "Last-Event-ID"}):
    """The headers of `GET /events`."""

    last_event_id: (
        Annotated[
            str, Meta(description="The `id` of the last event: resume after it.", extra_json_schema=OPTIONAL_CURSOR)
        ]
        | UnsetType
    ) = UNSET


class StreamedEvent(Struct):
    """An event of a stream. The `data` of a message is what `message` is over other transports, without `pattern`."""

    data: Annotated[str, Meta(description="JSON.", extra_json_schema={"contentMediaType": "application/json"})]
    event: (
        Annotated[str, Meta(description="The kind of an event that is not a message: `gap`, `live`, `presence`.")]
        | UnsetType
    ) = UNSET
    id: Annotated[str, Meta(description="The position after the event, `SEQ.EPOCH`.")] | UnsetType = UNSET


CLOSE_TIMEOUT = 2.0
"""Seconds for sending the rest of the send queue, and for the peer's end of the connection."""
USER_TIMEOUT = 60.0
"""Seconds after which the kernel breaks a connection whose peer acknowledges nothing (RFC 5482)."""
SHORTEST_RETRY, LONGEST_RETRY = 1.0, 3.0
"""Seconds after which a client reconnects, at random: when a replica dies, its clients come to the others at once."""

_TEMPORARY = frozenset({429, 500, 503, 504})
_RECEIVE_SIZE = 4096


def is_event_stream_request(request: HttpRequest) -> bool:
    return request.path == PATH and request.method == "GET"


def retry_later(request: HttpRequest, response: HttpResponse) -> HttpResponse:
    """Return the response to an `EventSource` for an error that is temporary: an empty stream, so that it tries again.

    Any status but 200 ends an `EventSource` for good. Other clients get the error.
    """
    if not is_event_stream_request(request) or response.status not in _TEMPORARY:
        return response
    if CONTENT_TYPE not in request.header(b"accept"):
        return response
    return HttpResponse(200, _retry(), HEADERS, CONTENT_TYPE)


async def open_event_stream(
    replica: ReplicaInterface, registry: ConnectionRegistry, request: HttpRequest
) -> HttpResponse | EventStream:
    """Open a session for a request, and subscribe it. Returns an error response if the request is rejected.

    `Last-Event-ID` counts more than `since`: a browser sends it when it reconnects, with the URL of the first request.
    """
    try:
        token = request_token(request)
        parameters = parse_query(
            request.query,
            {"pattern": replica.config.limits.subscriptions, "since": 1, "epoch": 1, "retained": 1, "presence": 1},
        )
        patterns = distinct_patterns(parameters.get("pattern", ()))
        if not patterns:
            raise PeerError(ErrorCode.BAD_MESSAGE, "name at least one `pattern`")
        cursor, retained, presence = since(parameters), flag(parameters, "retained"), flag(parameters, "presence")
        if last := request.header(b"last-event-id"):
            cursor = parse_cursor(last.decode("latin-1"))
            if cursor is None:
                raise PeerError(ErrorCode.BAD_MESSAGE, "`Last-Event-ID` is not the `id` of an event of this broker")
    except PeerError as error:
        return error_response(replica, error)
    stream = EventStream(replica, registry, request)
    try:
        await stream.subscribe(token, patterns, cursor, retained=retained, presence=presence)
    except PeerError as error:
        stream.end()
        return error_response(replica, error)
    except BaseException:
        stream.end()
        raise
    return stream


class EventStream(QueueWriter):
    """Writes the send queue of one session to the body of an HTTP response.

    The end of the connection ends the body (RFC 9112, section 6.3), and the event `close` says that it is complete.
    There are no chunks, of which WHATWG HTML warns (section 9.2.7): HAProxy takes a chunk as a sign that more follows,
    and the kernel then holds back each event for 200 ms.
    """

    def __init__(self, replica: ReplicaInterface, registry: ConnectionRegistry, request: HttpRequest) -> None:
        super().__init__(registry, registry.event_encoder)
        self._cpu_scheduler: CpuScheduler = replica.cpu_scheduler
        self._send_buffer = replica.config.websocket.send_buffer
        self._scope = trio.CancelScope()
        self.received = 0
        self._driver: SessionInterface = replica.open_session(self, transport="sse", network=request.network)

    async def subscribe(
        self,
        token: str,
        patterns: Sequence[str],
        cursor: tuple[int, str | None] | None,
        *,
        retained: bool = False,
        presence: bool = False,
    ) -> None:
        """Authenticate the client and subscribe it. Raises `PeerError`."""
        seq, epoch = (None, None) if cursor is None else cursor
        await self._driver.open_event_stream(token, patterns, seq, epoch, retained=retained, presence=presence)

    def end(self) -> None:
        """End the session. Call it once or more."""
        self._driver.end()

    @property
    def sent(self) -> int:
        return self._writer.sent

    def check(self, now: float) -> None:
        """Break the connection if its peer reads nothing."""
        self.abort_if_stalled(now)

    async def serve(self, stream: trio.abc.Stream, head: bytes) -> None:
        """Send the head of the response, and then events until one side ends. Does not close the stream."""
        transport = limit_send_buffer(stream, self._send_buffer)
        if transport is not None:
            # Such a client sends nothing, so nothing else shows that it is gone.
            transport.setsockopt(trio.socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(USER_TIMEOUT * 1000))
        async with trio.open_nursery() as nursery:
            self._writer = SocketWriter(stream, nursery, take_more=self.take_more, read_scope=self._scope)
            try:
                registry = self._registry
                with registry.count_bytes(self), registry.kept_alive(self, registry.event_streams):
                    await self._send_events(stream, head)
                    with trio.move_on_after(CLOSE_TIMEOUT):
                        await self._writer.wait_sent()
                        if not self._writer.broken:
                            await close_gracefully(stream, self._cpu_scheduler)
            finally:
                self.end()
                self.release()
                nursery.cancel_scope.cancel()

    async def _send_events(self, stream: trio.abc.Stream, head: bytes) -> None:
        self._writer.write(head + _retry())
        self._send_queue = self._driver.send_queue
        self.flush()
        try:
            with self._scope:
                async with trio.open_nursery() as reader:
                    reader.start_soon(self._read, stream)
                    await self._driver.wait_closing()
                    reader.cancel_scope.cancel()
        finally:
            closing = self._driver.closing
            if closing is not None:
                code, reason = closing
                self._writer.close(event("close", {"code": code, "reason": reason}))
            self.end()

    async def _read(self, stream: trio.abc.Stream) -> None:
        """Read until the client leaves. What it sends is ignored, because the stream is its last request."""
        try:
            while data := await stream.receive_some(_RECEIVE_SIZE):
                self.received += len(data)
                await self._cpu_scheduler.acquire()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.end()


def _retry() -> bytes:
    return retry_block(random.uniform(SHORTEST_RETRY, LONGEST_RETRY))  # noqa: S311 (no secret)
