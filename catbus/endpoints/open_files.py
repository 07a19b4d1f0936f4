"""Open files: how many the process may have, and how many of them connections get."""

from __future__ import annotations

import errno
import resource

import trio

from ..observability.loggers import RateLimitedLog, get_logger
from .connection_registry import ConnectionRegistry

SPARE_FILES = 40
"""File descriptors that connections do not get: the ports and up to eight connections to the database take about 25,
and connections over the limit, while they are told so, eight."""
PAUSE = 0.1
"""Seconds until a connection is accepted again for which no file was left. Meanwhile it waits in the kernel."""

_SHORTAGES = errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS

logger = get_logger("catbus.endpoints")


def raise_limit() -> None:
    """Let this process open as many files as it may allow itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_that_fit(wanted: int, files: int) -> int:
    """As many connections as are wanted, or as a limit of `files` open files has room for."""
    return wanted if files == resource.RLIM_INFINITY else min(wanted, max(1, files - SPARE_FILES))


class RetryingListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts from another listener, also when no file is left for a while: then it waits, and says so seldom."""

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
                self._registry.starved += 1
                now, text = trio.current_time(), error.strerror
                self._shortages.log(now, "a connection waits, as none can be accepted", kind=text, reason=text)
            await trio.sleep(PAUSE)

    async def aclose(self) -> None:
        await self._listener.aclose()
