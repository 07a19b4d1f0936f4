"""The machine finds nothing wrong, and it does find what is wrong.

CATBUS_CASES   how many cases are played; `python -m tests.simulation` plays as many as there is time for
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings

from catbus.delivery.fan_out import Delivery
from catbus.log import Append, Committed, Entry, Page, Rejected
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.postgres.access.reconnecting_tasks import ReportProgress
from catbus.postgres.append import log_writer
from catbus.postgres.append.append_batch import AppendBatch
from catbus.postgres.append.log_writer import LogWriter
from catbus.postgres.follow.log_tail import LogTail

from .database import Database
from .machine import Broken, Case, cases, random_case
from .simulated import play, quiet

CASES = int(os.environ.get("CATBUS_CASES", "300"))
BOUND = 1000
"""Cases within which a mistake has to be found: less than a minute's."""


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@settings(max_examples=CASES)
@given(cases)
def test_whatever_goes_wrong_everything_is_as_promised(case: Case) -> None:
    play(case)


# Mistakes on purpose

Patch = Callable[[pytest.MonkeyPatch], None]


def acknowledge_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    send = LogWriter._send

    async def hasty(self: LogWriter, connection: DatabaseConnection, batch: AppendBatch) -> None:
        batch.settle([Committed(self._tail.applied + 1 + i) for i in range(len(batch.appends))])
        await send(self, connection, batch)

    patch.setattr(LogWriter, "_send", hasty)


def append_a_retry_without_looking_for_its_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Database, "look_up", lambda *_: None)


def append_whatever_the_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Database, "check_epoch", lambda *_: None)


def append_whatever_the_server(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Database, "is_server", lambda *_: True)


def catch_up_to_the_head_of_the_database(patch: pytest.MonkeyPatch) -> None:
    async def read(self: PostgresLog, after: int, *, rows: int = 1000, size: int = 1 << 20) -> Page:
        return await self._reader.page(max(after, self.floor - 1), after + rows, rows, size)

    patch.setattr(PostgresLog, "read", read)


def go_live_without_catching_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Delivery, "_read_for", Delivery._go_live)


def announce_no_gap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Delivery, "_announce_gap", lambda *_: None)


def drop_what_is_in_doubt(patch: pytest.MonkeyPatch) -> None:
    run = LogWriter.run

    async def forgetful(self: LogWriter, working: ReportProgress) -> None:
        self._flight.clear()
        await run(self, working)

    patch.setattr(LogWriter, "run", forgetful)


def send_what_is_in_doubt_under_new_keys(patch: pytest.MonkeyPatch) -> None:
    call, numbers = AppendBatch.call, count(1_000_000)

    def renewed(self: AppendBatch, *, move: bool = False) -> tuple[str, tuple[object, ...]]:
        if self._args is not None:
            self._args, self.numbers = None, [next(numbers) for _ in self.numbers]
        return call(self, move=move)

    patch.setattr(AppendBatch, "call", renewed)


def apply_what_a_notification_brings_without_looking_what_is_missing(patch: pytest.MonkeyPatch) -> None:
    def offer(self: LogTail, entries: Sequence[Entry]) -> None:
        if self.trusted and entries[-1].seq > self.applied:
            self.applied = max(self.applied, entries[0].seq - 1)
            self._apply(entries)

    patch.setattr(LogTail, "offer", offer)


def refuse_a_retry_as_if_it_were_the_first_try(patch: pytest.MonkeyPatch) -> None:
    def refusal(append: Append, outcome: Rejected) -> Rejected:
        return outcome

    patch.setattr(log_writer, "not_taken", refusal)


MISTAKES: tuple[Patch, ...] = (
    acknowledge_before_the_commit,
    append_a_retry_without_looking_for_its_key,
    append_whatever_the_epoch,
    append_whatever_the_server,
    catch_up_to_the_head_of_the_database,
    go_live_without_catching_up,
    announce_no_gap,
    drop_what_is_in_doubt,
    send_what_is_in_doubt_under_new_keys,
    apply_what_a_notification_brings_without_looking_what_is_missing,
    refuse_a_retry_as_if_it_were_the_first_try,
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: Patch, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    mistake(monkeypatch)
    source = Random(2)
    for number in range(BOUND):
        try:
            play(random_case(source))
        except Broken as broken:
            record_property("cases", number + 1)
            print(f"{mistake.__name__}: after {number + 1} cases\n{broken}")
            return
    pytest.fail(f"not found in {BOUND} cases")
