"""`catbus.append` and `catbus.position` on a real server, compared with a list and in concurrent calls."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import asyncpg  # type: ignore[import-untyped]
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from catbus.postgres.notifications.encryption import LOG_CHANNEL, NotificationKeys

T = TypeVar("T")
Connection = Any


class Sent(NamedTuple):
    """An entry as a replica sends it."""

    producer: bytes
    number: int
    channel: str = "a.b"
    payload: str = "1"
    sender: str | None = None
    origin: bytes | None = None
    after: int | None = None

    @property
    def key(self) -> tuple[bytes, int]:
        return self.producer, self.number


class Answer(NamedTuple):
    at: int
    first: int
    seqs: list[int]
    present: list[int | None] | None = None


async def append(
    connection: Connection, epoch: str, batch: Sequence[Sent], commit: str = "on", enclosed: str | None = None
) -> Answer:
    columns = [
        [getattr(entry, name) for entry in batch]
        for name in ("channel", "payload", "producer", "number", "sender", "origin", "after")
    ]
    row = await connection.fetchrow(
        "SELECT * FROM catbus.append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)", commit, epoch, *columns, enclosed
    )
    return Answer(*row)


async def position(connection: Connection) -> tuple[str, int, int]:
    """Return the epoch, the head and the floor."""
    epoch, head, floor = await connection.fetchrow("SELECT epoch, head, floor FROM catbus.position()")
    return epoch, head, floor


async def seqs(connection: Connection) -> list[int]:
    return [seq for (seq,) in await connection.fetch("SELECT seq FROM catbus.entries ORDER BY seq")]


@asynccontextmanager
async def connected(url: str, number: int = 1) -> AsyncIterator[list[Connection]]:
    connections = [await asyncpg.connect(url) for _ in range(number)]
    try:
        yield connections
    finally:
        for connection in connections:
            connection.terminate()


async def wait_blocked(observer: Connection, blocked: Connection, call: asyncio.Task[Any] | None = None) -> None:
    """Wait until a connection waits for a lock, or until its call has ended."""
    query = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1"
    async with asyncio.timeout(10):
        while not await observer.fetchval(query, blocked.get_server_pid()):
            if call is not None and call.done():
                break
            await asyncio.sleep(0.005)


# Comparison with a list

channels = st.sampled_from(["a", "a.b", "a.b.c", "a.b-c", "a_b", "Z"])
texts = st.text(max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
payloads = st.one_of(
    values.map(json.dumps),
    values.map(lambda value: json.dumps(value, ensure_ascii=False)),
    st.integers(0, 1000).map(lambda length: json.dumps("é" * length, ensure_ascii=False)),
)
senders = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
origins = st.none() | st.binary(min_size=1, max_size=16)


class Row(NamedTuple):
    seq: int
    producer: bytes
    number: int
    channel: str
    payload: str
    sender: str | None
    origin: bytes | None

    @property
    def key(self) -> tuple[bytes, int]:
        return self.producer, self.number


class AppendMachine(RuleBasedStateMachine):
    """A comparison with the list `log`: all appended entries, of which those below `floor` are removed.

    All examples use one database. Each begins above the head of the previous one, with its own producers.
    """

    url = ""
    examples = 0

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.connection = self.run(asyncpg.connect(self.url))
        self.epoch, self.base, _ = self.run(position(self.connection))
        self.floor = self.base + 1
        self.run(self.connection.execute(f"DELETE FROM catbus.entries; UPDATE catbus.head SET floor = {self.floor}"))
        self.seal = NotificationKeys(self.run(self.connection.fetchval("SELECT notification_secret FROM catbus.head")))
        self.heard: list[str] = []
        self.run(self.connection.add_listener("catbus", lambda *arguments: self.heard.append(arguments[-1])))
        self.log: list[Row] = []
        self.at = 0
        AppendMachine.examples += 1
        self.numbers = {b"%d-%d" % (AppendMachine.examples, index): 0 for index in range(3)}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.connection.terminate()
        self.runner.close()

    sent = Bundle("sent")

    @property
    def head(self) -> int:
        return self.log[-1].seq if self.log else self.base

    def make(self, data: st.DataObject, least: int) -> list[Sent]:
        """Make new entries. Their numbers increase within a producer."""
        entries = []
        for _ in range(data.draw(st.integers(least, 4))):
            producer = list(self.numbers)[data.draw(st.integers(0, 2))]
            self.numbers[producer] += data.draw(st.integers(1, 3))
            entries.append(
                Sent(
                    producer,
                    self.numbers[producer],
                    data.draw(channels),
                    data.draw(payloads),
                    data.draw(senders),
                    data.draw(origins),
                    self.head,
                )
            )
        return entries

    def check(self, batch: Sequence[Sent]) -> None:
        """Append, and compare the result with the list."""
        known = {row.key: row for row in self.log if row.seq >= self.floor}
        first = self.head + 1
        new: list[Row] = []
        expected = []
        for entry in batch:
            if row := known.get(entry.key):
                same = (row.channel, row.payload) == (entry.channel, entry.payload)
                expected.append(row.seq if same else 0)
            elif entry.after is not None and entry.after < self.floor - 1:
                expected.append(-1)
            else:
                expected.append(first + len(new))
                new.append(Row(first + len(new), *entry[:6]))

        answer = self.run(append(self.connection, self.epoch, batch, enclosed="encrypted"))
        assert (answer.first, answer.seqs) == (first, expected)
        assert answer.at >= self.at
        self.at = answer.at
        self.log += new

        self.run(asyncio.sleep(0))
        span = f"{self.epoch}:{first}:{self.head}"
        enclosed = f"{answer.at} encrypted" if len(new) == len(batch) else ""
        assert self.heard == ([self.seal.sign(LOG_CHANNEL, span, enclosed)] if new else [])
        self.heard.clear()

    @rule(target=sent, data=st.data())
    def publish(self, data: st.DataObject) -> Any:
        batch = self.make(data, least=1)
        # The first attempt is no retry, so it has no `after`.
        self.check([entry._replace(after=None) for entry in batch])
        return multiple(*batch)

    @rule(old=st.lists(sent, min_size=1, max_size=5, unique_by=lambda entry: entry.key), late=st.booleans())
    def repeat(self, old: list[Sent], late: bool) -> None:
        """The reply was lost, or bytes arrive after their sender has died and was replaced."""
        self.check([entry._replace(after=None) if late else entry for entry in old])

    @rule(
        target=sent,
        data=st.data(),
        old=st.lists(sent, min_size=1, max_size=3, unique_by=lambda entry: entry.key),
    )
    def repeat_among_new(self, data: st.DataObject, old: list[Sent]) -> Any:
        new = self.make(data, least=1)
        self.check(data.draw(st.permutations([*old, *(entry._replace(after=None) for entry in new)])))
        return multiple(*new)

    @rule(old=sent, channel=channels, payload=payloads)
    def reuse_a_key(self, old: Sent, channel: str, payload: str) -> None:
        self.check([old._replace(channel=channel, payload=payload)])

    @rule(target=sent, data=st.data())
    def lose_before_it_arrives(self, data: st.DataObject) -> Any:
        """Entries that never reached the database are sent later, as a retry."""
        return multiple(*self.make(data, least=1))

    @rule(data=st.data())
    def use_another_epoch(self, data: st.DataObject) -> None:
        with pytest.raises(asyncpg.PostgresError) as refused:
            self.run(append(self.connection, "another", self.make(data, least=0)))
        assert refused.value.sqlstate == "CB001"

    @rule()
    def close_the_slot(self) -> None:
        self.run(self.connection.execute("UPDATE catbus.head SET slot = (slot + 1) % 8"))

    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        self.floor += data.draw(st.integers(0, self.head + 1 - self.floor))
        self.run(self.connection.execute(f"DELETE FROM catbus.entries WHERE seq < {self.floor}"))
        self.run(self.connection.execute(f"UPDATE catbus.head SET floor = {self.floor}"))

    @invariant()
    def the_table_is_the_list(self) -> None:
        rows = self.run(
            self.connection.fetch(
                "SELECT seq, producer, number, channel, payload, sender, origin, at FROM catbus.entries"
                " WHERE seq > $1 ORDER BY seq",
                self.base,
            )
        )
        assert [tuple(row)[:7] for row in rows] == [row for row in self.log if row.seq >= self.floor]
        times = [row["at"] for row in rows]
        assert times == sorted(times)

    @invariant()
    def the_position_is_that_of_the_list(self) -> None:
        assert self.run(position(self.connection)) == (self.epoch, self.head, self.floor)


def test_append_agrees_with_a_list(database_url: str) -> None:
    class Machine(AppendMachine):
        url = database_url

    run_state_machine_as_test(Machine, settings=settings(max_examples=20, stateful_step_count=20))


# Interleavings


def play(url: str, scene: Callable[..., Coroutine[Any, Any, None]], connections: int = 1) -> None:
    """Run a scene, which gets the epoch and a number of connections."""

    async def go() -> None:
        async with connected(url, connections) as actors:
            epoch, _, _ = await position(actors[0])
            await scene(epoch, *actors)

    asyncio.run(go())


def test_concurrent_appends_get_one_gapless_order(database_url: str) -> None:
    async def scene(epoch: str, *writers: Connection) -> None:
        async def write(writer: Connection, producer: bytes) -> list[Answer]:
            batches = [[Sent(producer, 10 * n + i) for i in range(1 + n % 5)] for n in range(60)]
            return [await append(writer, epoch, batch) for batch in batches]

        each = await asyncio.gather(*(write(writer, b"%d" % index) for index, writer in enumerate(writers)))
        for answers in each:
            own = list(chain.from_iterable(answer.seqs for answer in answers))
            assert own == sorted(own)
        together = sorted((answer.first, answer.at, answer.seqs) for answer in chain.from_iterable(each))
        assert list(chain.from_iterable(given for _, _, given in together)) == list(range(1, 361))
        assert [at for _, at, _ in together] == sorted(at for _, at, _ in together)
        assert await seqs(writers[0]) == list(range(1, 361))

    play(database_url, scene, connections=2)


def test_retry_that_waited_for_the_lock_sees_its_original(database_url: str) -> None:
    async def scene(epoch: str, stopped: Connection, retrying: Connection, observer: Connection) -> None:
        batch = [Sent(b"p", 1), Sent(b"p", 2, "c")]
        await stopped.execute("BEGIN")
        original = await append(stopped, epoch, batch)
        retry = asyncio.create_task(append(retrying, epoch, batch))
        # Its statement and its first snapshot begin before the original is committed.
        await wait_blocked(observer, retrying)
        await stopped.execute("COMMIT")
        assert (await retry).seqs == original.seqs == [1, 2] == await seqs(observer)

    play(database_url, scene, connections=3)


def test_retry_appends_a_message_whose_original_was_rolled_back(database_url: str) -> None:
    async def scene(epoch: str, dying: Connection, retrying: Connection, observer: Connection) -> None:
        await dying.execute("BEGIN")
        await append(dying, epoch, [Sent(b"p", 1)])
        retry = asyncio.create_task(append(retrying, epoch, [Sent(b"p", 1)]))
        await wait_blocked(observer, retrying)
        dying.terminate()
        answer = await retry
        assert (answer.first, answer.seqs) == (1, [1])
        assert await seqs(observer) == [1]

    play(database_url, scene, connections=3)


@pytest.mark.parametrize("late", [False, True], ids=["before its retry", "after its retry"])
def test_late_append_of_a_dead_sender_is_appended_once(database_url: str, late: bool) -> None:
    gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)"

    async def scene(epoch: str, dead: Connection, retrying: Connection, holder: Connection) -> None:
        batch = [Sent(b"p", 1), Sent(b"p", 2, "c")]
        await holder.execute("BEGIN")
        await holder.execute("SELECT FROM catbus.head FOR UPDATE")
        calls = {}
        for connection in (retrying, dead) if late else (dead, retrying):
            calls[connection] = asyncio.create_task(append(connection, epoch, batch))
            await wait_blocked(holder, connection)
        pid = dead.get_server_pid()
        dead.terminate()
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            await calls[dead]
        await holder.execute("COMMIT")
        answer = await calls[retrying]
        async with asyncio.timeout(10):
            while not await holder.fetchval(gone, pid):
                await asyncio.sleep(0.005)
        assert (answer.first, answer.seqs) == (1 if late else 3, [1, 2])
        assert await seqs(holder) == [1, 2]

    play(database_url, scene, connections=3)


def test_append_detects_an_epoch_that_changed_while_it_waited(database_url: str) -> None:
    async def scene(epoch: str, changing: Connection, writer: Connection, observer: Connection) -> None:
        await changing.execute("BEGIN")
        await changing.execute(
            "INSERT INTO catbus.epochs (epoch, after_seq, system_identifier, timeline) "
            "SELECT 'next', 0, system_identifier, timeline FROM catbus.epochs"
        )
        await changing.execute("UPDATE catbus.head SET epoch = 'next'")
        late = asyncio.create_task(append(writer, epoch, [Sent(b"p", 1)]))
        await wait_blocked(observer, writer)
        await changing.execute("COMMIT")
        with pytest.raises(asyncpg.PostgresError, match="the epoch of the log is next") as refused:
            await late
        assert refused.value.sqlstate == "CB001"
        assert await position(observer) == ("next", 0, 1)

    play(database_url, scene, connections=3)


def test_append_without_the_lock_after_two_seconds_appends_nothing(database_url: str) -> None:
    async def scene(epoch: str, holder: Connection, writer: Connection) -> None:
        await holder.execute("BEGIN")
        await holder.execute("SELECT FROM catbus.head FOR UPDATE")
        began = time.monotonic()
        with pytest.raises(asyncpg.PostgresError) as refused:
            await append(writer, epoch, [Sent(b"p", 1)])
        assert refused.value.sqlstate == "55P03"
        assert 1.9 < time.monotonic() - began < 5
        await holder.execute("ROLLBACK")
        assert await seqs(writer) == []
        assert (await append(writer, epoch, [Sent(b"p", 1)])).seqs == [1]

    play(database_url, scene, connections=2)


def test_open_transaction_keeps_no_row_versions(database_url: str) -> None:
    look = "SELECT ctid::text, pg_relation_size('catbus.head') FROM catbus.head"

    async def scene(epoch: str, forgetful: Connection, writer: Connection) -> None:
        await forgetful.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        before = tuple(await forgetful.fetchrow(look))
        await writer.execute(
            """DO $$ BEGIN FOR i IN 1..2000 LOOP
                PERFORM catbus.append('off', epoch, '{a}', '{1}', '{p}', ARRAY[i::bigint], '{null}', '{null}', '{null}')
                FROM catbus.head AS h;
                COMMIT;
            END LOOP; END $$"""
        )
        assert tuple(await writer.fetchrow(look)) == before == ("(0,1)", 8192)
        assert len(await seqs(writer)) == 2000

    play(database_url, scene, connections=2)


def test_stopped_listener_does_not_stop_publishing(database_url: str) -> None:
    async def scene(epoch: str, stopped: Connection, writer: Connection) -> None:
        heard: list[str] = []
        await writer.add_listener("catbus", lambda *arguments: heard.append(arguments[-1]))
        await stopped.execute("LISTEN something")
        await stopped.execute("BEGIN")
        await stopped.execute("SELECT 1")
        for start in range(0, 700, 70):
            await writer.execute(
                f"SELECT pg_notify('else', repeat('x', 7900) || i) FROM generate_series({start}, {start + 69}) AS i"
            )
            if await writer.fetchval("SELECT pg_notification_queue_usage()") > 0.5:
                break
        else:
            pytest.skip("this server's queue of notifications is too big to be filled")
        assert (await append(writer, epoch, [Sent(b"p", 1)])).seqs == [1]
        await asyncio.sleep(0)
        assert heard == []
        await stopped.execute("ROLLBACK")
        await append(writer, epoch, [Sent(b"p", 2)])
        await asyncio.sleep(0)
        assert len(heard) == 1

    play(database_url, scene, connections=2)


# Rules


@pytest.mark.parametrize(
    "payload",
    [
        '{"text": "\\u0000"}',
        '"\\ud800 \\" \\\\"',
        '"äöü €  \u2028 🚌 \x7f"',
        "1e999999",
        "-" + "9" * 400,
        "0.10000000000000000000000000000000000001",
        '{"a":1,  "a" : 2 , "":[ ]}',
        '"' + "x" * 3000 + '"',
        '"' + "🚌" * 16000 + '"',
    ],
    ids=lambda payload: payload[:12],
)
def test_payload_is_stored_byte_for_byte(database_url: str, payload: str) -> None:
    async def scene(epoch: str, writer: Connection) -> None:
        await append(writer, epoch, [Sent(b"p", 1, payload=payload)])
        assert await writer.fetchval("SELECT convert_to(payload, 'UTF8') FROM catbus.entries") == payload.encode()
        assert (await append(writer, epoch, [Sent(b"p", 1, payload=payload)])).seqs == [1]

    play(database_url, scene)


def test_empty_log_continues_at_its_floor(database_url: str) -> None:
    async def scene(epoch: str, writer: Connection) -> None:
        assert await position(writer) == (epoch, 0, 1)
        await writer.execute("UPDATE catbus.head SET floor = 1000")
        assert await position(writer) == (epoch, 999, 1000)
        answer = await append(writer, epoch, [Sent(b"p", 1), Sent(b"p", 2)])
        assert (answer.first, answer.seqs) == (1000, [1000, 1001])
        assert await position(writer) == (epoch, 1001, 1000)

    play(database_url, scene)


def test_time_stands_still_until_a_clock_that_was_set_back_has_caught_up(database_url: str) -> None:
    async def scene(epoch: str, writer: Connection) -> None:
        before = time.time() * 1000
        now = (await append(writer, epoch, [Sent(b"p", 1)])).at
        assert before - 60_000 < now < before + 60_000
        await writer.execute("UPDATE catbus.entries SET at = at + 3600000")
        assert (await append(writer, epoch, [Sent(b"p", 2)])).at == now + 3_600_000

    play(database_url, scene)


def test_duplicates_wait_for_the_disk_as_their_originals_do(database_url: str) -> None:
    async def scene(epoch: str, writer: Connection) -> None:
        await append(writer, epoch, [Sent(b"p", 1)])
        await writer.execute("BEGIN")
        assert (await append(writer, epoch, [Sent(b"p", 1)], "remote_apply")).seqs == [1]
        # A transaction without an id has written nothing, so its commit waits for nothing.
        number, commit = await writer.fetchrow(
            "SELECT pg_current_xact_id_if_assigned(), current_setting('synchronous_commit')"
        )
        assert number is not None
        assert commit == "remote_apply"
        await writer.execute("ROLLBACK")

    play(database_url, scene)


def test_repeated_key_fails_the_call(database_url: str) -> None:
    async def scene(epoch: str, writer: Connection) -> None:
        with pytest.raises(asyncpg.UniqueViolationError):
            await append(writer, epoch, [Sent(b"p", 1), Sent(b"p", 1, payload="2")])
        assert await seqs(writer) == []

    play(database_url, scene)


def test_append_with_a_snapshot_older_than_the_lock_is_rejected(database_url: str) -> None:
    async def scene(epoch: str, writer: Connection) -> None:
        await writer.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        with pytest.raises(asyncpg.PostgresError, match="read committed"):
            await append(writer, epoch, [Sent(b"p", 1)])

    play(database_url, scene)


def test_entries_that_do_not_fit_into_a_notification_are_not_enclosed(database_url: str) -> None:
    async def scene(epoch: str, writer: Connection) -> None:
        heard: list[str] = []
        await writer.add_listener(LOG_CHANNEL, lambda *arguments: heard.append(arguments[-1]))
        seal = NotificationKeys(await writer.fetchval("SELECT notification_secret FROM catbus.head"))
        for seq, size, fits in ((1, 7800, True), (2, 7900, False), (3, 1_000_000, False)):
            answer = await append(writer, epoch, [Sent(b"p", seq)], enclosed="x" * size)
            await asyncio.sleep(0)
            shown = f"{epoch}:{seq}:{seq}"
            assert heard.pop() == seal.sign(LOG_CHANNEL, shown, f"{answer.at} {'x' * size}" if fits else "")

    play(database_url, scene)


def test_replica_of_an_earlier_release_appends_without_enclosing_entries(database_url: str) -> None:
    async def scene(epoch: str, writer: Connection) -> None:
        heard: list[str] = []
        await writer.add_listener(LOG_CHANNEL, lambda *arguments: heard.append(arguments[-1]))
        seal = NotificationKeys(await writer.fetchval("SELECT notification_secret FROM catbus.head"))
        row = await writer.fetchrow(
            "SELECT * FROM catbus.append('on', $1, '{a}', '{1}', '{p}', '{1}', '{null}', '{null}', '{null}')",
            epoch,
        )
        await asyncio.sleep(0)
        assert row["seqs"] == [1]
        assert heard == [seal.sign(LOG_CHANNEL, f"{epoch}:1:1")]

    play(database_url, scene)


@pytest.mark.parametrize("entries", [0, 30])
def test_plans_made_for_a_small_table_use_its_indexes(database_url: str, entries: int) -> None:
    """A plan that was made while the log is short, analysed or not, stays in use when the log is long."""
    pages = """
        PREPARE page(bigint, bigint, bigint) AS
        SELECT seq, at, channel, payload FROM catbus.entries WHERE seq > $1 AND seq <= $2 ORDER BY seq LIMIT $3"""

    async def scene(epoch: str, writer: Connection) -> None:
        if entries:
            await append(writer, epoch, [Sent(b"p", number) for number in range(entries)])
        await writer.execute("BEGIN")
        await append(writer, epoch, [Sent(b"p", 100), Sent(b"q", 1)])  # all new
        await append(writer, epoch, [Sent(b"p", 100), Sent(b"q", 2)])  # one known
        await position(writer)
        scans = "SELECT sum(seq_scan), sum(idx_scan) FROM pg_stat_xact_user_tables WHERE relname LIKE 'entries%'"
        sequential, by_index = await writer.fetchrow(scans)
        await writer.execute("COMMIT")
        assert sequential == 0
        assert by_index >= 8
        await writer.execute("SET plan_cache_mode = force_generic_plan")
        await writer.execute(pages)
        plan = "\n".join(line for (line,) in await writer.fetch("EXPLAIN EXECUTE page(0, 1000, 1000)"))
        assert "Merge Append" in plan
        assert plan.count("Index Scan using entries_") == 8

    play(database_url, scene)


def test_public_has_no_rights(database_url: str) -> None:
    allowed = """
        SELECT 'schema' WHERE has_schema_privilege('public', 'catbus', 'USAGE, CREATE')
        UNION ALL SELECT oid::regclass::text FROM pg_class
            WHERE relnamespace = 'catbus'::regnamespace AND relkind IN ('r', 'p', 'v', 'S')
            AND has_table_privilege('public', oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
        UNION ALL SELECT oid::regprocedure::text FROM pg_proc
            WHERE pronamespace = 'catbus'::regnamespace AND has_function_privilege('public', oid, 'EXECUTE')"""

    async def scene(epoch: str, observer: Connection) -> None:
        assert await observer.fetch(allowed) == []

    play(database_url, scene)


def test_first_epoch_names_its_server(database_url: str) -> None:
    async def scene(epoch: str, observer: Connection) -> None:
        row = await observer.fetchrow("SELECT epoch, after_seq, system_identifier, timeline FROM catbus.epochs")
        identifier = await observer.fetchval("SELECT system_identifier FROM pg_control_system()")
        timeline = await observer.fetchval("SELECT timeline_id FROM pg_control_checkpoint()")
        assert tuple(row) == (epoch, 0, identifier, timeline)

    play(database_url, scene)
