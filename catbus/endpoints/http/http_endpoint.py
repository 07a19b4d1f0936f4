"""The WebSocket port: its listeners, and a task for each connection that they accept."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from ...config import join_address, split_address
from ...errors import ConfigError, ErrorCode
from ...observability.loggers import get_logger
from ..connection_registry import ConnectionRegistry
from ..graceful_close import TlsStream, close_gently
from ..open_files import SPARE_FILES, RetryingListener, connections_that_fit
from .http_connection import serve_http_connection
from .http_response import CROWDED

if TYPE_CHECKING:
    from ...limits.cpu_scheduler import CpuScheduler
    from ...replica import Replica

HANDSHAKE_TIME = 10.0
"""Seconds for TLS to be agreed on."""
TURNING_AWAY_TIME = 1.0
TURNING_AWAY_AT_ONCE = SPARE_FILES // 5
"""Connections over the limit that are told so, with spare files; the others are closed without a word."""

_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: 21\r\n\r\ntoo many connections\n"
)
_CROWDED = (
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
) % (len(CROWDED.body), CROWDED.body)

logger = get_logger("catbus.endpoints")


@dataclass(frozen=True, slots=True)
class HttpEndpointStatistics:
    """`connections` and `websockets` are here now; the rest has been counted from the start.

    `requests`: HTTP requests by path and status. `sent` and `received`: bytes of WebSockets. `refused`: connections
    over the limit of all. `crowded`: those over the limit of an address, and such requests through proxies. `evicted`:
    those that gave way to others, as they had shown no token. `starved`: how often one could not be accepted. `faults`:
    exceptions of ours that ended a request or a connection.
    """

    connections: int
    websockets: int
    requests: Mapping[tuple[str, int], int]
    sent: int
    received: int
    refused: int
    crowded: int
    evicted: int
    starved: int
    faults: int


class HttpEndpoint:
    """A WebSocket port that is open. `addresses` is where, such as `127.0.0.1:8080`."""

    def __init__(self, addresses: list[str], registry: ConnectionRegistry, doors: trio.CancelScope) -> None:
        self.addresses = addresses
        self._registry = registry
        self._doors = doors

    def close(self) -> None:
        """Accept nothing more, and end the connections that wait for a request. WebSockets stay."""
        self._doors.cancel()
        self._registry.close()

    def statistics(self) -> HttpEndpointStatistics:
        registry = self._registry
        return HttpEndpointStatistics(
            registry.connections,
            len(registry.watched),
            dict(registry.requests),
            *registry.traffic(),
            registry.refused,
            registry.crowded,
            registry.evicted,
            registry.starved,
            registry.faults,
        )


async def serve_http(
    replica: Replica,
    binds: Sequence[str],
    sessions: trio.Nursery,
    *,
    task_status: trio.TaskStatus[HttpEndpoint] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve WebSocket and HTTP on the addresses `binds`, such as `0.0.0.0:8080` or `[::]:0`.

    Each connection is a task of its own in `sessions`, out of which no exception comes. Started with the
    `HttpEndpoint`; returns when that has been closed and the last connection has gone. Raises `ConfigError` when it
    cannot listen.
    """
    registry = ConnectionRegistry(replica.config.websocket.trusted_proxies)
    doors = trio.CancelScope()
    listeners = await open_listeners(binds)
    settings = replica.config.websocket
    async with trio.open_nursery() as nursery:
        nursery.start_soon(registry.keep_alive, min(settings.ping_interval, settings.silence) / 4)
        with doors:
            handler = partial(_serve_peer, replica, registry, _connection_limit(replica.config.limits.connections))
            task_status.started(
                HttpEndpoint(
                    [join_address(*listener.socket.getsockname()[:2]) for listener in listeners], registry, doors
                )
            )
            patient = [RetryingListener(listener, registry) for listener in listeners]
            await trio.serve_listeners(handler, patient, handler_nursery=sessions)
        await registry.wait_empty()
        nursery.cancel_scope.cancel()


async def open_listeners(binds: Sequence[str]) -> list[trio.SocketListener]:
    """Listen on all of `binds`, or on none and raise `ConfigError`."""
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
    """As many connections as are wanted, or as the process may have: past that, accepting would fail."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    possible = connections_that_fit(wanted, files)
    if possible < wanted:
        logger.warning(
            "fewer connections than configured: raise the limit of open files, or lower limits.connections",
            limit=possible,
            wanted=wanted,
            files=files,
        )
    return possible


async def _serve_peer(replica: Replica, registry: ConnectionRegistry, limit: int, stream: trio.SocketStream) -> None:
    """One connection. Whatever goes wrong in it goes wrong in it alone; Trio closes the stream afterwards."""
    peer, plain = _address(stream), not replica.config.websocket.tls
    source = registry.proxies.source_of(peer)
    with ExitStack() as stack:
        admitted = stack.enter_context(replica.addresses.counted(source.limited, trio.current_time()))
        full = admitted and registry.connections >= limit and not registry.evict()
        prove = stack.enter_context(registry.admit(source.network))
        stack.enter_context(replica.cpu_scheduler.serve(source.network))
        try:
            if not admitted:
                registry.crowded += 1
                replica.runtime_statistics.count_error(ErrorCode.OVERLOADED)
                await _turn_away(registry, replica.cpu_scheduler, stream, _CROWDED if plain else b"")
            elif full:
                registry.refused += 1
                await _turn_away(registry, replica.cpu_scheduler, stream, _BUSY if plain else b"")
            elif plain:
                await serve_http_connection(replica, registry, stream, prove, peer)
            elif (encrypted := await _encrypt(replica, stream)) is not None:
                await serve_http_connection(replica, registry, encrypted, prove, peer)
        except* Exception as error:  # noqa: BLE001 (it is logged)
            registry.fault("a connection failed", error)


def _address(stream: trio.SocketStream) -> str:
    """The address of the peer; empty for one that has left already."""
    try:
        address: str = stream.socket.getpeername()[0]
    except OSError:
        return ""
    return address


async def _encrypt(replica: Replica, stream: trio.SocketStream) -> TlsStream | None:
    """The same connection with TLS on it, or None for a peer that does not speak it, or not soon enough."""
    assert replica.certificates is not None
    encrypted = trio.SSLStream(stream, replica.certificates.latest_tls(), server_side=True, https_compatible=True)
    with trio.move_on_after(HANDSHAKE_TIME):
        try:
            await replica.cpu_scheduler.acquire()
            await encrypted.do_handshake()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("a peer does not speak TLS", reason=str(error.__cause__ or error))
        else:
            return encrypted
    return None


async def _turn_away(
    registry: ConnectionRegistry, cpu_scheduler: CpuScheduler, stream: trio.SocketStream, answer: bytes
) -> None:
    if registry.turning_away >= TURNING_AWAY_AT_ONCE or not answer:
        return
    registry.turning_away += 1
    try:
        with trio.move_on_after(TURNING_AWAY_TIME):
            await stream.send_all(answer)
            await close_gently(stream, cpu_scheduler)
    except trio.BrokenResourceError:
        pass
    finally:
        registry.turning_away -= 1
