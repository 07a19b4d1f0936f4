"""How the package logs: through the standard library, so that a program which embeds it decides what becomes of it."""

from __future__ import annotations

import logging

import structlog
from structlog.stdlib import BoundLogger


def get_logger(name: str) -> BoundLogger:
    """A structlog logger over `logging.getLogger(name)`: keywords become attributes of the record (`extra`)."""
    logger: BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=BoundLogger,
    )
    return logger


class LostLines:
    """Log lines of this process that were not written, because nobody read the output or it could not be written."""

    number = 0


lost_lines = LostLines()
"""Counted by what writes log lines, and read by the metrics."""


class Seldom:
    """Lets a line that could be logged again and again through once in a while, with how often it was due."""

    def __init__(self, interval: float = 60.0) -> None:
        self._interval = interval
        self._last: float | None = None
        self._number = 0

    def count(self, now: float) -> int:
        """Count once. Returns how often that was since the last line, if one is due at `now` (seconds), else 0."""
        self._number += 1
        if self._last is not None and now - self._last < self._interval:
            return 0
        self._last, number, self._number = now, self._number, 0
        return number
