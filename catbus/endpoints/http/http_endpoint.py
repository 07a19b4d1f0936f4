"""The HTTP and WebSocket port: its listener sockets, and one task for each connection."""

from __future__ import annotations

import resource
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

import trio

from ...config import join_address, split_address
from ...error_codes import ErrorCode
from ...errors import ConfigError
from ...observability.loggers import get_logger
from ..connection_registry import ConnectionRegistry
from ..graceful_close import TlsStream, close_gracefully
from ..open_files import RESERVED_FILES, RetryingListener, connections_within_limit
from ..replica_interface import ReplicaInterface
from .http_connection import serve_http_connection
from .http_response import REPLICA_FULL, TOO_MANY_CONNECTIONS, HttpResponse

if TYPE_CHECKING:
    from ...limits.cpu_scheduler import CpuScheduler

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for the TLS handshake."""
REJECTION_TIMEOUT = 1.0
MAX_CONCURRENT_REJECTIONS = RESERVED_FILES // 5
"""Connections over the limit that are sent a response, with reserved files. Others are closed without one."""

logger = get_logger("catbus.endpoints")


@dataclass(frozen=True, slots=True)
class HttpEndpointStatistics:
    """Open `connections` and `websockets`, and counters since the start.

    - `requests`: HTTP requests by path and status
    - `sent`, `received`: bytes of WebSockets
    - `rejected`: connections over `limits.connections`
    - `rejected_by_address`: connections, and requests through proxies, over `limits.address_connections`
    - `evicted`: unauthenticated connections that were closed to make room for others
    - `accept_failures`: failed accepts
    - `internal_errors`: exceptions in the broker that ended a request or a connection
    """

    connections: int
    websockets: int
    requests: Mapping[tuple[str, int], int]
    sent: int
    received: int
    rejected: int
    rejected_by_address: int
    evicted: int
    accept_failures: int
    internal_errors: int


class HttpEndpoint:
    """An open HTTP and WebSocket port. `addresses` are its addresses, such as `127.0.0.1:8080`."""

    def __init__(self, addresses: list[str], registry: ConnectionRegistry, accept_scope: trio.CancelScope) -> None:
        self.addresses = addresses
        self._registry = registry
        self._accept_scope = accept_scope

    def stop_accepting(self) -> None:
        """Accept no more connections, which wait for another process that listens on the same sockets."""
        self._accept_scope.cancel()

    def close(self) -> None:
        """Accept no more connections, and end those that wait for a request. WebSockets stay open."""
        self._accept_scope.cancel()
        self._registry.close()

    def statistics(self) -> HttpEndpointStatistics:
        registry = self._registry
        return HttpEndpointStatistics(
            registry.connections,
            len(registry.websockets),
            dict(registry.requests),
            *registry.traffic(),
            registry.rejected,
            registry.rejected_by_address,
            registry.evicted,
            registry.accept_failures,
            registry.internal_errors,
        )


async def serve_http(
    replica: ReplicaInterface,
    binds: Sequence[str],
    sessions: trio.Nursery,
    *,
    inherited: Sequence[socket.socket] = (),
    task_status: trio.TaskStatus[HttpEndpoint] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve WebSocket and HTTP on the addresses `binds`, such as `0.0.0.0:8080` or `[::]:0`.

    Instead of opening sockets it uses the listener sockets that are `inherited`, if any. Each connection is a task in
    `sessions` that raises no exception. The task status is the `HttpEndpoint`. Returns after that was closed and the
    last connection has ended. Raises `ConfigError` if it cannot listen.
    """
    registry = ConnectionRegistry(replica.config.websocket.trusted_proxies)
    accept_scope = trio.CancelScope()
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(each)) for each in inherited]
    listeners = listeners or await open_listeners(binds)
    settings = replica.config.websocket
    async with trio.open_nursery() as nursery:
        nursery.start_soon(registry.check_connections, min(settings.ping_interval, settings.silence) / 4)
        with accept_scope:
            handler = partial(_serve_peer, replica, registry, _connection_limit(replica.config.limits.connections))
            task_status.started(
                HttpEndpoint(
                    [join_address(*listener.socket.getsockname()[:2]) for listener in listeners], registry, accept_scope
                )
            )
            retrying = [RetryingListener(listener, registry) for listener in listeners]
            await trio.serve_listeners(handler, retrying, handler_nursery=sessions)
        await registry.wait_empty()
        nursery.cancel_scope.cancel()


