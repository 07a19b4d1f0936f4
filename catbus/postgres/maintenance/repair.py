"""Looking through the whole log for holes, and having readers go on behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...config import DatabaseSettings
from ...errors import ConfigError
from ..access.asyncpg_bridge import DatabaseConnection
from ..access.migrations import open_connection, schema_files

WINDOW = 100_000
"""Seqs that are looked through at once, which takes some 30 ms by the index."""
PORTION = 500
"""Holes that are repaired in one transaction: nobody can append meanwhile."""
PATIENCE = 60.0

_VERSION = "SELECT version FROM catbus.schema_version"
_POSITION = "SELECT head, floor FROM catbus.position()"
_LIST = "SELECT first, last FROM catbus.list_deleted_ranges($1, $2)"
# A database may have another isolation level as its default.
_REPAIR = """
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SELECT catbus.repair('{{{firsts}}}'::bigint[], '{{{lasts}}}'::bigint[]);
COMMIT
"""

DeletedRange = tuple[int, int]
ReportPosition = Callable[[int, int], None]


async def repair(
    settings: DatabaseSettings, tell: ReportPosition, *, apply: bool
) -> tuple[DeletedRange, list[DeletedRange]]:
    """Look through the log, and with `apply` repair what is found. Returns the first and last seq, and the holes.

    `tell` is called with the seq up to which has been looked, and the last one. It may be cut off at any moment and
    called again, while replicas run. Raises `ConfigError` and `Unavailable` as `migrate.init` does.
    """
    async with open_connection(settings) as connection:
        await _check_version(connection)
        bounds, holes = await find_deleted_ranges(connection, tell)
        for start in range(0, len(holes) if apply else 0, PORTION):
            await _repair(connection, holes[start : start + PORTION])
        return bounds, holes


async def find_deleted_ranges(
    connection: DatabaseConnection, tell: ReportPosition
) -> tuple[DeletedRange, list[DeletedRange]]:
    """The first and the last seq, and the holes between them that were not repaired."""
    head, floor = await connection.fetchrow(_POSITION)
    after, holes = floor - 1, list[DeletedRange]()
    while after < head:
        until = min(after + WINDOW, head)
        for first, last in await connection.fetch(_LIST, after, until, timeout=PATIENCE):
            if holes and holes[-1][1] + 1 == first:
                first = holes.pop()[0]
            holes.append((first, last))
        # Retention may have moved on meanwhile, which is no hole.
        _, floor = await connection.fetchrow(_POSITION)
        after = max(until, floor - 1)
        tell(min(after, head), head)
    return (floor, head), [(max(first, floor), last) for first, last in holes if last >= floor]


async def _repair(connection: DatabaseConnection, holes: Sequence[DeletedRange]) -> None:
    firsts, lasts = (",".join(map(str, ends)) for ends in zip(*holes, strict=True))
    await connection.execute(_REPAIR.format(firsts=firsts, lasts=lasts), timeout=PATIENCE)


async def _check_version(connection: DatabaseConnection) -> None:
    (version,) = await connection.fetchrow(_VERSION)
    newest = schema_files()[-1][0]
    if version != newest:
        what = "`catbus init` brings it there" if version < newest else "use a newer release"
        raise ConfigError(f"the schema has version {version}, and this release needs {newest}: {what}")
