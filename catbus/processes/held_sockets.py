"""The sockets of all workers. The supervisor holds them, so they stay open while a worker is started again."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, join_address, split_address
from ..endpoints.webtransport.udp_socket import prepare_udp_socket
from ..endpoints.webtransport.udp_steering import can_steer_datagrams, steer_datagrams
from ..errors import ConfigError

BACKLOG = 65_535
"""Connections that may wait to be accepted. The kernel has a lower limit (net.core.somaxconn)."""

_DIRECTORIES = "/tmp", "/dev/shm"  # noqa: S108 (a new directory in it, with a random name and mode 0700)
"""Where the sockets between workers are. A container may have a file system that is read-only except for /dev/shm."""


@dataclass(frozen=True, slots=True)
class HeldSockets:
    """The open sockets of a number of workers."""

    listeners: tuple[socket.socket, ...]
    """For HTTP and WebSocket; all workers accept from them."""
    udp: tuple[tuple[socket.socket, ...], ...]
    """For WebTransport, by worker. If they are not steered, worker 0 has all of them."""
    steered: bool
    """Whether the kernel chooses the worker of a datagram by its connection ID."""
    siblings: tuple[socket.socket, ...]
    """For what the workers ask each other, by worker."""
    sibling_paths: tuple[Path, ...]
    addresses: list[tuple[str, str]]
    """Each transport and its addresses, as `Broker.addresses`."""
    webtransport_port: int | None
    """The port of WebTransport, if it is served."""

    def close_others(self, number: int) -> None:
        """Close what the worker `number` does not use.

        A socket stays in the kernel's group, and gets datagrams that nothing reads, while any process holds it.
        """
        for other in range(len(self.siblings)):
            if other != number:
                for sock in (*self.udp[other], self.siblings[other]):
                    sock.close()


@contextmanager
def open_held_sockets(config: Config, count: int) -> Iterator[HeldSockets]:
    """Open the sockets of `count` workers. Raises `ConfigError` for an address that cannot be bound."""
    with ExitStack() as closing:
        listeners = [
            closing.enter_context(_listen(family, address))
            for bind in config.websocket.bind
            for family, address in _resolve(bind, socket.SOCK_STREAM, bind)
        ]
        steered = can_steer_datagrams()
        groups = [
            [closing.enter_context(sock) for sock in _bind_group(family, address, count if steered else 1, bind)]
            for bind in (config.webtransport.bind if config.webtransport_served else ())
            for family, address in _resolve(bind, socket.SOCK_DGRAM, f"UDP {bind}")
        ]
        udp = tuple(tuple(group[number] for group in groups if number < len(group)) for number in range(count))
        directory = closing.enter_context(_private_directory())
        paths = tuple(directory / str(number) for number in range(count))
        siblings = tuple(closing.enter_context(_listen(socket.AF_UNIX, str(path))) for path in paths)
        transports = ("websocket", listeners), ("webtransport", udp[0])
        addresses = [(name, join_address(*sock.getsockname()[:2])) for name, sockets in transports for sock in sockets]
        port = next((int(sock.getsockname()[1]) for sock in udp[0]), None)
        yield HeldSockets(tuple(listeners), udp, steered, siblings, paths, addresses, port)


def _resolve(bind: str, kind: socket.SocketKind, shown: str) -> Sequence[tuple[socket.AddressFamily, Any]]:
    host, port = split_address(bind)
    with _refusing(shown):
        found = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)
    return [(family, address) for family, _, _, _, address in found]


@contextmanager
def _refusing(shown: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot listen on {shown}: {error.strerror or error}") from error


def _listen(family: socket.AddressFamily, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        with _refusing(_show(address)):
            sock.bind(address)
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_group(family: socket.AddressFamily, address: Any, count: int, bind: str) -> list[socket.socket]:
    """Bind `count` UDP sockets to one address, and let the kernel choose among them."""
    sockets: list[socket.socket] = []
    try:
        with _refusing(f"UDP {bind}"):
            for number in range(count):
                sock = socket.socket(family, socket.SOCK_DGRAM)
                sockets.append(sock)
                prepare_udp_socket(sock)
                if number:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    sock.bind(sockets[0].getsockname())
                    continue
                # The first one binds alone, or it would join the sockets of another broker of the same user.
                sock.bind(address)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if count > 1:
                steer_datagrams(sockets[0], count)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


@contextmanager
def _private_directory() -> Iterator[Path]:
    for parent in _DIRECTORIES:
        try:
            made = tempfile.TemporaryDirectory(prefix="catbus-workers-", dir=parent, ignore_cleanup_errors=True)
        except OSError:
            continue
        with made as path:
            yield Path(path)
        return
    raise ConfigError(f"workers need a directory for their sockets, and none of {', '.join(_DIRECTORIES)} is writable")


def _show(address: Any) -> str:
    return join_address(*address[:2]) if isinstance(address, tuple) else str(address)
