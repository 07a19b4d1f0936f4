"""`catbus repair`: searches the whole log for deleted ranges, and has readers continue behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...config import DatabaseSettings
from ..access.asyncpg_bridge import DatabaseConnection
from ..access.migrations import check_version, open_connection

SCANNED_SEQS = 100_000
"""Seqs that one statement searches, which takes about 30 ms with the index."""
REPAIRED_RANGES = 500
"""Ranges that one transaction repairs. No replica can append meanwhile."""
SCAN_TIMEOUT = 60.0

_POSITION = "SELECT head, floor FROM catbus.log_position()"
_LIST = "SELECT first, last FROM catbus.list_deleted_ranges($1, $2)"
# A database may have another isolation level by default.
_REPAIR = """
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SELECT catbus.repair('{{{firsts}}}'::bigint[], '{{{lasts}}}'::bigint[]);
COMMIT
"""

DeletedRange = tuple[int, int]
ReportPosition = Callable[[int, int], None]


async def repair(
    settings: DatabaseSettings, report_position: ReportPosition, *, apply: bool
) -> tuple[DeletedRange, list[DeletedRange]]:
    """Search the log, and with `apply` repair the ranges. Returns the first and last seq, and the ranges.

    `report_position` is called with the seq up to which the log was searched, and the last one. The search may be
    interrupted and repeated at any moment, while replicas run. Raises as `migrations.init` does.
    """
    async with open_connection(settings) as connection:
        await check_version(connection)
        bounds, ranges = await find_deleted_ranges(connection, report_position)
        for start in range(0, len(ranges) if apply else 0, REPAIRED_RANGES):
            await _repair(connection, ranges[start : start + REPAIRED_RANGES])
        return bounds, ranges


async def find_deleted_ranges(
    connection: DatabaseConnection, report_position: ReportPosition
) -> tuple[DeletedRange, list[DeletedRange]]:
    """The first and the last seq, and the ranges between them that are not repaired."""
    head, floor = await connection.fetchrow(_POSITION)
    after, ranges = floor - 1, list[DeletedRange]()
    while after < head:
        until = min(after + SCANNED_SEQS, head)
        for first, last in await connection.fetch(_LIST, after, until, timeout=SCAN_TIMEOUT):
            if ranges and ranges[-1][1] + 1 == first:
                first = ranges.pop()[0]
            ranges.append((first, last))
        # Retention may have removed entries meanwhile; they are no deleted range.
        _, floor = await connection.fetchrow(_POSITION)
        after = max(until, floor - 1)
        report_position(min(after, head), head)
    return (floor, head), [(max(first, floor), last) for first, last in ranges if last >= floor]


async def _repair(connection: DatabaseConnection, ranges: Sequence[DeletedRange]) -> None:
    firsts, lasts = (",".join(map(str, ends)) for ends in zip(*ranges, strict=True))
    await connection.execute(_REPAIR.format(firsts=firsts, lasts=lasts), timeout=SCAN_TIMEOUT)
