"""What somebody has taken out of the log by hand, as the last look has found it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import trio

from ...observability.loggers import REPEAT_INTERVAL, get_logger
from ..access.asyncpg_bridge import DatabaseConnection

logger = get_logger("catbus.postgres")

PATIENCE = 2.5
_REPORT = "SELECT ranges, missing, firsts, lasts, repaired FROM catbus.deleted_range_report()"


class DeletedRangeError(OSError):
    """A page of the log cannot be read: entries are missing that somebody has taken out by hand."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(f"the log lacks messages {first} to {last}: `catbus repair` goes on behind them")


@dataclass(frozen=True, slots=True)
class DeletedRangeReport:
    """Holes that were not repaired: how many, how many messages they lack, and the first ten. `repaired` is where the
    newest one that was repaired ends."""

    holes: int = 0
    missing: int = 0
    ranges: Sequence[tuple[int, int]] = ()
    repaired: int = 0


class DeletedRanges:
    """Knows of the holes that any replica has found, and tells of them for as long as they are there."""

    def __init__(self) -> None:
        self.report = DeletedRangeReport()
        self._seen: tuple[int | None, int] = None, 0
        self._due = -inf

    async def look(self, connection: DatabaseConnection, change: int | None, floor: int) -> bool:
        """Read the report if something has changed; returns whether a hole was repaired since.

        `change` is what the last look has returned, and `floor` too: what is below it is no hole any more.
        """
        seen = change, floor if self.report.holes else 0
        news = seen != self._seen
        previous = self.report
        if news:
            holes, missing, firsts, lasts, repaired = await connection.fetchrow(_REPORT, timeout=PATIENCE)
            ranges = tuple(zip(firsts or (), lasts or (), strict=True))
            self.report = DeletedRangeReport(holes, missing, ranges, repaired or 0)
            self._seen = change, floor if holes else 0
        self._tell(previous)
        return news and self.report.repaired > 0

    def _tell(self, previous: DeletedRangeReport) -> None:
        report, now = self.report, trio.current_time()
        if report.holes and (report != previous or now >= self._due):
            self._due = now + REPEAT_INTERVAL
            logger.error(
                "messages are missing in the log: subscriptions stop before them until `catbus repair` is run",
                missing=report.missing,
                holes=report.holes,
                ranges=[f"{first}-{last}" for first, last in report.ranges],
            )
        elif previous.holes and not report.holes:
            logger.info("no messages are missing in the log any more")
