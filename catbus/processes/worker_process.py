"""The process of one worker: a replica on the sockets that it has inherited."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import trio

from ..broker import Broker, serve
from ..config import Config
from ..observability.loggers import get_logger
from ..protocol.wire_messages import to_json
from .siblings import METRICS, REPORT, serve_siblings
from .signal_queue import QUEUED
from .worker import Worker

logger = get_logger("catbus.workers")


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """What the process of a worker has inherited from the supervisor."""

    worker: Worker
    config: Config
    siblings: socket.socket
    """The listener socket for what other workers ask."""
    ready_pipe: int
    """A pipe to write one byte to when the worker serves."""
    lifeline: int
    """A pipe that ends with the supervisor."""


async def serve_worker(process: WorkerProcess, *, reload: Callable[[], None], on_serving: Callable[[], None]) -> None:
    """Serve until a signal stops the worker, or its supervisor has ended. `on_serving` is called when it serves.

    SIGTERM starts a graceful shutdown, however often it comes, because an init system may send it to all processes. The
    supervisor sends SIGINT to stop at once. SIGHUP calls `reload`.
    """
    broker: Broker | None = None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        # The supervisor blocked them before it forked.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, QUEUED)
        async with trio.open_nursery() as nursery:

            def stop() -> None:
                if broker is None:
                    nursery.cancel_scope.cancel()
                else:
                    broker.stop()

            async def handle_signals(signals: AsyncIterator[int]) -> None:
                async for number in signals:
                    match number:
                        case signal.SIGHUP:
                            reload()
                            if broker is not None:
                                broker.reload()
                        case signal.SIGTERM:
                            logger.info("stopping", signal="SIGTERM")
                            stop()
                        case _:
                            nursery.cancel_scope.cancel()

            async def follow_supervisor() -> None:
                await trio.lowlevel.wait_readable(process.lifeline)
                logger.error("the supervisor has ended, stopping")
                stop()

            async def serve_until_stopped(*, task_status: trio.TaskStatus[Broker] = trio.TASK_STATUS_IGNORED) -> None:
                await serve(process.config, worker=process.worker, task_status=task_status)
                nursery.cancel_scope.cancel()

            nursery.start_soon(handle_signals, signals)
            nursery.start_soon(follow_supervisor)
            broker = await nursery.start(serve_until_stopped)
            replies = {METRICS: lambda: _metrics(broker), REPORT: lambda: to_json(broker.replica.describe())}
            await nursery.start(serve_siblings, process.siblings, replies)
            on_serving()
            logger.info("a worker serves", pid=os.getpid(), restarts=process.worker.restarts)
            os.write(process.ready_pipe, b"1")
            os.close(process.ready_pipe)


def _metrics(broker: Broker) -> bytes:
    found = broker.replica.scrape()
    return b"" if found is None else found[0]
