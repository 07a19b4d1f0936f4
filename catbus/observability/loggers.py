"""Loggers of the package, over the standard library: a program that embeds the broker configures the output."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from math import inf

import structlog
from structlog.stdlib import BoundLogger

REPEAT_INTERVAL = 60.0
"""Seconds in which a repeated event is only counted."""
_MAX_EVENTS = 64
"""Different events that are remembered; beyond that the oldest is forgotten."""


def get_logger(name: str) -> BoundLogger:
    """A structlog logger over `logging.getLogger(name)`: keywords become attributes of the record (`extra`)."""
    logger: BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=BoundLogger,
    )
    return logger


class DroppedLogLines:
    """Log lines that this process dropped: nothing read its output, or writing failed."""

    number = 0


dropped_log_lines = DroppedLogLines()
"""Counted by the writer of log lines, and read by the metrics."""


class RateLimitedLog:
    """Logs events that may repeat: a new event at once, and the same one `burst` times in `REPEAT_INTERVAL` seconds.

    Later ones are counted, and the next line has the count as `repeated`. The first line of an exception has the
    traceback, the later ones have its text. Events that differ in digits only are the same: digits are ports, seqs and
    times.
    """

    def __init__(self, log: Callable[..., object], *, burst: int = 1) -> None:
        self._log = log
        self._burst = burst
        self._events: dict[tuple[str, ...], tuple[float, int, int]] = {}
        """By event: the end of its interval, and how often it was logged and counted in it."""

    def log(
        self, now: float, event: str, *, kind: object = "", exception: BaseException | None = None, **fields: object
    ) -> bool:
        """Log an event, or count it; return whether it was logged. `now` is in seconds, by any one clock."""
        key = event, type(exception).__name__, re.sub(r"\d+", "0", f"{kind} {exception}")[:200]
        known = self._events.pop(key, None)
        until, logged, counted = known or (-inf, 0, 0)
        if now < until and logged >= self._burst:
            self._events[key] = until, logged, counted + 1
            return False
        if now >= until:
            until, logged = now + REPEAT_INTERVAL, 0
        self._events[key] = until, logged + 1, 0
        if len(self._events) > _MAX_EVENTS:
            del self._events[next(iter(self._events))]
        if counted:
            fields["repeated"] = counted
        if exception is not None and known is None:
            fields["exc_info"] = exception
        elif exception is not None:
            fields["error"] = f"{type(exception).__name__}: {exception}"
        self._log(event, **fields)
        return True
