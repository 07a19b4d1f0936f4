"""How the package logs: through the standard library, so that a program which embeds it decides what becomes of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from math import inf

import structlog
from structlog.stdlib import BoundLogger

REPEAT = 60.0
"""Seconds for which a line that was logged is only counted when it comes again."""
_REASONS = 64
"""Reasons that are remembered; beyond that the oldest is forgotten."""


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


class Recurring:
    """Log what may come again and again: a new reason at once, and the same one `burst` times in `REPEAT` seconds.

    Later ones are counted, and the next line has the count as `repeated`. Of an exception the first line has the
    traceback, and the later ones have the text. Digits do not tell reasons apart: they are ports, seqs, and times.
    """

    def __init__(self, log: Callable[..., object], *, burst: int = 1) -> None:
        self._log = log
        self._burst = burst
        self._reasons: dict[tuple[str, ...], tuple[float, int, int]] = {}
        """When each may be logged again, and how often it was logged and counted until then."""

    def note(
        self, now: float, event: str, *, kind: object = "", exception: BaseException | None = None, **fields: object
    ) -> bool:
        """Log an event, or count it; returns whether it was logged. `now` is in seconds, by any one clock."""
        key = event, type(exception).__name__, re.sub(r"\d+", "0", f"{kind} {exception}")[:200]
        known = self._reasons.pop(key, None)
        until, logged, counted = known or (-inf, 0, 0)
        if now < until and logged >= self._burst:
            self._reasons[key] = until, logged, counted + 1
            return False
        if now >= until:
            until, logged = now + REPEAT, 0
        self._reasons[key] = until, logged + 1, 0
        if len(self._reasons) > _REASONS:
            del self._reasons[next(iter(self._reasons))]
        if counted:
            fields["repeated"] = counted
        if exception is not None and known is None:
            fields["exc_info"] = exception
        elif exception is not None:
            fields["error"] = f"{type(exception).__name__}: {exception}"
        self._log(event, **fields)
        return True
