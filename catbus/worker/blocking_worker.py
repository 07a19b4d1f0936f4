"""`consume_blocking`: the loop of a worker without an event loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, overload

from ..client.reconnect_policy import Backoff
from ..errors import ConsumerError
from .async_worker import DEFAULT_BACKOFF
from .blocking_sessions import BlockingSession, hears_notifications, make_blocking_session, open_blocking
from .work_cycle import COALESCE_PAUSE, ConsumerMessage, Turn, WorkCycle, WorkStatistics
from .work_log import WorkLog

SLEEP_SLICE = 0.1
"""Seconds after which a sleeping worker looks whether it is stopped."""


@overload
def consume_blocking(
    connect: Callable[[], Any],
    name: str,
    handler: Callable[[Any, ConsumerMessage], object],
    *,
    batch: None = None,
    attempts: int | None = 5,
    backoff: Backoff = DEFAULT_BACKOFF,
    poll: float = 1.0,
    stop: threading.Event | None = None,
    statistics: WorkStatistics | None = None,
) -> None: ...


@overload
def consume_blocking(
    connect: Callable[[], Any],
    name: str,
    handler: Callable[[Any, Sequence[ConsumerMessage]], object],
    *,
    batch: int,
    attempts: int | None = 5,
    backoff: Backoff = DEFAULT_BACKOFF,
    poll: float = 1.0,
    stop: threading.Event | None = None,
    statistics: WorkStatistics | None = None,
) -> None: ...


def consume_blocking(
    connect: Callable[[], Any],
    name: str,
    handler: Callable[[Any, Any], object],
    *,
    batch: int | None = None,
    attempts: int | None = 5,
    backoff: Backoff = DEFAULT_BACKOFF,
    poll: float = 1.0,
    stop: threading.Event | None = None,
    statistics: WorkStatistics | None = None,
) -> None:
    """`consume` without an event loop, on blocking connections of psycopg or SQLAlchemy.

    `connect` returns a connection, or a context manager of one, for example `engine.connect`. `stop` may be set by
    another thread or by a signal handler, and is noticed within `poll` seconds.
    """
    cycle = WorkCycle(
        name, statistics or WorkStatistics(), batch=batch, attempts=attempts, backoff=backoff, poll=poll
    )  # fmt: skip
    _BlockingWorker(cycle, handler, stop or threading.Event(), single=batch is None).run(connect)


class _BlockingWorker:
    def __init__(
        self, cycle: WorkCycle, handler: Callable[[Any, Any], object], stop: threading.Event, *, single: bool
    ) -> None:
        self._cycle = cycle
        self._handler = handler
        self._stop = stop
        self._single = single
        self._log = WorkLog(cycle)

    def run(self, connect: Callable[[], Any]) -> None:
        """Work on one connection after the other."""
        while not self._stop.is_set():
            session: BlockingSession | None = None
            close: Callable[[], object] | None = None
            try:
                connection, close = open_blocking(connect)
                session = make_blocking_session(connection)
                self._work(session)
            except ConsumerError:
                raise
            except Exception as error:  # noqa: BLE001 (others are raised again)
                seconds = self._log.lose(error, session, time.monotonic())
            else:
                return
            finally:
                if close is not None:
                    with suppress(Exception):
                        close()
            self._sleep(seconds)

    def _work(self, session: BlockingSession) -> None:
        direct = hears_notifications(session)
        wait = session.wait_notified if direct else self._sleep
        self._log.begin(notifications=direct)
        while not self._stop.is_set():
            if not self._turn(session).messages and not self._stop.is_set():
                wait(self._cycle.pause(time.monotonic()))
                time.sleep(COALESCE_PAUSE)
        self._log.stop()

    def _turn(self, session: BlockingSession) -> Turn:
        """One transaction."""
        cycle = self._cycle
        with session.transaction():
            turn = cycle.begin(session.fetch(cycle.receive))
            if turn.messages and turn.statement is None:
                try:
                    with session.transaction():
                        self._handler(session.connection, turn.messages[0] if self._single else turn.messages)
                except Exception as error:
                    if session.lost:
                        raise
                    self._log.fail(turn, error, time.monotonic())
            if turn.statement is not None:
                session.fetch(turn.statement)
        self._log.end(turn, time.monotonic())
        return turn

    def _sleep(self, seconds: float) -> None:
        # Not Event.wait: a signal handler that sets the event meanwhile could wait for its lock forever.
        end = time.monotonic() + seconds
        while not self._stop.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, SLEEP_SLICE))
