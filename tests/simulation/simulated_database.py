"""A simulated PostgreSQL with the schema of Catbus: it executes each statement of Catbus at once, in memory.

Each function corresponds to the function of the same name in catbus/postgres/schema. A state is immutable. A commit
replaces it, and a failover or a restore returns to an older one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import asyncpg  # type: ignore[import-untyped]

from catbus.log import Entry
from catbus.postgres import outbox_relay
from catbus.postgres.access.asyncpg_bridge import Row
from catbus.postgres.append import append_batch
from catbus.postgres.ephemeral import ephemeral_relay
from catbus.postgres.follow import fingerprints, log_reader
from catbus.postgres.listen import notification_listener
from catbus.postgres.maintenance import consumer_lags, heartbeat, log_retention, retained_budget, vacuum
from catbus.postgres.notifications.encryption import LOG_CHANNEL, ROLES_CHANNEL, NotificationKeys
from catbus.postgres.revocations import stored_revocations
from catbus.postgres.webhooks import batch_leases
from catbus.protocol.channels import ERASED, matches

from .case_runner import POISON

SECRET = "the secret of the log"
KEYS = NotificationKeys(SECRET)


class StoredRow(NamedTuple):
    """A row of `catbus.entries`."""

    seq: int
    at: int
    channel: str
    payload: str
    sender: str | None
    origin: bytes | None
    retain: bool | None
    producer: bytes
    number: int

    @property
    def entry(self) -> Entry:
        return Entry(
            self.seq, self.at, self.channel, self.payload.encode(), self.sender, self.origin, self.retain is True
        )


@dataclass(frozen=True)
class DatabaseState:
    """The contents of the database. Immutable."""

    rows: tuple[StoredRow, ...] = ()
    """All rows from seq 1. Queries do not see those below the floor."""
    floor: int = 1
    epochs: tuple[tuple[str, int], ...] = (("e0", 0),)
    """The epochs, each with the seq after which it began."""
    outbox: tuple[tuple[str, str], ...] = ()
    retained: tuple[StoredRow, ...] = ()
    """The retained message of each channel."""
    erasure: int = 0
    """The number of the newest erasure."""
    epoch_timeline: int = 0
    """The timeline on which the present epoch began."""

    @property
    def head(self) -> int:
        return len(self.rows)

    @property
    def epoch(self) -> str:
        return self.epochs[-1][0]

    def find(self, producer: bytes, number: int) -> StoredRow | None:
        for row in self.rows[self.floor - 1 :]:
            if row.number == number and row.producer == producer:
                return row
        return None


class SimulatedSqlError(asyncpg.PostgresError):  # type: ignore[misc]
    def __init__(self, sqlstate: str) -> None:
        super().__init__(f"SQLSTATE {sqlstate}")
        self.sqlstate = sqlstate


class SimulatedDatabase:
    """Executes statements. Calls `notify(pid, channel, payload)` for each notification of a committed transaction."""

    def __init__(self, clock: Callable[[], float], notify: Callable[[int, str, str], None]) -> None:
        self.state = DatabaseState()
        self.history = [self.state]
        """The state after each commit, oldest first."""
        self.timeline = 0
        self.server = 0
        """Identifies one run of the server. It changes with each restart."""
        self.standby = False
        self.expired_count = 0
        """The number of entries that the next retention step of a replica deletes."""
        self.on_commit: Callable[[Sequence[StoredRow], str], None] = lambda _rows, _epoch: None
        """Called with new rows, and with the epoch that their sender expected."""
        self.retention_end = 0
        """The newest seq that retention has ever deleted."""
        self._clock = clock
        self._notify = notify
        self._names = count(1)
        self._timelines = count(1)
        self._erasures = count(1)

    def execute(self, pid: int, query: str, args: Sequence[Any]) -> list[Row]:
        """Execute a statement in the process `pid` and return its rows. Raises the errors of the server."""
        return _STATEMENTS[query](self, pid, *args)

    def commit(self, state: DatabaseState) -> None:
        self.state = state
        self.history.append(state)

    # Events

    def publish(self, channel: str, payload: str) -> None:
        self.commit(replace(self.state, outbox=(*self.state.outbox, (channel, payload))))

    def apply_retention(self, entries: int) -> int:
        """Delete the oldest entries. Returns their number."""
        state = self.state
        deleted = min(entries, state.head + 1 - state.floor)
        if deleted:
            self.commit(replace(state, floor=state.floor + deleted))
            self.retention_end = max(self.retention_end, self.state.floor - 1)
        return deleted

    def set_back(self, commits: int, *, moved: bool) -> None:
        """Lose the newest commits. With `moved`, a standby without them is promoted, on a new timeline."""
        del self.history[max(len(self.history) - commits, 1) :]
        self.state = self.history[-1]
        self.timeline = next(self._timelines) if moved else self.state.epoch_timeline

    def erase(self, pattern: str) -> set[int]:
        """Erase messages, and return their seqs. No number is used twice, not even after the database was set back."""
        state = self.state
        rows = [
            row._replace(channel=ERASED, payload="null", sender=None, origin=None, retain=None)
            if matches(pattern, row.channel)
            else row
            for row in state.rows[state.floor - 1 :]
        ]
        seqs = {row.seq for row in state.rows[state.floor - 1 :] if matches(pattern, row.channel)}
        retained = tuple(row for row in state.retained if not matches(pattern, row.channel))
        if seqs or retained != state.retained:
            whole = (*state.rows[: state.floor - 1], *rows)
            self.commit(replace(state, rows=whole, retained=retained, erasure=next(self._erasures)))
            self._notify(0, ROLES_CHANNEL, KEYS.sign(ROLES_CHANNEL, "*"))
        return seqs

    def begin_epoch(self) -> None:
        self._new_epoch(0, self.state.epoch, None)

    # The log

    def _append(self, pid: int, *args: Any) -> list[Row]:
        return [self.append(pid, *_decode(args))] if self.is_server(args[-1]) else [(None,)]

    def _append_and_move(self, pid: int, *args: Any) -> list[Row]:
        if not self.is_server(args[-1]):
            return [(None,)]
        return [(*self.append(pid, *_decode(args)), *self.move(pid, args[1]))]

    def _move(self, pid: int, _: str, epoch: str, server: object) -> list[Row]:
        return [self.move(pid, epoch)] if self.is_server(server) else [(None,)]

    def is_server(self, server: object) -> bool:
        return server == self.server

    def append(self, pid: int, epoch: str, columns: list[tuple[Any, ...]], enclosed: str | None) -> Row:
        self.check_epoch(epoch)
        state, at = self.state, self._now()
        first = state.head + 1
        seqs: list[int] = []
        present: list[int | None] = []
        new: list[StoredRow] = []
        for channel, payload, producer, number, sender, origin, after, retain, expect in columns:
            if POISON in payload:
                raise SimulatedSqlError("22P02")
            known = self.look_up(producer, number)
            held = next((row for row in replace_retained(state.retained, new) if row.channel == channel), None)
            passed = after is not None and after < state.floor - 1
            if known is None and passed and retain and held and (held.producer, held.number) == (producer, number):
                known = held
            present.append(None)
            if retain and not passed and self.conflicts(held, expect, known):
                seqs.append(-2)
                present[-1] = held.seq if held else 0
            elif known is not None:
                same = known.channel == ERASED or (known.channel, known.payload) == (channel, payload)
                seqs.append(known.seq if same else 0)
            elif passed:
                seqs.append(-1)
            else:
                seqs.append(first + len(new))
                new.append(StoredRow(seqs[-1], at, channel, payload, sender, origin, retain, producer, number))
        if new:
            hint = f"{state.epoch}:{first}:{first + len(new) - 1}"
            whole = enclosed is not None and len(new) == len(columns)
            self._insert(pid, new, epoch, KEYS.sign(LOG_CHANNEL, hint, f"{at} {enclosed}" if whole else ""))
        return at, first, seqs, present

    def conflicts(self, held: StoredRow | None, expect: int | None, known: StoredRow | None) -> bool:
        """Whether an entry expects another retained message than its channel has, and is not a duplicate."""
        return known is None and expect not in (None, held.seq if held else 0)

    def move(self, pid: int, epoch: str) -> Row:
        state = self.state
        if not state.outbox:
            return 0, None, False
        self.check_epoch(epoch)
        first, at = state.head + 1, self._now()
        new = [
            StoredRow(first + i, at, channel, payload, None, None, None, b"outbox", first + i)
            for i, (channel, payload) in enumerate(state.outbox)
        ]
        last = first + len(new) - 1
        self._insert(pid, new, epoch, KEYS.sign(LOG_CHANNEL, f"{state.epoch}:{first}:{last}"), outbox=())
        return len(new), last, False

    def check_epoch(self, epoch: str) -> None:
        if epoch != self.state.epoch:
            raise SimulatedSqlError("CB001")

    def look_up(self, producer: bytes, number: int) -> StoredRow | None:
        return self.state.find(producer, number)

    def _insert(self, pid: int, new: list[StoredRow], epoch: str, hint: str, **changes: Any) -> None:
        state = self.state
        retained = replace_retained(state.retained, new)
        self.commit(replace(state, rows=(*state.rows, *new), retained=retained, **changes))
        self.on_commit(new, epoch)
        self._notify(pid, LOG_CHANNEL, hint)

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _page(self, _: int, after: int, last: int, size: int, epoch: str) -> list[Row]:
        found: list[Row] = []
        if epoch != self.state.epoch:
            return found
        for row in self.state.rows[max(after, self.state.floor - 1) : last]:
            found.append(row[:7])
            size -= len(row.channel) + len(row.payload)
            if size < 0:
                return found[:-1] or found
        return found

    def _position(self, _: int) -> list[Row]:
        return [(self.state.epoch, self.state.head, self.state.floor)]

    # Epochs

    def _poll(self, _: int, seq: int) -> list[Row]:
        state = self.state
        same = None if self.standby else state.epoch_timeline == self.timeline
        return [
            (
                state.epoch,
                state.head,
                state.floor,
                self.fingerprint(seq),
                self.standby,
                None if same is None else True,
                same,
                "",
                "",
                None,
                state.erasure,
                self.server,
                self._clock(),
            )
        ]

    def fingerprint(self, seq: int) -> bytes | None:
        state = self.state
        return fingerprints.fingerprint(state.rows[seq - 1].entry) if state.floor <= seq <= state.head else None

    def _erased_seqs(self, _: int, after: int, until: int) -> list[Row]:
        seqs = [row.seq for row in self.state.rows[max(after, self.state.floor - 1) : until] if row.channel == ERASED]
        return [(seqs, self.state.floor)]

    def _fingerprint(self, _: int, seq: int) -> list[Row]:
        return [(self.fingerprint(seq),)]

    def _new_epoch(self, pid: int, expected: str, agreed: int | None) -> list[Row]:
        state = self.state
        made = state.epoch == expected
        if made:
            after = max(0, min(state.head if agreed is None else agreed, state.head))
            epoch = f"e{next(self._names)}"
            self.commit(replace(state, epochs=(*state.epochs, (epoch, after)), epoch_timeline=self.timeline))
            self._notify(pid, LOG_CHANNEL, KEYS.sign(LOG_CHANNEL, f"{epoch}:{state.head + 1}:{state.head}"))
        return [(*self.state.epochs[-1], made)]

    def _epochs(self, _: int, epoch: str) -> list[Row]:
        names = [name for name, _ in self.state.epochs]
        return list(self.state.epochs[: names.index(epoch) + 1]) if epoch in names else []

    # Retention, the outbox and notifications

    def _overdue(self, _: int, *__: int) -> list[Row]:
        return [(0 if self.expired_count else None, 0, bool(self.expired_count), False)]

    def _retain(self, _: int, *__: int) -> list[Row]:
        deleted, self.expired_count = self.apply_retention(self.expired_count), 0
        return [(self.state.floor, deleted, False, False, None)]

    def _notify_all(self, pid: int, channel: str, payloads: Sequence[str]) -> list[Row]:
        for payload in payloads:
            self._notify(pid, channel, payload)
        return [("", "", len(payloads))]


def replace_retained(retained: tuple[StoredRow, ...], new: Sequence[StoredRow]) -> tuple[StoredRow, ...]:
    """The retained messages after these rows."""
    held = {row.channel: row for row in retained}
    for row in new:
        if row.retain:
            held.pop(row.channel, None)
            if row.payload != "null":
                held[row.channel] = row
    return tuple(held.values())


def _decode(args: Sequence[Any]) -> tuple[str, list[tuple[Any, ...]], str | None]:
    """Decode the arguments of an append. Returns its epoch, the columns of each entry, and `enclosed`."""
    _, epoch, channels, payloads, senders, producers, numbers, origins, afters, *rest = args
    retains, expects, enclosed, size, _ = rest
    if len(channels) < size:
        channels, payloads = channels[0].split("\n"), payloads[0].split("\n")
        senders = [None if sender == "\x01" else sender for sender in senders[0].split("\n")]
    numbers = map(int, numbers.split(","))
    columns = (
        channels,
        payloads,
        _spread(producers, size),
        numbers,
        senders,
        origins or [None] * size,
        _spread(afters, size),
        retains or [None] * size,
        expects or [None] * size,
    )
    return epoch, list(zip(*columns, strict=True)), enclosed


def _spread(column: Sequence[Any], size: int) -> Sequence[Any]:
    return list(column) * size if len(column) == 1 else column


_STATEMENTS: dict[str, Callable[..., list[Row]]] = {
    append_batch.APPEND: SimulatedDatabase._append,
    append_batch.APPEND_AND_MOVE: SimulatedDatabase._append_and_move,
    append_batch.MOVE: SimulatedDatabase._move,
    log_reader._PAGE: SimulatedDatabase._page,
    log_reader._POSITION: SimulatedDatabase._position,
    log_reader._RECORD_DELETED_RANGE: lambda *_: [],
    notification_listener._STANDBY: lambda self, _: [(self.standby,)],
    notification_listener._POLL: SimulatedDatabase._poll,
    notification_listener._ERASED_SEQS: SimulatedDatabase._erased_seqs,
    notification_listener._FINGERPRINT: SimulatedDatabase._fingerprint,
    notification_listener._NEW_EPOCH: SimulatedDatabase._new_epoch,
    notification_listener._EPOCHS: SimulatedDatabase._epochs,
    notification_listener._READ_SECRET: lambda *_: [(SECRET,)],
    stored_revocations._OLDEST: lambda *_: [(0,)],
    stored_revocations._READ_PAGE: lambda *_: [],
    stored_revocations._READ_CHANGED: lambda *_: [(0, 0, None, None)],
    stored_revocations._READ_DISCONNECTS: lambda *_: [(0, None, None)],
    ephemeral_relay._NOTIFY: SimulatedDatabase._notify_all,
    outbox_relay._PENDING: lambda self, _: [(bool(self.state.outbox),)],
    outbox_relay._ROTATE: lambda *_: [],
    log_retention._DUE: SimulatedDatabase._overdue,
    log_retention._STEP: SimulatedDatabase._retain,
    log_retention._BLOCKERS: lambda *_: [],
    vacuum._DUE: lambda *_: [],
    retained_budget._MEASURE: lambda *_: [(0, 0)],
    consumer_lags._MEASURE: lambda *_: [],
    batch_leases._WORK: lambda *_: [(0, [], [], [])],
    heartbeat._HEARTBEAT: lambda _, __, own, report: [(own, 0.0, report, 0.0, 0)],
}
