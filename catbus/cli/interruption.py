"""The end of a command that runs until Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def cancelled_by_signal() -> AsyncIterator[None]:
    """Cancel the block on SIGINT and SIGTERM, and end it without an error."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_on_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop_on_signal)
            yield
            nursery.cancel_scope.cancel()
