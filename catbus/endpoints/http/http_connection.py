"""HTTP/1.1 on the WebSocket port: requests are answered, and those for a WebSocket are handed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

import h11
import trio

from ...errors import ErrorCode
from ...limits.unauthenticated import TOO_MUCH, UnauthenticatedPeer
from ...observability.loggers import get_logger
from ..connection_registry import ConnectionRegistry
from ..graceful_close import close_gently, say_goodbye
from ..websocket import handshake
from ..websocket.websocket_connection import serve_websocket
from .http_request import HttpRequest
from .http_response import CROWDED, HttpResponse, line
from .request_head import read_head
from .routes import find, route_of

if TYPE_CHECKING:
    from ...replica import Replica

HEAD_SIZE = 16_384
BODY_SIZE = 1_048_576
HEAD_TIME = 10.0
"""Seconds for the head of a request, from its first byte; and from connecting until the first byte of all."""
IDLE_TIME = 60.0
"""Seconds from an answer to the first byte of the next request."""
BODY_TIME = 30.0
SEND_TIME = 10.0
CLOSING_TIME = 2.0
GOODBYE_TIME = 0.5
"""Seconds for the goodbye of TLS on a connection that waits for no answer."""

PARTS_AT_A_TIME = 256
"""Chunks of a body that are read before other tasks get a turn: each may be one byte."""

_RECEIVE_SIZE = 65_536

logger = get_logger("catbus.endpoints")


def _nothing() -> None:
    pass


async def serve_http_connection(
    replica: Replica,
    registry: ConnectionRegistry,
    stream: trio.abc.Stream,
    prove: Callable[[], None] = _nothing,
    peer: str = "",
) -> None:
    """HttpResponse the requests on one connection until either side has had enough. Does not close the stream.

    `prove` is called when the peer has shown a token. `peer` is its address.
    """
    try:
        await HttpConnection(replica, registry, stream, prove, peer).run()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        logger.debug("a connection was lost")


class NoMoreRequests(Exception):
    """The peer has closed, or has said nothing for too long."""


class RequestRejected(Exception):
    """A request is answered although not all of it was read, so that nothing after it can be understood."""

    def __init__(self, answer: HttpResponse) -> None:
        self.answer = answer


class HttpConnection:
    """One connection that speaks HTTP."""

    def __init__(
        self,
        replica: Replica,
        registry: ConnectionRegistry,
        stream: trio.abc.Stream,
        prove: Callable[[], None],
        peer: str,
    ) -> None:
        self._replica = replica
        self._registry = registry
        self._stream = stream
        self._prove = prove
        self._peer = peer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_SIZE)
        self._scope = trio.CancelScope()
        self._unauthenticated = UnauthenticatedPeer(replica.unauthenticated, self._scope.cancel)

    async def run(self) -> None:
        """HttpResponse one request after another. Raises when the connection breaks."""
        try:
            with self._scope:
                await self._converse()
        finally:
            self._unauthenticated.release()
        if self._scope.cancelled_caught:
            self._replica.runtime_statistics.count_error(ErrorCode.OVERLOADED)
            with trio.move_on_after(CLOSING_TIME):
                if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    await self._send(None, line(503, TOO_MUCH), last=True)
                await close_gently(self._stream, self._replica.cpu_scheduler)

    async def _converse(self) -> None:
        idle_time, request = HEAD_TIME, None
        try:
            while True:
                request = None
                request = await self._next_request(idle_time)
                if await self._serve(request):
                    return
                if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                    break
                self._http.start_next_cycle()
                self._unauthenticated.processed()
                idle_time = IDLE_TIME
        except RequestRejected as refused:
            await self._send(request, refused.answer, last=True)
        except NoMoreRequests:
            if isinstance(self._stream, trio.SSLStream):
                with trio.move_on_after(GOODBYE_TIME):
                    await say_goodbye(self._stream)
            return
        with trio.move_on_after(CLOSING_TIME):
            await close_gently(self._stream, self._replica.cpu_scheduler)

    async def _serve(self, request: HttpRequest) -> bool:
        """HttpResponse a request; True where it has become a WebSocket instead, which is over then."""
        replica, registry = self._replica, self._registry
        client = registry.proxies.client_of(self._peer, request)
        request = replace(request, network=client.network)
        source = registry.proxies.source_of(self._peer)
        if client.network != source.network:
            replica.cpu_scheduler.set_network(client.network)
        # The connection itself counts already, as its peer's.
        counted = source.limited == client.limited
        with replica.addresses.counted("" if counted else client.limited, trio.current_time()) as admitted:
            if not admitted:
                registry.crowded += 1
                replica.runtime_statistics.count_error(ErrorCode.OVERLOADED)
                answer: HttpResponse | None = CROWDED
            elif handshake.is_offered(request):
                answer = handshake.refuse(request, replica.config.websocket.allowed_origins)
                if answer is None and not registry.closed:
                    head, rest = handshake.restated(request), self._http.trailing_data[0]
                    self._unauthenticated.release()
                    await serve_websocket(replica, registry, self._stream, head, rest, self._prove, request.network)
                    return True
            else:
                answer = await self._answer(request)
            await self._send(request, answer or line(503, "this replica is stopping"))
        return False

    async def _answer(self, request: HttpRequest) -> HttpResponse:
        handler = find(request.method, request.path)
        if isinstance(handler, HttpResponse):
            return handler
        try:
            read = partial(self._read_wanted, request)
            answer = await handler(self._replica, replace(request, read=read))
        except RequestRejected:
            raise
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._registry.fault("a request failed", error)
            return line(500)
        if answer.status < 400 and self._http.their_state is h11.SEND_BODY:
            await self._read_body(request, keep=False)
        return answer

    # Reading

    async def _next_request(self, idle_time: float) -> HttpRequest:
        if self._http.trailing_data[0]:
            await self._replica.cpu_scheduler.yield_cpu()
        else:
            await self._wait_for_more(idle_time)
        with trio.move_on_after(HEAD_TIME) as limit:
            event = await self._next_event()
        if limit.cancelled_caught:
            raise RequestRejected(line(408))
        if not isinstance(event, h11.Request):
            raise NoMoreRequests
        if len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers) > HEAD_SIZE:
            raise RequestRejected(line(431))
        request = read_head(event)
        if isinstance(request, HttpResponse):
            raise RequestRejected(request)
        if not request.has_body:
            await self._next_event()
        return request

    async def _wait_for_more(self, limit: float) -> None:
        with trio.move_on_after(limit) as scope, self._registry.idle(scope):
            await self._receive()
            return
        raise NoMoreRequests

    async def _read_wanted(self, request: HttpRequest) -> bytes:
        """Read a body that is asked for, which is after its sender has shown a token."""
        self._prove()
        self._unauthenticated.release()
        return await self._read_body(request)

    async def _read_body(self, request: HttpRequest, *, keep: bool = True) -> bytes:
        """Read the body to its end, whether it is kept or not. Refuses one that is too large, or comes too slowly."""
        if int(request.header(b"content-length") or b"0") > BODY_SIZE:
            raise RequestRejected(line(413))
        body = bytearray()
        parts = size = 0
        with trio.move_on_after(BODY_TIME):
            while isinstance(event := await self._next_event(), h11.Data):
                parts += 1
                size += len(event.data)
                if keep:
                    body += event.data
                if parts % PARTS_AT_A_TIME == 0:
                    await self._replica.cpu_scheduler.yield_cpu()
                if size > BODY_SIZE:
                    raise RequestRejected(line(413))
            return bytes(body)
        raise RequestRejected(line(408))

    async def _receive(self) -> None:
        # Without a token, a head is all that anybody has to say: its body is not wanted yet.
        size = _RECEIVE_SIZE if self._unauthenticated.released else HEAD_SIZE
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
            raise RequestRejected(
                line(status, "" if status != 400 else "this is not a valid HTTP/1.1 request")
            ) from None
        return event

    # Writing

    async def _send(self, request: HttpRequest | None, answer: HttpResponse, *, last: bool = False) -> None:
        """HttpResponse `request`, or what was too broken to be one. Without all of its body, it is the last answer."""
        headers = [
            (b"date", formatdate(usegmt=True).encode()),
            *answer.headers,
        ]
        if answer.status != HTTPStatus.NOT_MODIFIED:
            # There, a length would be that of the representation, which is not sent.
            headers += [(b"content-type", answer.type), (b"content-length", str(len(answer.body)).encode())]
        if last or self._registry.closed or self._http.their_state is h11.SEND_BODY:
            headers.append((b"connection", b"close"))
        reason = HTTPStatus(answer.status).phrase.encode()
        data = self._http.send(h11.Response(status_code=answer.status, headers=headers, reason=reason))
        if request is None or request.method != "HEAD":
            data += self._http.send(h11.Data(data=answer.body))
        data += self._http.send(h11.EndOfMessage())
        if request is not None:
            path = route_of(request.path) or "other"
            self._registry.requests[path, answer.status] += 1
            logger.debug("request", method=request.method, path=request.path[:200], status=answer.status)
        with trio.move_on_after(SEND_TIME):
            await self._stream.send_all(data)
            return
        raise trio.BrokenResourceError("the peer does not read its answer")
