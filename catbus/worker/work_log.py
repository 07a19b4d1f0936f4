"""What both kinds of workers do with errors and with the end of a transaction: count, log, and decide on a retry."""

from __future__ import annotations

import random
from typing import Protocol

from ..observability.loggers import RateLimitedLog, get_logger
from .database_errors import final_error, is_database_error
from .work_cycle import Turn, WorkCycle

logger = get_logger("catbus.worker")


class Connected(Protocol):
    """A session of a worker."""

    @property
    def lost(self) -> bool:
        """Whether the connection has ended. A pool may raise an error for one that it has taken back."""


class WorkLog:
    """The log lines of one worker. Times are those of its own clock, in seconds."""

    def __init__(self, cycle: WorkCycle) -> None:
        self._cycle = cycle
        self._failures = RateLimitedLog(logger.warning, burst=3)

    def begin(self, *, notifications: bool) -> None:
        logger.info("consumer begins", consumer=self._cycle.name, notifications=notifications)

    def stop(self) -> None:
        logger.info("consumer stops", consumer=self._cycle.name, processed=self._cycle.statistics.processed)

    def fail(self, turn: Turn, error: Exception, now: float) -> None:
        """Count the exception of a handler. The turn then says what becomes of its messages."""
        turn.fail(f"{type(error).__name__}: {error}", random.random())  # noqa: S311
        self._cycle.statistics.failures += 1
        self._failures.log(
            now, "handler failed", consumer=self._cycle.name, seq=turn.messages[0].seq,
            messages=len(turn.messages), attempt=turn.messages[0].attempt, exception=error,
        )  # fmt: skip

    def end(self, turn: Turn, now: float) -> None:
        """Note that the transaction of a turn is committed."""
        cycle = self._cycle
        cycle.end(turn, now)
        if turn.rejected is not None:
            seq = turn.messages[0].seq
            self._failures.log(now, "message is a dead letter", consumer=cycle.name, seq=seq, reason=turn.rejected)
        if (report := cycle.report(now)) is not None:
            logger.info("consumer progress", consumer=cycle.name, **report)

    def lose(self, error: Exception, session: Connected | None, now: float) -> float:
        """Return the seconds until the next connection, after an error of one, or of connecting (None).

        Raises `ConsumerError` where a retry is of no use, and the error itself if it does not come from the database.
        """
        if (final := final_error(error)) is not None:
            raise final from error
        if not is_database_error(error) and (session is None or not session.lost):
            raise error
        seconds = self._cycle.lost(random.random())  # noqa: S311
        self._failures.log(
            now, "the database is unreachable", consumer=self._cycle.name, retry_in=round(seconds, 1),
            kind=type(error).__name__, reason=str(error),
        )  # fmt: skip
        return seconds