async def open_listeners(binds: Sequence[str]) -> list[trio.SocketListener]:
    """Listen on all of `binds`. If one fails, close all and raise `ConfigError`."""
    listeners: list[trio.SocketListener] = []
    try:
        for bind in binds:
            host, port = split_address(bind)
            try:
                listeners += await trio.open_tcp_listeners(port, host=host)
            except OSError as error:
                raise ConfigError(f"cannot listen on {bind}: {error.strerror or error}") from error
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


def _connection_limit(wanted: int) -> int:
    """Return `wanted`, or the number of connections that the process has files for, and log the difference."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    possible = connections_within_limit(wanted, files)
    if possible < wanted:
        logger.warning(
            "fewer connections than configured: raise the limit of open files, or lower limits.connections",
            limit=possible,
            wanted=wanted,
            files=files,
        )
    return possible


async def _serve_peer(
    replica: ReplicaInterface, registry: ConnectionRegistry, limit: int, stream: trio.SocketStream
) -> None:
    """Serve one connection. Its errors affect no other connection. Trio closes the stream afterwards."""
    peer, plain = _address(stream), not replica.config.websocket.tls
    source = registry.proxies.connection_address(peer)
    with ExitStack() as stack:
        admitted = stack.enter_context(replica.addresses.counted(source.limited_network, trio.current_time()))
        full = admitted and registry.connections >= limit and not registry.evict()
        on_authenticated = stack.enter_context(registry.admit(source.network))
        stack.enter_context(replica.cpu_scheduler.serve(source.network))
        try:
            if not admitted:
                registry.rejected_by_address += 1
                replica.runtime_statistics.count_error(ErrorCode.OVERLOADED)
                await _reject(registry, replica.cpu_scheduler, stream, TOO_MANY_CONNECTIONS if plain else None)
            elif full:
                registry.rejected += 1
                await _reject(registry, replica.cpu_scheduler, stream, REPLICA_FULL if plain else None)
            elif plain:
                await serve_http_connection(replica, registry, stream, on_authenticated, peer)
            elif (encrypted := await _encrypt(replica, stream)) is not None:
                await serve_http_connection(replica, registry, encrypted, on_authenticated, peer)
        except* Exception as error:  # noqa: BLE001 (it is logged)
            registry.log_internal_error("a connection failed", error)


def _address(stream: trio.SocketStream) -> str:
    """Return the address of the peer, or "" if it has already disconnected."""
    try:
        address: str = stream.socket.getpeername()[0]
    except OSError:
        return ""
    return address


async def _encrypt(replica: ReplicaInterface, stream: trio.SocketStream) -> TlsStream | None:
    """Do the TLS handshake. Returns None if the peer does not complete it in time."""
    assert replica.certificates is not None
    encrypted = trio.SSLStream(stream, replica.certificates.latest_tls(), server_side=True, https_compatible=True)
    with trio.move_on_after(HANDSHAKE_TIMEOUT):
        try:
            await replica.cpu_scheduler.acquire()
            await encrypted.do_handshake()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("a peer does not speak TLS", reason=str(error.__cause__ or error))
        else:
            return encrypted
    return None


async def _reject(
    registry: ConnectionRegistry, cpu_scheduler: CpuScheduler, stream: trio.SocketStream, response: HttpResponse | None
) -> None:
    if registry.rejecting >= MAX_CONCURRENT_REJECTIONS or response is None:
        return
    registry.rejecting += 1
    try:
        with trio.move_on_after(REJECTION_TIMEOUT):
            await stream.send_all(_encode(response))
            await close_gracefully(stream, cpu_scheduler)
    except trio.BrokenResourceError:
        pass
    finally:
        registry.rejecting -= 1


def _encode(response: HttpResponse) -> bytes:
    """Encode a response to a request that is not read. The connection is closed after it."""
    headers = [*response.headers, (b"content-type", response.type), (b"content-length", b"%d" % len(response.body))]
    lines = [b"HTTP/1.1 %d %b" % (response.status, HTTPStatus(response.status).phrase.encode())]
    lines += [b"%b: %b" % (name.title(), value) for name, value in headers]
    return b"\r\n".join([*lines, b"Connection: close", b"", response.body])
