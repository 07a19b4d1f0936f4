"""Replicas that lie, so that one can see the checker find it: `python -m tests.chaos.mistakes NAME run --config ...`.

Each is the broker with one function that does less than it should.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from catbus.auth.live_permissions import Permissions
from catbus.cli.main_command import main
from catbus.delivery.fan_out import Delivery
from catbus.delivery.subscription import Subscription
from catbus.log import Append, Committed
from catbus.postgres.append.append_batch import AppendBatch
from catbus.postgres.append.log_writer import LogWriter
from catbus.postgres.follow.log_reader import LogReader
from catbus.postgres.log import PostgresLog

from .faults import NOTHING


def acknowledge_early() -> None:
    """A message is acknowledged when it is about to be committed."""
    take = LogWriter._take

    def take_and_answer(self: LogWriter) -> AppendBatch | None:
        batch = take(self)
        if batch is not None:
            batch.settle([Committed(self._tail.announced + nth) for nth, _ in enumerate(batch.appends, 1)])
        return batch

    LogWriter._take = take_and_answer  # type: ignore[method-assign]


def forget_keys() -> None:
    """A retry is not checked: the key that its client gave it is not used."""
    number = LogWriter._number

    def number_anew(self: LogWriter, appends: Sequence[Append]) -> AppendBatch:
        for append in appends:
            append.producer = None
        return number(self, appends)

    LogWriter._number = number_anew  # type: ignore[method-assign]


def read_to_the_head() -> None:
    """Who is behind is caught up to what the database has, not to what the replica has handed to the live ones."""
    read, page = PostgresLog.read, LogReader.page

    async def read_on(self: PostgresLog, after: int, *, rows: int = 1000, size: int = 1 << 20) -> Any:
        if after >= self.floor - 1:
            found = await page(self._reader, after, 1 << 62, rows, size)
            if found.entries:
                return found
        return await read(self, after, rows=rows, size=size)

    PostgresLog.read = read_on  # type: ignore[method-assign]


def keep_gaps_quiet() -> None:
    """Nobody is told of what is missing."""

    def announce_gap(self: Delivery, subscription: Subscription, known: int, cursor: int, reason: str) -> None:
        subscription.mailbox.fix()

    Delivery._announce_gap = announce_gap  # type: ignore[method-assign]


def ignore_revocations() -> None:
    """What changes about a role reaches nobody who is connected."""

    async def tell(self: Permissions, *_: object) -> None:
        pass

    Permissions._tell = tell  # type: ignore[method-assign]


MISTAKES: dict[str, tuple[Callable[[], None], str]] = {
    "acknowledged before the commit": (acknowledge_early, "database killed"),
    "a retry is not checked": (forget_keys, "answers to clients lost"),
    "caught up to the database's head": (read_to_the_head, "connections reset"),
    "a gap is not announced": (keep_gaps_quiet, "database failed over"),
    "a revoke is not applied": (ignore_revocations, NOTHING),
}
"""By name: how it is made, and the faults that bring it to light."""


if __name__ == "__main__":
    make, _ = MISTAKES[sys.argv.pop(1)]
    make()
    main()
