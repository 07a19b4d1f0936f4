"""A consumer on a real server, compared with a model: any interleaving of receiving, rejecting, rollbacks, savepoints,
retention, deletions, erasures and new epochs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.postgres.consumers import YEAR

PARTITIONS = 3
CHANNELS = [f"a.{n}" for n in range(6)] + ["b", "b.x"]
HOMES = "SELECT c, (hashtext(c) & 2147483647) %% %s FROM unnest(%s::text[]) AS c"
CURSORS = "SELECT part, cursor FROM catbus.consumer_cursors WHERE consumer = 'c' ORDER BY part"
REMAINING = "SELECT seq FROM catbus.entries WHERE channel <> '_erased'"
FORGET = """
SELECT setval('catbus.reached_seq', greatest(p.head, s.last_value))
FROM catbus.position() AS p CROSS JOIN catbus.reached_seq AS s;
TRUNCATE catbus.entries;
UPDATE catbus.head SET floor = 1;
"""

workers = st.integers(0, 2)


@dataclass
class Worker:
    """A connection, and what its transaction has done. `points` are copies at the savepoints."""

    sql: psycopg.Connection
    open: bool = False
    received: list[int] = field(default_factory=list)
    rejected: set[int] = field(default_factory=set)
    points: list[tuple[list[int], set[int]]] = field(default_factory=list)


class ConsumerMachine(RuleBasedStateMachine):
    """Each message of the consumer is processed once, or rejected, erased, or reported as missing; and in order.

    All examples use one database. Each begins with a new consumer at the head.
    """

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.sql = psycopg.connect(self.url, autocommit=True)
        # Nothing here waits for another worker. A mistake that makes one wait would end in a deadlock of this thread.
        self.workers = [
            Worker(psycopg.connect(self.url, autocommit=True, options="-c lock_timeout=2s")) for _ in range(3)
        ]
        self.homes = dict(self.sql.execute(HOMES, (PARTITIONS, CHANNELS)).fetchall())
        self.sql.execute("DELETE FROM catbus.consumers")
        self.sql.execute("SELECT catbus.create_consumer('c', 'a.*', partitions => %s)", (PARTITIONS,))
        self.published: dict[int, int] = {}
        """The partition of each message of the consumer."""
        self.processed: list[int] = []
        self.gone: set[int] = set()
        """Rejected, erased or reported as missing."""

    def teardown(self) -> None:
        for connection in (self.sql, *(worker.sql for worker in self.workers)):
            connection.close()

    def scalar(self, query: str, *arguments: object) -> Any:
        row = self.sql.execute(query, arguments).fetchone()
        assert row is not None
        return row[0]

    @property
    def idle(self) -> bool:
        return not any(worker.open for worker in self.workers)

    def waiting(self, part: int, after: int) -> list[int]:
        """The messages of a partition after a seq that nothing has happened to."""
        return [seq for seq, home in self.published.items() if home == part and seq > after and seq not in self.gone]

    # What others do

    @initialize(channels=st.lists(st.sampled_from(CHANNELS), min_size=6, max_size=12))
    def begin(self, channels: list[str]) -> None:
        self.publish(channels)

    @rule(channels=st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=6))
    def publish(self, channels: list[str]) -> None:
        for channel in channels:
            self.sql.execute("SELECT catbus.publish(%s, '1')", (channel,))
        last = self.scalar("SELECT last FROM catbus.move_outbox('local', (SELECT epoch FROM catbus.head), NULL)")
        for seq, channel in enumerate(channels, last - len(channels) + 1):
            assert seq not in self.published, "a seq is used again"
            if channel.startswith("a."):
                self.published[seq] = self.homes[channel]

    @rule(
        kind=st.sampled_from(["retain", "begin_epoch", "let_time_pass", "skip_gap", "delete", "erase", "restore"]),
        data=st.data(),
    )
    def disturb(self, kind: str, data: st.DataObject) -> None:
        """One rule for all of these, so that most steps are those of workers."""
        match kind:
            case "retain" | "begin_epoch":
                getattr(self, kind)()
            case "delete" if self.published:
                self.delete(data.draw(st.sampled_from(sorted(self.published))))
            case "let_time_pass" | "skip_gap" | "restore" if self.idle:
                getattr(self, kind)()
            case "erase" if self.idle:
                self.erase(data.draw(st.sampled_from(CHANNELS)))

    def retain(self) -> None:
        """A step of retention: beside open transactions, too."""
        now = self.scalar("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint")
        assert self.scalar("SELECT blocked FROM catbus.retain(1000, %s, %s)", 1 << 50, now + YEAR) is None

    def begin_epoch(self) -> None:
        self.sql.execute("SELECT catbus.new_epoch((SELECT epoch FROM catbus.head))")

    def restore(self) -> None:
        """A restore that left out the rows of the log."""
        self.sql.execute(FORGET)
        self.begin_epoch()

    def delete(self, seq: int) -> None:
        """Delete a message by hand, but not the newest one: its seq would be given again."""
        newest = "(SELECT head FROM catbus.position())"
        self.sql.execute(f"DELETE FROM catbus.entries WHERE seq = %s AND seq < {newest}", (seq,))

    def erase(self, channel: str) -> None:
        before = {seq for (seq,) in self.sql.execute(REMAINING)}
        self.sql.execute("SELECT catbus.erase(%s)", (channel,))
        self.gone |= before - {seq for (seq,) in self.sql.execute(REMAINING)} - {*self.processed}

    def let_time_pass(self) -> None:
        """From now on cursors move, also if nothing was found."""
        self.sql.execute("UPDATE catbus.consumer_cursors SET moved = moved - interval '10 s'")

    # Workers

    @rule(number=workers, most=st.sampled_from([1, 2, 100]))
    def receive(self, number: int, most: int) -> None:
        worker = self.workers[number]
        if not worker.open:
            worker.sql.execute("BEGIN")
            worker.open = True
        before = dict(worker.sql.execute(CURSORS).fetchall())
        try:
            found = [seq for (seq,) in worker.sql.execute("SELECT seq FROM catbus.receive('c', %s)", (most,))]
        except psycopg.Error as error:
            if error.sqlstate != "CB002":
                raise
            self.end(worker, "ROLLBACK")
            kept = {seq for (seq,) in self.sql.execute("SELECT seq FROM catbus.entries")}
            head = self.scalar("SELECT head FROM catbus.position()")
            assert any(cursor < head and cursor + 1 not in kept for cursor in before.values()), "nothing is missing"
            return
        if found:
            (part,) = {self.published[seq] for seq in found}
            waiting = [seq for seq in self.waiting(part, before[part]) if seq not in worker.rejected]
            assert found == waiting[: len(found)]
        worker.received += found

    @rule(number=workers, most=st.sampled_from([1, 2, 100]))
    def process(self, number: int, most: int) -> None:
        """Receive and commit."""
        self.receive(number, most)
        if self.workers[number].open:
            self.end(self.workers[number], "COMMIT")
        elif self.idle:
            self.skip_gap()

    @rule(number=workers)
    def savepoint(self, number: int) -> None:
        worker = self.workers[number]
        if worker.open:
            worker.points.append(([*worker.received], {*worker.rejected}))
            worker.sql.execute(f"SAVEPOINT s{len(worker.points)}")

    @rule(number=workers)
    def rollback_to_savepoint(self, number: int) -> None:
        worker = self.workers[number]
        if worker.points:
            worker.sql.execute(f"ROLLBACK TO s{len(worker.points)}")
            worker.received, worker.rejected = worker.points.pop()

    @rule(number=workers, data=st.data())
    def reject(self, number: int, data: st.DataObject) -> None:
        """A message that the transaction has received, or one that is waiting."""
        worker = self.workers[number]
        held = {self.published[seq] for other in self.workers for seq in (*other.received, *other.rejected)}
        waiting = [seq for seq, home in self.published.items() if home not in held and seq not in self.processed]
        choices = sorted({*worker.received, *waiting} - self.gone)
        if worker.open and choices:
            seq = data.draw(st.sampled_from(choices))
            worker.sql.execute("SAVEPOINT r")
            try:
                worker.sql.execute("SELECT catbus.reject('c', %s)", (seq,))
            except psycopg.Error as error:
                # It is not in the log any more, or a gap behind which the consumer has gone on, or in use.
                if error.sqlstate not in ("CB003", "55P03") or (seq in worker.received and self.exists(seq)):
                    raise
                worker.sql.execute("ROLLBACK TO r")
            else:
                worker.rejected.add(seq)
            worker.sql.execute("RELEASE r")

    def exists(self, seq: int) -> bool:
        return bool(self.scalar("SELECT EXISTS (SELECT FROM catbus.entries WHERE seq = %s)", seq))

    @rule(number=workers, end=st.sampled_from(["COMMIT", "COMMIT", "ROLLBACK"]))
    def finish(self, number: int, end: str) -> None:
        worker = self.workers[number]
        if worker.open:
            self.end(worker, end)

    def end(self, worker: Worker, end: str) -> None:
        worker.sql.execute(end)
        if end == "COMMIT":
            self.processed += [seq for seq in worker.received if seq not in worker.rejected]
            self.gone |= worker.rejected
        worker.open, worker.received, worker.rejected, worker.points = False, [], set(), []

    def skip_gap(self) -> None:
        before = dict(self.sql.execute(CURSORS).fetchall())
        kept = {seq for (seq,) in self.sql.execute("SELECT seq FROM catbus.entries")}
        for part, first, last in self.sql.execute("SELECT * FROM catbus.skip_gap('c')").fetchall():
            assert first == before[part] + 1
            missing = {seq for seq in self.waiting(part, before[part]) if seq <= last}
            assert not missing & kept
            self.gone |= missing

    # What must hold

    @invariant()
    def each_message_is_processed_once_and_the_cursor_passes_over_no_other(self) -> None:
        assert len({*self.processed}) == len(self.processed), "a message was processed twice"
        for part, cursor in self.sql.execute(CURSORS).fetchall():
            settled = {seq for seq in self.processed if self.published[seq] == part}
            passed = {seq for seq, home in self.published.items() if home == part and seq <= cursor}
            assert settled <= passed, "what was processed comes again"
            assert passed <= settled | self.gone, "a message was passed over"


def run_machine(url: str, examples: int, **options: Any) -> None:
    machine = type("Machine", (ConsumerMachine,), {"url": url})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=40, **options))


def test_consumer_agrees_with_a_model(database_url: str) -> None:
    run_machine(database_url, 40)


MISTAKES = {
    "the rows and the cursor disagree": ("cursor = upto,", "cursor = upto + 1,"),
    "the lock is not taken": ("FOR UPDATE SKIP LOCKED", ""),
    "a deleted range is passed over": ("IF seen < upto - held.cursor OR", "IF"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_model_finds_a_mistake(database_url: str, mistake: str) -> None:
    old, new = MISTAKES[mistake]
    with psycopg.connect(database_url, autocommit=True) as sql:
        row = sql.execute("SELECT pg_get_functiondef('catbus.receive'::regproc)").fetchone()
        assert row is not None
        assert old in row[0]
        sql.execute(row[0].replace(old, new))
    with pytest.raises((AssertionError, psycopg.Error)):
        run_machine(database_url, 60, phases=[Phase.generate], derandomize=True, report_multiple_bugs=False)
