"""One HTTP/1.1 connection: answers its requests, and hands WebSocket upgrades to `serve_websocket`."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from functools import partial
from http import HTTPStatus

import h11
import trio

from ...error_codes import ErrorCode
from ...limits.unauthenticated import TOO_MUCH, UnauthenticatedPeer
from ...observability.loggers import get_logger
from ...session.publishing import STOPPING
from ..connection_registry import ConnectionRegistry
from ..graceful_close import close_gracefully, send_close_notify
from ..replica_interface import ReplicaInterface
from ..websocket import handshake
from ..websocket.websocket_connection import serve_websocket
from .cors import check_origin, cors_headers
from .event_stream import (
    CONTENT_TYPE,
    HEADERS,
    EventStream,
    is_event_stream_request,
    open_event_stream,
    retry_later,
)
from .http_request import Headers, HttpRequest
from .http_response import TOO_MANY_CONNECTIONS, HttpResponse, http_error
from .request_head import read_request_head
from .routes import find_handler, route_of

MAX_HEAD_SIZE = 16_384
MAX_BODY_SIZE = 1_048_576
HEAD_TIMEOUT = 10.0
"""Seconds for the head of a request, from its first byte; also from connecting until the first byte."""
IDLE_TIMEOUT = 60.0
"""Seconds from a response to the first byte of the next request."""
BODY_TIMEOUT = 30.0
SEND_TIMEOUT = 10.0
"""Seconds for each 64 KiB of a response."""
CLOSE_TIMEOUT = 2.0
CLOSE_NOTIFY_TIMEOUT = 0.5
"""Seconds for the close_notify of TLS on a connection without a request."""

CHUNKS_PER_TURN = 256
"""Chunks of a body that are read before other tasks run: each may be one byte."""

_RECEIVE_SIZE = _SEND_SIZE = 65_536
_LOGGED_PATH = re.compile(r"[\w./-]{0,200}", re.ASCII)
"""The part of a path that is logged. A `?` that was encoded by mistake, and the token behind it, are not part of it."""

logger = get_logger("catbus.endpoints")


def _nothing() -> None:
    pass


async def serve_http_connection(
    replica: ReplicaInterface,
    registry: ConnectionRegistry,
    stream: trio.abc.Stream,
    on_authenticated: Callable[[], None] = _nothing,
    peer: str = "",
) -> None:
    """Answer the requests on one connection until one side ends it. Does not close the stream.

    `on_authenticated` is called when the peer has authenticated. `peer` is its address.
    """
    try:
        await HttpConnection(replica, registry, stream, on_authenticated, peer).run()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        logger.debug("a connection was lost")


class NoMoreRequests(Exception):
    """The peer has closed the connection, or has sent nothing for too long."""


class RequestRejected(Exception):
    """A request that is answered before all of it was read, so the connection must be closed."""

    def __init__(self, response: HttpResponse) -> None:
        self.response = response


class HttpConnection:
    """One HTTP connection and its h11 state."""

    def __init__(
        self,
        replica: ReplicaInterface,
        registry: ConnectionRegistry,
        stream: trio.abc.Stream,
        on_authenticated: Callable[[], None],
        peer: str,
    ) -> None:
        self._replica = replica
        self._registry = registry
        self._stream = stream
        self._on_authenticated = on_authenticated
        self._peer = peer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_SIZE)
        self._scope = trio.CancelScope()
        self._unauthenticated = UnauthenticatedPeer(replica.unauthenticated, self._scope.cancel)

    async def run(self) -> None:
        """Answer one request after another. Raises Trio's errors when the connection breaks."""
        try:
            with self._scope:
                await self._serve_requests()
        finally:
            self._unauthenticated.release()
        if self._scope.cancelled_caught:
            self._replica.runtime_statistics.count_error(ErrorCode.OVERLOADED)
            with trio.move_on_after(CLOSE_TIMEOUT):
                if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    await self._send(None, http_error(503, TOO_MUCH, code=ErrorCode.OVERLOADED), last=True)
                await close_gracefully(self._stream, self._replica.cpu_scheduler)

    async def _serve_requests(self) -> None:
        idle_time, request = HEAD_TIMEOUT, None
        try:
            while True:
                request = None
                request = await self._next_request(idle_time)
                if await self._serve_request(request):
                    return
                if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                    break
                self._http.start_next_cycle()
                self._unauthenticated.processed()
                idle_time = IDLE_TIMEOUT
        except RequestRejected as rejected:
            await self._send(request, rejected.response, last=True)
        except NoMoreRequests:
            if isinstance(self._stream, trio.SSLStream):
                with trio.move_on_after(CLOSE_NOTIFY_TIMEOUT):
                    await send_close_notify(self._stream)
            return
        with trio.move_on_after(CLOSE_TIMEOUT):
            await close_gracefully(self._stream, self._replica.cpu_scheduler)

    async def _serve_request(self, request: HttpRequest) -> bool:
        """Answer a request. Returns True if a WebSocket or an event stream was the last of the connection."""
        replica, registry = self._replica, self._registry
        client = registry.proxies.client_address(self._peer, request)
        request = replace(request, network=client.network)
        source = registry.proxies.connection_address(self._peer)
        if client.network != source.network:
            replica.cpu_scheduler.set_network(client.network)
        # The connection already counts for the network of its peer.
        counted = source.limited_network == client.limited_network
        with replica.addresses.counted("" if counted else client.limited_network, trio.current_time()) as admitted:
            if not admitted:
                registry.rejected_by_address += 1
                replica.runtime_statistics.count_error(ErrorCode.OVERLOADED)
                response: HttpResponse | EventStream | None = TOO_MANY_CONNECTIONS
            elif handshake.is_websocket_upgrade(request):
                response = handshake.check_upgrade(request, replica.config.websocket.allowed_origins)
                if response is None and not registry.closed:
                    head, rest = handshake.minimal_request_head(request), self._http.trailing_data[0]
                    self._unauthenticated.release()
                    await serve_websocket(
                        replica, registry, self._stream, head, rest, self._on_authenticated, request.network
                    )
                    return True
            else:
                response = await self._handle(request)
            if isinstance(response, EventStream):
                await self._serve_event_stream(request, response)
                return True
            response = response or http_error(503, STOPPING, code=ErrorCode.SHUTTING_DOWN)
            await self._send(request, retry_later(request, response))
        return False

    async def _serve_event_stream(self, request: HttpRequest, events: EventStream) -> None:
        self._on_authenticated()
        self._unauthenticated.release()
        try:
            headers = [*HEADERS, (b"content-type", CONTENT_TYPE), (b"connection", b"close")]
            lines = [b"%b: %b\r\n" % header for header in self._complete_headers(request, 200, headers)]
            # Not by h11, which would announce chunks.
            await events.serve(self._stream, b"HTTP/1.1 200 OK\r\n%b\r\n" % b"".join(lines))
        finally:
            events.end()

    async def _handle(self, request: HttpRequest) -> HttpResponse | EventStream:
        origins = self._replica.config.websocket.allowed_origins
        if rejected := check_origin(request, route_of(request.path), origins):
            return rejected
        handler = find_handler(request.method, request.path)
        if isinstance(handler, HttpResponse):
            return handler
        try:
            if is_event_stream_request(request) and not request.has_body and not self._registry.closed:
                return await open_event_stream(self._replica, self._registry, request)
            read = partial(self._read_for_handler, request)
            handled = replace(request, read=read, wait_disconnected=self._wait_disconnected)
            response = await handler(self._replica, handled)
        except RequestRejected:
            raise
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._registry.log_internal_error("a request failed", error)
            return http_error(500)
        if response.status < 400 and self._http.their_state is h11.SEND_BODY:
            await self._read_body(request, keep=False)
        return response

    # Reading

    async def _next_request(self, idle_time: float) -> HttpRequest:
        if self._http.trailing_data[0]:
            await self._replica.cpu_scheduler.yield_cpu()
        else:
            await self._wait_for_data(idle_time)
        with trio.move_on_after(HEAD_TIMEOUT) as limit:
            event = await self._next_event()
        if limit.cancelled_caught:
            raise RequestRejected(http_error(408))
        if not isinstance(event, h11.Request):
            raise NoMoreRequests
        if len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers) > MAX_HEAD_SIZE:
            raise RequestRejected(http_error(431))
        request = read_request_head(event)
        if isinstance(request, HttpResponse):
            raise RequestRejected(request)
        if not request.has_body:
            await self._next_event()
        return request

    async def _wait_for_data(self, limit: float) -> None:
        with trio.move_on_after(limit) as scope, self._registry.idle(scope):
            await self._receive()
            return
        raise NoMoreRequests

    async def _read_for_handler(self, request: HttpRequest) -> bytes:
        """Read the body for a handler, which has checked the token before."""
        self._authenticated()
        return await self._read_body(request) if request.has_body else b""

    async def _wait_disconnected(self) -> None:
        """Return when the peer has closed the connection. A handler has checked the token before.

        A peer that closes only its side of the connection counts as well. After a pipelined request has arrived,
        nothing more is read, and this waits for ever. Cancelling it loses no bytes.
        """
        self._authenticated()
        if not self._http.trailing_data[0]:
            data = b""
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                data = bytes(await self._stream.receive_some(MAX_HEAD_SIZE))
            self._http.receive_data(data)
            if not data:
                return
        await trio.sleep_forever()

    def _authenticated(self) -> None:
        self._on_authenticated()
        self._unauthenticated.release()

    async def _read_body(self, request: HttpRequest, *, keep: bool = True) -> bytes:
        """Read the body to its end. Raises `RequestRejected` if it is too large or arrives too slowly."""
        if int(request.header(b"content-length") or b"0") > MAX_BODY_SIZE:
            raise RequestRejected(http_error(413))
        body = bytearray()
        parts = size = 0
        with trio.move_on_after(BODY_TIMEOUT):
            while isinstance(event := await self._next_event(), h11.Data):
                parts += 1
                size += len(event.data)
                if keep:
                    body += event.data
                if parts % CHUNKS_PER_TURN == 0:
                    await self._replica.cpu_scheduler.yield_cpu()
                if size > MAX_BODY_SIZE:
                    raise RequestRejected(http_error(413))
            return bytes(body)
        raise RequestRejected(http_error(408))

    async def _receive(self) -> None:
        # An unauthenticated peer needs to send no more than a head, because no handler has asked for the body yet.
        size = _RECEIVE_SIZE if self._unauthenticated.released else MAX_HEAD_SIZE
        data = bytes(await self._stream.receive_some(size))
        self._unauthenticated.received(len(data))
        await self._replica.cpu_scheduler.acquire()
        self._http.receive_data(data)

    async def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    go_on = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                    await self._stream.send_all(self._http.send(go_on))
                await self._receive()
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            message = "this is not a valid HTTP/1.1 request" if status == 400 else ""
            raise RequestRejected(http_error(status, message)) from None
        return event

    # Writing

    async def _send(self, request: HttpRequest | None, response: HttpResponse, *, last: bool = False) -> None:
        """Send the response to `request` (None if it was not valid). If its body was not read, close afterwards."""
        headers = [*response.headers]
        if response.status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
            # A 204 has no content. In a 304, the length would be that of the representation, which is not sent.
            headers += [(b"content-type", response.type), (b"content-length", str(len(response.body)).encode())]
        close = (b"connection", b"close")
        if (last or self._registry.closed or self._http.their_state is h11.SEND_BODY) and close not in headers:
            headers.append(close)
        data = self._head(request, response.status, headers)
        if request is None or request.method != "HEAD":
            data += self._http.send(h11.Data(data=response.body))
        data += self._http.send(h11.EndOfMessage())
        budget = self._replica.delivery.budget
        budget.replies += len(data)
        try:
            for start in range(0, len(data), _SEND_SIZE):
                if not response.is_valid():
                    raise trio.BrokenResourceError("the response is not valid any more")
                with trio.move_on_after(SEND_TIMEOUT) as limit:
                    await self._stream.send_all(data[start : start + _SEND_SIZE])
                if limit.cancelled_caught:
                    raise trio.BrokenResourceError("the peer does not read the response")
        finally:
            budget.replies -= len(data)

    def _head(self, request: HttpRequest | None, status: int, headers: Headers) -> bytes:
        """Return the head of the response to `request`, which is counted with it."""
        completed = self._complete_headers(request, status, headers)
        return self._http.send(
            h11.Response(status_code=status, headers=completed, reason=HTTPStatus(status).phrase.encode())
        )

    def _complete_headers(
        self, request: HttpRequest | None, status: int, headers: Headers
    ) -> list[tuple[bytes, bytes]]:
        """Add what all responses have to the headers of one, and count it."""
        dated = [(b"date", formatdate(usegmt=True).encode()), *headers]
        if request is not None:
            route, origins = route_of(request.path), self._replica.config.websocket.allowed_origins
            dated += cors_headers(request, route, origins)
            self._registry.requests[route or "other", status] += 1
            shown = _LOGGED_PATH.match(request.path)
            assert shown is not None
            logger.debug("request", method=request.method, path=shown[0], status=status)
        return dated
