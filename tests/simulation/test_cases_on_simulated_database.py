"""Random cases on the simulated database keep every promise, and planted mistakes break one.

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
from catbus.delivery.send_queue import SendQueue
from catbus.log import Append, Committed, Entry, LogPage, RecentMessages, Rejected
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.postgres.access.reconnecting_tasks import ReportProgress
from catbus.postgres.append import log_writer
from catbus.postgres.append.append_batch import AppendBatch, Encrypt
from catbus.postgres.append.log_writer import LogWriter
from catbus.postgres.follow.log_tail import LogTail
from tests.mistakes import MistakePlanter

from .case_runner import Case, PromiseBroken, cases, random_case
from .simulated_database import SimulatedDatabase, StoredRow
from .simulated_runner import play, simulation_settings

CASES = int(os.environ.get("CATBUS_CASES", "300"))
MAX_CASES = 1000
"""Cases within which a mistake has to be found: less than a minute's."""


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with simulation_settings():
        yield


@settings(max_examples=CASES)
@given(cases)
def test_random_cases_keep_every_promise(case: Case) -> None:
    play(case)


# Planted mistakes


def acknowledge_before_the_commit(planter: MistakePlanter) -> None:
    send = LogWriter._send

    async def hasty(self: LogWriter, connection: DatabaseConnection, batch: AppendBatch) -> None:
        batch.settle([Committed(self._tail.applied + 1 + i) for i in range(len(batch.appends))])
        await send(self, connection, batch)

    planter.replace(LogWriter, "_send", hasty)


def append_a_retry_without_looking_up_its_key(planter: MistakePlanter) -> None:
    planter.replace(SimulatedDatabase, "look_up", lambda *_: None)


def check_conditions_before_keys(planter: MistakePlanter) -> None:
    def conflicts(self: SimulatedDatabase, held: StoredRow | None, expect: int | None, known: StoredRow | None) -> bool:
        return expect not in (None, held.seq if held else 0)

    planter.replace(SimulatedDatabase, "conflicts", conflicts)


def append_in_any_epoch(planter: MistakePlanter) -> None:
    planter.replace(SimulatedDatabase, "check_epoch", lambda *_: None)


def append_on_any_server(planter: MistakePlanter) -> None:
    planter.replace(SimulatedDatabase, "is_server", lambda *_: True)


def catch_up_to_the_head_of_the_database(planter: MistakePlanter) -> None:
    async def read(self: PostgresLog, after: int, *, rows: int = 1000, size: int = 1 << 20) -> LogPage:
        return await self._reader.page(self.epoch, max(after, self.floor - 1), after + rows, rows, size)

    planter.replace(PostgresLog, "read", read)


def go_live_without_catching_up(planter: MistakePlanter) -> None:
    planter.replace(Delivery, "_catch_up", Delivery._go_live)


def announce_no_gap(planter: MistakePlanter) -> None:
    planter.replace(Delivery, "_announce_gap", lambda *_: None)


def drop_batches_with_an_unknown_outcome(planter: MistakePlanter) -> None:
    run = LogWriter.run

    async def forgetful(self: LogWriter, report_progress: ReportProgress) -> None:
        self._in_flight.clear()
        await run(self, report_progress)

    planter.replace(LogWriter, "run", forgetful)


def resend_batches_under_new_keys(planter: MistakePlanter) -> None:
    call, numbers = AppendBatch.build_call, count(1_000_000)

    def renewed(self: AppendBatch, encrypt: Encrypt, *, move: bool = False) -> tuple[str, tuple[object, ...]]:
        if self._args is not None:
            self._args, self.numbers = None, [next(numbers) for _ in self.numbers]
        return call(self, encrypt, move=move)

    planter.replace(AppendBatch, "build_call", renewed)


def apply_a_notification_without_what_is_missing_before_it(planter: MistakePlanter) -> None:
    def offer(self: LogTail, entries: Sequence[Entry]) -> None:
        if self.trusted and entries[-1].seq > self.applied:
            self.applied = max(self.applied, entries[0].seq - 1)
            self._apply(entries)

    planter.replace(LogTail, "offer", offer)


def reject_a_retry_like_a_first_attempt(planter: MistakePlanter) -> None:
    def rejection(append: Append, outcome: Rejected) -> Rejected:
        return outcome

    planter.replace(log_writer, "rejection_of", rejection)


def leave_erased_messages_in_send_queues(planter: MistakePlanter) -> None:
    planter.replace(SendQueue, "erase", lambda *_: None)


def leave_erased_messages_in_memory(planter: MistakePlanter) -> None:
    planter.replace(RecentMessages, "erase", lambda *_: None)


MISTAKES: tuple[Callable[[MistakePlanter], None], ...] = (
    acknowledge_before_the_commit,
    append_a_retry_without_looking_up_its_key,
    check_conditions_before_keys,
    append_in_any_epoch,
    append_on_any_server,
    catch_up_to_the_head_of_the_database,
    go_live_without_catching_up,
    announce_no_gap,
    drop_batches_with_an_unknown_outcome,
    resend_batches_under_new_keys,
    apply_a_notification_without_what_is_missing_before_it,
    reject_a_retry_like_a_first_attempt,
    leave_erased_messages_in_send_queues,
    leave_erased_messages_in_memory,
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_simulation_finds_a_planted_mistake(
    mistake: Callable[[MistakePlanter], None], monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    planter = MistakePlanter(monkeypatch)
    mistake(planter)
    source = Random(2)
    for number in range(MAX_CASES):
        try:
            play(random_case(source))
        except PromiseBroken as broken:
            planter.check()
            record_property("cases", number + 1)
            print(f"{mistake.__name__}: after {number + 1} cases\n{broken}")
            return
    pytest.fail(f"not found in {MAX_CASES} cases")
