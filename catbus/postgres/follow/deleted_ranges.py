"""Deleted ranges: messages that somebody deleted from the log by hand, as the last poll has found them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import trio

from ...observability.loggers import REPEAT_INTERVAL, get_logger
from ..access.asyncpg_bridge import DatabaseConnection

logger = get_logger("catbus.postgres")

REPORT_TIMEOUT = 2.5
_REPORT = "SELECT ranges, missing, firsts, lasts, repaired FROM catbus.deleted_range_report()"


class DeletedRangeError(OSError):
    """A page of the log cannot be read: somebody deleted its first entries by hand."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(f"the log lacks messages {first} to {last}: `catbus repair` goes on behind them")


@dataclass(frozen=True, slots=True)
class DeletedRangeReport:
    """The deleted ranges that are not repaired: their count, how many messages are missing, and the first ten ranges.

    `repaired` is the last seq of the newest repaired range; 0 without one.
    """

    count: int = 0
    missing: int = 0
    ranges: Sequence[tuple[int, int]] = ()
    repaired: int = 0


class DeletedRanges:
    """Keeps the report of the ranges that any replica has found, and logs it repeatedly while there are some."""

    def __init__(self) -> None:
        self.report = DeletedRangeReport()
        self._seen: tuple[int | None, int] = None, 0
        self._due = -inf

    async def update(self, connection: DatabaseConnection, version: int | None, floor: int) -> bool:
        """Read the report if something has changed. Returns whether a range was repaired since.

        `version` and `floor` are those of the last poll. A range below the floor does not count any more.
        """
        seen = version, floor if self.report.count else 0
        changed = seen != self._seen
        previous = self.report
        if changed:
            count, missing, firsts, lasts, repaired = await connection.fetchrow(_REPORT, timeout=REPORT_TIMEOUT)
            ranges = tuple(zip(firsts or (), lasts or (), strict=True))
            self.report = DeletedRangeReport(count, missing, ranges, repaired or 0)
            self._seen = version, floor if count else 0
        self._log(previous)
        return changed and self.report.repaired > 0

    def _log(self, previous: DeletedRangeReport) -> None:
        report, now = self.report, trio.current_time()
        if report.count and (report != previous or now >= self._due):
            self._due = now + REPEAT_INTERVAL
            logger.error(
                "messages are missing in the log: subscriptions stop before them until `catbus repair` is run",
                missing=report.missing,
                holes=report.count,
                ranges=[f"{first}-{last}" for first, last in report.ranges],
            )
        elif previous.count and not report.count:
            logger.info("no messages are missing in the log any more")
