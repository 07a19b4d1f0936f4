"""The limit of open files, and accepting connections near that limit."""

from __future__ import annotations

import errno
import resource

import trio

from ..observability.loggers import RateLimitedLog, get_logger
from .connection_registry import ConnectionRegistry

RESERVED_FILES = 40
"""File descriptors kept for other things than connections: listener sockets and up to nine connections to the database
take about 25, and connections that are being rejected take eight."""
ACCEPT_RETRY_DELAY = 0.1
"""Seconds until the next try to accept after no file was left. Meanwhile the connection waits in the kernel."""

_SHORTAGES = errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS

logger = get_logger("catbus.endpoints")


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_within_limit(wanted: int, files: int) -> int:
    """Return `wanted`, or the number of connections that fit into a limit of `files` open files if that is smaller."""
    return wanted if files == resource.RLIM_INFINITY else min(wanted, max(1, files - RESERVED_FILES))


class RetryingListener(trio.abc.Listener[trio.SocketStream]):
    """A listener that retries when no file is left for a new connection, and logs that at a limited rate."""

    def __init__(self, listener: trio.SocketListener, registry: ConnectionRegistry) -> None:
        self._listener = listener
        self._registry = registry
        self._shortages = RateLimitedLog(logger.warning)

    async def accept(self) -> trio.SocketStream:
        while True:
            try:
                return await self._listener.accept()
            except OSError as error:
                if error.errno not in _SHORTAGES:
                    raise
                self._registry.accept_failures += 1
                now, text = trio.current_time(), error.strerror
                self._shortages.log(now, "cannot accept a connection", kind=text, reason=text)
            await trio.sleep(ACCEPT_RETRY_DELAY)

    async def aclose(self) -> None:
        await self._listener.aclose()
