"""`catbus erase`: removes the contents of messages from the log, and leaves their seqs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from ...config import DatabaseSettings
from ..access.asyncpg_bridge import DatabaseConnection
from ..access.migrations import check_version, open_connection
from .vacuum import vacuum_tables

VACUUM_PATIENCE = 3.0
"""Seconds for which the command waits for transactions that began before the erasure."""
VACUUM_RETRY_INTERVAL = 0.1
BATCH_TIMEOUT = 60.0
"""Seconds for 10,000 entries."""

_HEAD = "SELECT head FROM catbus.log_position()"
_OUTBOX = "SELECT catbus.erase_outbox($1, $2)"
_RETAINED = "SELECT catbus.erase_retained($1, $2, $3, $4, $5)"
_DEAD_LETTERS = "SELECT catbus.erase_dead_letters($1, $2, $3, $4)"
_BATCH = "SELECT scanned, matched, channel, seq FROM catbus.erase_batch($1, $2, $3, $4, $5, $6, $7)"

ReportProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Selection:
    """Messages to be erased: those that `pattern` matches, and, if given, of `sender` and older than `before`.

    `before` is in milliseconds since 1970. Messages in the outbox have no sender and no time yet.
    """

    pattern: str
    sender: str | None = None
    before: int | None = None


@dataclass(frozen=True, slots=True)
class ErasureReport:
    """The number of messages, and the tables that could not be vacuumed yet."""

    found: int
    unvacuumed: tuple[str, ...] = ()


async def erase(
    settings: DatabaseSettings, selection: Selection, report_progress: ReportProgress, *, apply: bool
) -> ErasureReport:
    """Count the selected messages, and with `apply` erase them, and vacuum the tables.

    `report_progress` is called with the number of entries that were looked at and of those found. It may be interrupted
    and repeated at any moment, while replicas run. Raises as `migrations.init` does.
    """
    async with open_connection(settings) as connection:
        await check_version(connection)
        found = await erase_messages(connection, selection, report_progress, apply=apply)
        unvacuumed = await vacuum_tables(connection) if apply else []
        with trio.move_on_after(VACUUM_PATIENCE):
            # An append that began before the erasure has ended in a moment.
            while unvacuumed:
                await trio.sleep(VACUUM_RETRY_INTERVAL)
                with trio.CancelScope(shield=True):
                    unvacuumed = await vacuum_tables(connection)
        return ErasureReport(found, tuple(unvacuumed))


async def erase_messages(
    connection: DatabaseConnection,
    selection: Selection,
    report_progress: ReportProgress = lambda scanned, found: None,
    *,
    apply: bool,
) -> int:
    """Count the selected messages, and with `apply` erase them, one batch in each transaction. Returns their number.

    Raises one of `DATABASE_ERRORS`. The batches before that stay erased.
    """
    found = scanned = 0
    if selection.sender is None and selection.before is None:
        # The outbox comes first: what a replica moves from there meanwhile is in the log when the head is read.
        (found,) = await connection.fetchrow(_OUTBOX, selection.pattern, apply, timeout=BATCH_TIMEOUT)
    (head,) = await connection.fetchrow(_HEAD)
    (retained,) = await connection.fetchrow(
        _RETAINED, selection.pattern, selection.sender, selection.before, head, apply, timeout=BATCH_TIMEOUT
    )
    found += int(retained)
    channel, seq = "", 0
    while True:
        batch, matched, channel, seq = await connection.fetchrow(
            _BATCH,
            selection.pattern,
            selection.sender,
            selection.before,
            head,
            channel,
            seq,
            apply,
            timeout=BATCH_TIMEOUT,
        )
        if not batch:
            break
        scanned += batch
        found += matched
        report_progress(scanned, found)
    # The dead letters come last: what a consumer rejects from now on is erased already.
    (dead,) = await connection.fetchrow(
        _DEAD_LETTERS, selection.pattern, selection.sender, selection.before, apply, timeout=BATCH_TIMEOUT
    )
    return found + int(dead)
