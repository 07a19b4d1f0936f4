"""A worker as its own process sees it: its number, what it has inherited, and how it asks the other workers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

MAX_WORKERS = 128
"""Workers of one broker. The first byte of a QUIC connection ID names a worker, so there cannot be more than 256."""


class SiblingReports(Protocol):
    """What the other workers of a broker say of themselves. `SiblingClient` documents the methods."""

    async def add_metrics(self, own: bytes) -> bytes: ...

    async def add_reports(self, own: Mapping[str, Any]) -> list[Mapping[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class Worker:
    """The worker `number` out of `count`, numbered from 0, in its own process."""

    number: int
    count: int
    restarts: int
    """How often it was started again."""
    listeners: tuple[socket.socket, ...]
    """The listener sockets for HTTP and WebSocket, which all workers share."""
    udp_sockets: tuple[socket.socket, ...]
    """Its sockets for WebTransport; none if WebTransport is not served, or if worker 0 alone serves it."""
    steered: bool
    """Whether each worker serves WebTransport, and the kernel chooses the worker by the connection ID."""
    webtransport_port: int | None
    siblings: SiblingReports
    all_stopping: Callable[[], bool]
    """Whether all workers stop. Otherwise the others serve while this one stops."""
