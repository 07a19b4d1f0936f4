"""Replicas with a planted mistake, which the checker has to find: `python -m tests.chaos.mistakes NAME run ...`.

Each is the broker with one function replaced by a wrong one. If the replacement does not fit any more, the replica ends
with the exit status STALE_MISTAKE.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from catbus.auth.grants import Identity
from catbus.auth.live_permissions import LivePermissions
from catbus.cli.main_command import main
from catbus.delivery.fan_out import Delivery
from catbus.delivery.subscription import Subscription
from catbus.endpoints.http.event_stream import EventStream
from catbus.error_codes import ErrorCode
from catbus.log import Append, Committed, Rejected, RetainedPage
from catbus.postgres import PostgresLog
from catbus.postgres.append import log_writer
from catbus.postgres.append.append_batch import AppendBatch
from catbus.postgres.append.log_writer import LogWriter
from catbus.presence.member_state import SessionState
from catbus.presence.mirror import Mirror
from catbus.protocol import server_sent_events
from tests.mistakes import MistakePlanter

from .faults import NO_FAULTS

STALE_MISTAKE = 70


def acknowledge_early(planter: MistakePlanter) -> None:
    """Acknowledge messages when a batch is taken, before it is committed."""
    take = LogWriter._take_queued

    def take_and_acknowledge(self: LogWriter) -> AppendBatch | None:
        batch = take(self)
        if batch is not None:
            batch.settle([Committed(self._tail.announced + nth) for nth, _ in enumerate(batch.appends, 1)])
        return batch

    planter.replace(LogWriter, "_take_queued", take_and_acknowledge)


def ignore_keys(planter: MistakePlanter) -> None:
    """Do not recognise a retry: ignore the key that its client sent."""
    number = LogWriter._assign_keys

    def number_anew(self: LogWriter, appends: Sequence[Append]) -> AppendBatch:
        for append in appends:
            append.producer = None
        return number(self, appends)

    planter.replace(LogWriter, "_assign_keys", number_anew)


def announce_no_gap(planter: MistakePlanter) -> None:
    """Send no `gap`."""

    def announce_gap(self: Delivery, subscription: Subscription, known: int, cursor: int, reason: str) -> None:
        subscription.send_queue.pin()

    planter.replace(Delivery, "_announce_gap", announce_gap)


def ignore_revocations(planter: MistakePlanter) -> None:
    """Do not apply a changed role to connected sessions."""

    async def update(
        self: LivePermissions, keys: Collection[bytes], identities: Mapping[bytes, Identity], asked: int
    ) -> None:
        pass

    planter.replace(LivePermissions, "_update", update)


def ignore_last_event_id(planter: MistakePlanter) -> None:
    """Begin every event stream at the head."""
    subscribe = EventStream.subscribe

    async def subscribe_at_head(
        self: EventStream,
        token: str,
        patterns: tuple[str, ...],
        cursor: tuple[int, str | None] | None,
        **options: Any,
    ) -> None:
        await subscribe(self, token, patterns, None, **options)

    planter.replace(EventStream, "subscribe", subscribe_at_head)


def send_ids_ahead(planter: MistakePlanter) -> None:
    """Send `id` lines that are ahead of the messages before them."""
    id_line = server_sent_events.id_line

    def ahead(seq: int, epoch: str) -> bytes:
        return id_line(seq + 5, epoch)

    planter.replace(server_sent_events, "id_line", ahead)


def ignore_expectations(planter: MistakePlanter) -> None:
    """Publish whatever the retained message is."""
    number = LogWriter._assign_keys

    def expect_nothing(self: LogWriter, appends: Sequence[Append]) -> AppendBatch:
        for append in appends:
            append.expect = None
        return number(self, appends)

    planter.replace(LogWriter, "_assign_keys", expect_nothing)


def report_wrong_conflicts(planter: MistakePlanter) -> None:
    """Report the seq that follows that of the present retained message."""

    def conflict(retained_seq: int) -> Rejected:
        return Rejected(ErrorCode.CONFLICT, "", retained_seq + 1)

    planter.replace(log_writer, "conflict", conflict)


def shorten_snapshots(planter: MistakePlanter) -> None:
    """Leave the last retained message out of each page of a snapshot."""
    read = PostgresLog.retained

    async def read_less(self: PostgresLog, pattern: str, **options: Any) -> RetainedPage:
        page = await read(self, pattern, **options)
        return replace(page, entries=page.entries[:-1])

    planter.replace(PostgresLog, "retained", read_less)


def announce_leaves_early(planter: MistakePlanter) -> None:
    """Announce a member as gone as soon as its session has ended."""
    drop = Mirror._drop

    def drop_at_once(self: Mirror, session: SessionState, expected: float | None, now: float) -> None:
        drop(self, session, None, now)

    planter.replace(Mirror, "_drop", drop_at_once)


def plant_nothing(planter: MistakePlanter) -> None:
    """Leave the broker as it is."""


EARLY_WORKERS = "the cursor of a consumer moves before the effect"
"""The mistake that workers make, not the broker."""

MISTAKES: dict[str, tuple[Callable[[MistakePlanter], None], str, str]] = {
    "acknowledged before the commit": (acknowledge_early, "database killed", "acknowledged"),
    "a retry is not checked": (ignore_keys, "answers to clients lost", "once"),
    "a gap is not announced": (announce_no_gap, "database failed over", "whole"),
    "a revoke is not applied": (ignore_revocations, NO_FAULTS, "readable"),
    "`Last-Event-ID` is ignored": (ignore_last_event_id, "connections reset", "whole"),
    "an `id` is ahead of what was sent": (send_ids_ahead, "connections reset", "whole"),
    "`expect` is ignored": (ignore_expectations, NO_FAULTS, "counted"),
    "a conflict has a wrong seq": (report_wrong_conflicts, NO_FAULTS, "conflicts"),
    "a snapshot lacks a retained message": (shorten_snapshots, NO_FAULTS, "mapped"),
    "a member is gone without a grace": (announce_leaves_early, "connections reset", "stays"),
    EARLY_WORKERS: (plant_nothing, NO_FAULTS, "processed"),
}
"""By name: what plants the mistake, the faults that bring it to light, and the promise that it breaks."""


def assert_mistakes_fit() -> None:
    """Raise `AssertionError` unless every mistake can be planted in the broker as it is."""
    for plant, *_ in MISTAKES.values():
        with pytest.MonkeyPatch.context() as patch:
            plant(MistakePlanter(patch))


def exit_stale(error: BaseException) -> None:
    """End the process at once, past every handler of the broker."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(STALE_MISTAKE)


if __name__ == "__main__":
    plant, *_ = MISTAKES[sys.argv.pop(1)]
    try:
        plant(MistakePlanter(pytest.MonkeyPatch(), exit_stale))
    except (AssertionError, AttributeError) as error:
        exit_stale(error)
    main()
