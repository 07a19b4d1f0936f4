"""`catbus.publish` on a real server: rejected messages, and the move of accepted ones into the log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from catbus.errors import PeerError
from catbus.protocol import wire_messages as wire
from catbus.protocol.channels import check_channel, is_reserved
from tests.postgres.server import _fresh
from tests.postgres.test_sql_append import Connection, Sent, append, connected, play, position, values, wait_blocked

T = TypeVar("T")

PAYLOADS = json.loads((Path(__file__).parents[2] / "protocol" / "vectors" / "payloads.json").read_text())["cases"]

ROOM = 65_494
"""The maximum size of channel and payload together, in bytes."""


class Moved(NamedTuple):
    moved: int
    last: int | None
    more: bool


async def publish(connection: Connection, channel: str, payload: object, kind: str = "text") -> None:
    await connection.execute(f"SELECT catbus.publish($1, $2::{kind})", channel, payload)


async def move(connection: Connection, epoch: str) -> Moved:
    return Moved(*await connection.fetchrow("SELECT moved, last, more FROM catbus.move_outbox('on', $1, NULL)", epoch))


async def move_all(connection: Connection, epoch: str) -> None:
    while await connection.fetchval("SELECT catbus.outbox_pending()"):
        await move(connection, epoch)


async def payloads(connection: Connection) -> list[str]:
    """The payloads in the log."""
    return [text for (text,) in await connection.fetch("SELECT payload FROM catbus.entries ORDER BY seq")]


async def sizes(connection: Connection) -> list[int]:
    """The size of each outbox table in bytes."""
    return [await connection.fetchval(f"SELECT pg_relation_size('catbus.outbox_{n}')") for n in range(2)]


async def refusal(connection: Connection, channel: str | None, payload: object, kind: str = "text") -> str:
    with pytest.raises(asyncpg.PostgresError) as refused:
        await publish(connection, channel, payload, kind)  # type: ignore[arg-type]
    return f"{refused.value.sqlstate} {refused.value}"


# Accepted messages


Stored = Callable[[str, str], str | None]


@pytest.fixture(scope="module")
def stored(postgres_server: str, _template: str) -> Iterator[Stored]:
    """The outbox row of a message, or None if it is rejected. All examples use one database."""
    with contextmanager(_fresh)(postgres_server, _template) as url, asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(url))

        async def ask(channel: str, payload: str) -> str | None:
            await connection.execute("BEGIN")
            try:
                await publish(connection, channel, payload)
                return str(await connection.fetchval("SELECT payload FROM catbus.outbox_0"))
            except asyncpg.DataError:
                return None
            finally:
                await connection.execute("ROLLBACK")

        yield lambda channel, payload: runner.run(ask(channel, payload))
        connection.terminate()


def is_channel(name: str) -> bool:
    try:
        check_channel(name)
    except PeerError:
        return False
    return True


def checked(payload: str) -> str | None:
    try:
        return wire.check_payload(payload.encode()).decode()
    except PeerError:
        return None


segments = st.text("aZ09_-", min_size=1, max_size=3)
names = st.one_of(
    st.lists(segments, min_size=1, max_size=34).map(".".join),
    st.text("aZ0_-.* /é\n\x01", max_size=6),
    st.builds(lambda name, odd: name + odd, segments, st.sampled_from(["\n", ".", "..a", ".*", " ", "é", "\x7f"])),
    st.integers(250, 260).map("x".__mul__),
    st.integers(83, 87).map(lambda length: "abc" + "." * (length > 85) + "é" * length),
)


@given(name=names)
@example(name=".".join(["a"] * 32))
@example(name=".".join(["a"] * 33))
@example(name="a" * 255)
@example(name="a" * 256)
@example(name="a\n")
@example(name="_")
@example(name="_catbus.sessions.alice")
@example(name="a._b")
def test_sql_and_clients_accept_the_same_channels(stored: Stored, name: str) -> None:
    assert (stored(name, "1") is not None) == (is_channel(name) and not is_reserved(name))


marks = st.sampled_from(
    [
        *'[]{},:"\\ \n\r\t\x01\x7f\u2028\u0085é🚌09-+.eEnu/',
        *("true", "false", "null", "NaN", "Infinity", '"a"', "01", "1.", ".5", "1e", "-", "1e999", "//", "''"),
        *("\\u0000", "\\ud800", "\\uDC00", "\\uDbfF\\udFfF", "\\u00e9", "\\u12", "\\\\"),
    ]
)
texts = st.one_of(
    values.map(json.dumps),
    values.map(lambda value: json.dumps(value, ensure_ascii=False, indent=1)),
    st.lists(marks, max_size=8).map("".join),
    st.lists(marks, max_size=5).map(lambda parts: '"' + "".join(parts) + '"'),
    st.tuples(values.map(json.dumps), marks, st.integers(0, 20)).map(lambda t: t[0][: t[2]] + t[1] + t[0][t[2] :]),
)


def deep(levels: int, inner: str = "") -> str:
    return (
        "".join("[" if level % 2 else '{"":' for level in range(levels))
        + (inner or "1")
        + "".join("]" if level % 2 else "}" for level in reversed(range(levels)))
    )


@settings(max_examples=400)
@given(text=texts)
@example(text='{"text": "\\u0000"}')
@example(text='"\\ud800"')
@example(text='"\\udc00"')
@example(text='"\\ud800\\ud800\\udc00"')
@example(text='"\\ud83d\\ude8c"')
@example(text='"\\\\ud83d\\ude8c"')
@example(text='"\\\\ud800"')
@example(text="1e999999")
@example(text="[1,\r\n2]")
@example(text='"a\nb"')
@example(text='"a\\\nb"')
@example(text="\ufeff1")
@example(text="")
@example(text=" ")
@example(text=deep(64))
@example(text=deep(65))
@example(text=deep(64, '"[[[{{{"'))
@example(text=deep(63, '"\\"[[[{{{\\\\"'))
@example(text="[" + ",".join(["[]"] * 100) + "]")
@example(text="[" + ",".join(["[[]]"] * 100) + "]")
@example(text="[" * 100)
@example(text="]" * 100 + "[" * 100)
def test_sql_and_clients_accept_the_same_payloads(stored: Stored, text: str) -> None:
    assert stored("a", text) == checked(text)


@pytest.mark.parametrize("case", PAYLOADS, ids=[case["name"] for case in PAYLOADS])
def test_sql_accepts_the_payloads_of_the_vectors(stored: Stored, case: dict[str, Any]) -> None:
    assert stored("a", case["json"]) == (case["json"] if case["valid"] else None)


@given(length=st.integers(-3, 3), channel=st.sampled_from(["a", "a.b.c", "x" * 255]), letter=st.sampled_from("aé🚌"))
def test_message_size_limit_is_the_default_of_clients(stored: Stored, length: int, channel: str, letter: str) -> None:
    fill, rest = divmod(ROOM + length - len(channel) - 2, len(letter.encode()))
    payload = '"' + letter * fill + "x" * rest + '"'
    line = wire.encode(wire.Publish(channel, msgspec.Raw(payload.encode()))).removesuffix(b"\n")
    assert (stored(channel, payload) == payload) == (len(line) <= 65_536) == (length <= 0)


def test_error_says_what_was_expected(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        for channel in ("a..b", "a.*", "", "a" * 300):
            assert "1 to 32 segments of A-Z, a-z, 0-9, _ and -" in await refusal(sql, channel, "1")
        assert "neither is NULL" in await refusal(sql, None, "1")
        assert "neither is NULL" in await refusal(sql, "a", None)
        assert "JSON text null" in await refusal(sql, "a", None, "jsonb")
        assert "22P02 invalid input syntax for type json" in await refusal(sql, "a", "{'a': 1}")
        assert "22P02" in await refusal(sql, "a", '"a\nb"')
        assert "at most 65494 bytes" in await refusal(sql, "a", "1" * 70_000)
        assert "at most 64 levels deep" in await refusal(sql, "a", deep(65))
        assert "at most 64 levels deep" in await refusal(sql, "a", "[" * 60_000)
        assert "42804" in await refusal(sql, "a", 1, "integer")
        assert "to_json() makes JSON of any value" in await refusal(sql, "a", [1], "integer[]")
        assert not await sql.fetchval("SELECT catbus.outbox_pending()")

    play(database_url, scene)


def test_direct_writes_to_the_tables_are_checked(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        for table in ("outbox_0", "outbox_1"):
            for channel, payload in (("a.*", "1"), ("a", "}"), ("a", "1" * 70_000)):
                with pytest.raises(asyncpg.DataError):
                    await sql.execute(
                        f"INSERT INTO catbus.{table} (channel, payload) VALUES ($1, $2)", channel, payload
                    )

    play(database_url, scene)


@pytest.mark.parametrize(
    ("arguments", "payload"),
    [
        ("""'a.b', '{"status":  "paid"}'""", '{"status":  "paid"}'),
        ("""'a.b', '1'::varchar(10)""", "1"),
        ("""'a.b', '{"a":  1.50}'::json""", '{"a":  1.50}'),
        ("""'a.b', '{"a":  1.50}'::jsonb""", '{"a": 1.50}'),
        ("""'a.b', to_json(t)""", '{"n":1,"text":"ä\\n"}'),
        ("""'a.b', to_jsonb(t)""", '{"n": 1, "text": "ä\\n"}'),
        ("""'a.b', json_build_object('n', t.n)""", '{"n" : 1}'),
        ("""'a.b', (SELECT json_agg(u) FROM (VALUES (1), (2)) AS u (n))""", '[{"n":1},   {"n":2}]'),
        ("""channel => 'a.b', payload => E'[1,\\r\\n2]'""", "[1,  2]"),
        ("""('a.' || 'b')::varchar, 'null'""", "null"),
        ("""'a.b' COLLATE "POSIX", '{"n": 1}'""", '{"n": 1}'),
    ],
)
def test_publish_stores_the_message(database_url: str, arguments: str, payload: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        await sql.execute(f"SELECT catbus.publish({arguments}) FROM (VALUES (1, E'ä\\n')) AS t (n, text)")
        await move_all(sql, epoch)
        rows = await sql.fetch("SELECT seq, channel, payload, sender, origin FROM catbus.entries")
        assert [tuple(row) for row in rows] == [(1, "a.b", payload, None, None)]

    play(database_url, scene)


# Permissions


@asynccontextmanager
async def as_role(url: str, name: str, *statements: str) -> AsyncIterator[Connection]:
    """A connection of a role with the rights that the statements grant. The role is dropped afterwards."""
    async with connected(url) as (owner,):
        await owner.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'sesame'")
        try:
            for statement in statements:
                await owner.execute(statement)
            place = urlsplit(url).netloc.rpartition("@")[2]
            async with connected(urlsplit(url)._replace(netloc=f"{name}:sesame@{place}").geturl()) as (connection,):
                yield connection
        finally:
            await owner.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def test_right_to_call_publish_suffices_and_allows_nothing_else(database_url: str) -> None:
    grants = (
        "GRANT USAGE ON SCHEMA catbus TO catbus_test_app",
        "GRANT EXECUTE ON FUNCTION catbus.publish TO catbus_test_app",
    )
    reading = (
        "GRANT USAGE ON SCHEMA catbus TO catbus_test_reader",
        "GRANT EXECUTE ON FUNCTION catbus.retained TO catbus_test_reader",
    )
    forbidden = [
        *(
            f"SELECT * FROM catbus.{table}"
            for table in ("entries", "head", "outbox_0", "outbox_1", "outbox_id", "retained", "roles")
        ),
        "INSERT INTO catbus.outbox_0 (channel, payload) VALUES ('a', '1')",
        "DELETE FROM catbus.outbox_0",
        "SELECT nextval('catbus.outbox_id')",
        "SELECT setval('catbus.outbox_active', 1)",
        "SELECT catbus.outbox_pending()",
        "SELECT catbus.rotate_outbox()",
        "SELECT catbus.check_message('a', '1')",
        "SELECT catbus.move_outbox('on', '', NULL)",
        "SELECT catbus.position()",
        "SELECT catbus.retained('a')",
    ]

    async def scene(epoch: str, owner: Connection) -> None:
        async with as_role(database_url, "catbus_test_app", *grants) as app:
            await app.execute("""SELECT catbus.publish('a', '{"n": 1}'), catbus.publish('b', to_json(2))""")
            await app.execute("SELECT catbus.publish('c', '3', retain => true)")
            for statement in forbidden:
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await app.execute(statement)
        await move_all(owner, epoch)
        assert await payloads(owner) == ['{"n": 1}', "2", "3"]
        async with as_role(database_url, "catbus_test_reader", *reading) as reader:
            rows = await reader.fetch("SELECT channel, seq, payload FROM catbus.retained('*')")
            assert [tuple(row) for row in rows] == [("c", 3, "3")]
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await reader.fetch("SELECT * FROM catbus.retained")

    play(database_url, scene)


def test_role_without_the_right_cannot_publish(database_url: str) -> None:
    async def scene(epoch: str, owner: Connection) -> None:
        usage = "GRANT USAGE ON SCHEMA catbus TO catbus_test_other"
        async with as_role(database_url, "catbus_test_other", usage) as other:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await publish(other, "a", "1")

    play(database_url, scene)


def test_functions_of_the_caller_do_not_run_with_the_rights_of_the_owner(database_url: str) -> None:
    """This holds for functions that its search path finds first, and for its own casts."""
    grants = (
        "GRANT USAGE ON SCHEMA catbus TO catbus_test_mean",
        "GRANT EXECUTE ON FUNCTION catbus.publish TO catbus_test_mean",
        "CREATE SCHEMA mean AUTHORIZATION catbus_test_mean",
    )
    trap = """LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'run as %', current_user; END $$"""

    async def scene(epoch: str, owner: Connection) -> None:
        async with as_role(database_url, "catbus_test_mean", *grants) as mean:
            await mean.execute(f"""
                CREATE TYPE mean.trap AS ENUM ('x');
                CREATE FUNCTION mean.to_json(mean.trap) RETURNS json {trap};
                CREATE FUNCTION mean.to_text(mean.trap) RETURNS text {trap};
                CREATE CAST (mean.trap AS json) WITH FUNCTION mean.to_json;
                CREATE CAST (mean.trap AS text) WITH FUNCTION mean.to_text;
                CREATE FUNCTION mean.octet_length(text) RETURNS integer {trap};
                CREATE FUNCTION mean.nextval(regclass) RETURNS bigint {trap};
                SET search_path = mean, pg_catalog""")
            await publish(mean, "a", "1")
            with pytest.raises(asyncpg.DatatypeMismatchError):
                await publish(mean, "a", "x", "mean.trap")

    play(database_url, scene)


# Moves


def test_one_notification_covers_a_move(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        heard: list[str] = []
        await sql.add_listener("catbus", lambda *arguments: heard.append(arguments[-1]))
        await sql.execute("SELECT catbus.publish('a', to_json(n)) FROM generate_series(1, 5) AS n")
        assert heard == []
        assert await move(sql, epoch) == (5, 5, False)
        await asyncio.sleep(0)
        assert [payload.split(" ")[0] for payload in heard] == [f"{epoch}:1:5"]
        assert await move(sql, epoch) == (0, None, False)
        await asyncio.sleep(0)
        assert len(heard) == 1

    play(database_url, scene)


def test_moved_messages_follow_the_appended_ones_and_commit_with_them(database_url: str) -> None:
    call = """
        SELECT a.at, a.first, a.seqs, m.moved, m.last, m.more
        FROM catbus.append($1, $2, $3, $4, $5, $6, $7, $8, $9) AS a, catbus.move_outbox($1, $2, a.at) AS m
    """

    async def both(writer: Connection, epoch: str, *numbers: int) -> tuple[Any, ...]:
        texts = [f'"sent {number}"' for number in numbers]
        none = [None] * len(numbers)
        columns = ["a"] * len(numbers), texts, [b"p"] * len(numbers), list(numbers), none, none, none
        return tuple(await writer.fetchrow(call, "on", epoch, *columns))[1:]

    async def scene(epoch: str, writer: Connection, app: Connection) -> None:
        assert await both(writer, epoch, 1) == (1, [1], 0, None, False)
        await publish(app, "a", '"published 1"')
        await publish(app, "a", '"published 2"')
        await writer.execute("BEGIN")
        assert await both(writer, epoch, 2, 3) == (2, [2, 3], 2, 5, False)
        assert await position(app) == (epoch, 1, 1)
        await writer.execute("ROLLBACK")
        assert await both(writer, epoch, 2, 3) == (2, [2, 3], 2, 5, False)
        await publish(app, "a", '"published 3"')
        assert await both(writer, epoch, 2, 3) == (6, [2, 3], 1, 6, False)
        assert await payloads(app) == [
            '"sent 1"', '"sent 2"', '"sent 3"', '"published 1"', '"published 2"', '"published 3"'
        ]  # fmt: skip

    play(database_url, scene, connections=2)


def test_call_moves_at_most_1000_messages_and_4_mib(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        await sql.execute("SELECT catbus.publish('a', to_json(n)) FROM generate_series(1, 2001) AS n")
        assert await move(sql, epoch) == (1000, 1000, True)
        assert await move(sql, epoch) == (1000, 2000, True)
        assert await move(sql, epoch) == (1, 2001, False)
        assert await payloads(sql) == [str(n) for n in range(1, 2002)]
        big = "SELECT catbus.publish('a', to_json(repeat('x', 60000) || n)) FROM generate_series(1, 100) AS n"
        await sql.execute(big)
        assert await move(sql, epoch) == (70, 2071, True)
        assert await move(sql, epoch) == (30, 2101, False)

    play(database_url, scene)


def test_move_into_another_epoch_is_rejected(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        assert await move(sql, "another") == (0, None, False)
        await publish(sql, "a", "1")
        with pytest.raises(asyncpg.PostgresError, match=f"the epoch of the log is {epoch}") as refused:
            await move(sql, "another")
        assert refused.value.sqlstate == "CB001"
        assert await move(sql, epoch) == (1, 1, False)

    play(database_url, scene)


def test_old_snapshot_neither_moves_nor_truncates(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        for call in (f"catbus.move_outbox('on', '{epoch}', NULL)", "catbus.rotate_outbox()"):
            await sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            with pytest.raises(asyncpg.PostgresError, match="read committed"):
                await sql.execute(f"SELECT {call}")
            await sql.execute("ROLLBACK")

    play(database_url, scene)


def test_moved_messages_continue_at_the_floor_and_time_does_not_run_back(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        await sql.execute("UPDATE catbus.head SET floor = 1000, slot = 3")
        await publish(sql, "a", "1")
        assert await move(sql, epoch) == (1, 1000, False)
        await sql.execute("UPDATE catbus.entries SET at = at + 3600000")
        await publish(sql, "a", "2")
        assert await move(sql, epoch) == (1, 1001, False)
        assert await sql.fetchval("SELECT count(DISTINCT at) FROM catbus.entries WHERE slot = 3") == 1

    play(database_url, scene)


def test_only_one_replica_moves_and_the_others_do_not_wait(database_url: str) -> None:
    async def scene(epoch: str, slow: Connection, quick: Connection) -> None:
        await publish(quick, "a", "1")
        await slow.execute("BEGIN")
        assert await move(slow, epoch) == (1, 1, False)
        await publish(quick, "a", "2")
        await quick.execute("BEGIN")
        assert await move(quick, epoch) == (0, None, False)
        assert await quick.fetchval("SELECT pg_current_xact_id_if_assigned()") is None
        await quick.execute("COMMIT")
        await slow.execute("ROLLBACK")
        assert await move(quick, epoch) == (2, 2, False)
        assert await payloads(quick) == ["1", "2"]

    play(database_url, scene, connections=2)


def test_move_that_waited_for_the_head_row_sees_later_commits(database_url: str) -> None:
    async def scene(epoch: str, appending: Connection, moving: Connection, app: Connection) -> None:
        await publish(app, "a", "1")
        await appending.execute("BEGIN")
        await append(appending, epoch, [Sent(b"p", 1, payload='"sent"')])
        moved = asyncio.create_task(move(moving, epoch))
        await wait_blocked(app, moving)
        await publish(app, "a", "2")
        await appending.execute("COMMIT")
        assert await moved == (2, 3, False)
        assert await payloads(app) == ['"sent"', "1", "2"]

    play(database_url, scene, connections=3)


def test_transaction_that_has_published_blocks_no_other(database_url: str) -> None:
    async def scene(epoch: str, forgetful: Connection, app: Connection, writer: Connection) -> None:
        for connection in (app, writer):
            await connection.execute("SET lock_timeout = '1ms'")
        await forgetful.execute("BEGIN")
        await publish(forgetful, "a", '"late"')
        await append(writer, epoch, [Sent(b"p", 1, payload='"sent"')])
        for turn in (0, 1):
            await publish(app, "a", f'"published {turn}"')
            assert await writer.fetchval("SELECT catbus.outbox_pending()")
            assert (await move(writer, epoch)).moved == 1
            assert not await writer.fetchval("SELECT catbus.outbox_pending()")
            await writer.execute("SELECT setval('catbus.outbox_active', 1)")
            await writer.execute("SELECT catbus.rotate_outbox()")
        await forgetful.execute("COMMIT")
        await move_all(writer, epoch)
        assert await payloads(app) == ['"sent"', '"published 0"', '"published 1"', '"late"']

    play(database_url, scene, connections=3)


# Rotation of the tables


def test_tables_alternate_and_the_empty_one_is_truncated_beside_a_long_transaction(database_url: str) -> None:
    async def scene(epoch: str, forgetful: Connection, sql: Connection) -> None:
        await forgetful.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await forgetful.execute("SELECT count(*) FROM catbus.entries")
        looked_through = []
        active_tables = set()
        for _ in range(12):
            await sql.execute("SELECT catbus.publish('a', to_json(n)) FROM generate_series(1, 2000) AS n")
            await move_all(sql, epoch)
            await sql.execute("SELECT catbus.rotate_outbox()")
            await sql.execute("SELECT catbus.rotate_outbox()")
            active_tables.add(await sql.fetchval("SELECT last_value FROM catbus.outbox_active"))
            looked_through.append(sum(await sizes(sql)))
        assert active_tables == {0, 1}
        assert max(looked_through) < 1_000_000
        assert len(await payloads(sql)) == 24_000

    play(database_url, scene, connections=2)


def test_table_that_may_hold_messages_is_not_truncated(database_url: str) -> None:
    async def scene(epoch: str, forgetful: Connection, reading: Connection, sql: Connection) -> None:
        await publish(sql, "a", "1")
        await forgetful.execute("BEGIN")
        await publish(forgetful, "a", "3")
        await sql.execute("SELECT setval('catbus.outbox_active', 1)")
        for _ in range(2):
            await sql.execute("SELECT catbus.rotate_outbox()")
            assert (await sizes(sql))[0] > 0
            await move_all(sql, epoch)
        await publish(sql, "a", "2")
        await move_all(sql, epoch)
        await forgetful.execute("COMMIT")
        await sql.execute("SELECT catbus.rotate_outbox()")
        await move_all(sql, epoch)
        await reading.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM catbus.outbox_0")
        await sql.execute("SELECT catbus.rotate_outbox()")
        assert (await sizes(sql))[0] > 0
        await reading.execute("COMMIT")
        await sql.execute("SELECT catbus.rotate_outbox()")
        assert (await sizes(sql))[0] == 0
        assert await payloads(sql) == ["1", "2", "3"]

    play(database_url, scene, connections=3)


def test_snapshot_from_before_the_switch_can_publish(database_url: str) -> None:
    async def scene(epoch: str, old: Connection, sql: Connection) -> None:
        for level in ("REPEATABLE READ", "SERIALIZABLE"):
            await old.execute(f"BEGIN ISOLATION LEVEL {level}")
            await old.execute("SELECT 1 FROM catbus.head")
            await publish(old, "a", "1")
            turn = 1 - await sql.fetchval("SELECT last_value FROM catbus.outbox_active")
            await sql.execute(f"SELECT setval('catbus.outbox_active', {turn})")
            await publish(sql, "a", "2")
            await publish(old, "a", "3")
            await move_all(sql, epoch)
            await sql.execute("SELECT catbus.rotate_outbox()")
            await old.execute("COMMIT")
            await move_all(sql, epoch)
        assert await payloads(sql) == ["2", "1", "3"] * 2

    play(database_url, scene, connections=2)


# Model


@dataclass
class Message:
    """A message with the counted moments of its publish and its commit."""

    name: int
    published: int
    committed: int | None = None


@dataclass
class Transaction:
    messages: list[Message] = field(default_factory=list)
    savepoint: int | None = None


class OutboxMachine(RuleBasedStateMachine):
    """Steps of transactions and replicas in any order. All examples use one database, each with its own names."""

    url = ""
    names = 0

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.sql = [self.run(asyncpg.connect(self.url)) for _ in range(3)]
        self.replicas = [self.run(asyncpg.connect(self.url)) for _ in range(2)]
        self.observer = self.run(asyncpg.connect(self.url))
        self.reader = self.run(asyncpg.connect(self.url))
        self.reading = False
        self.epoch, self.base, _ = self.run(position(self.observer))
        self.open: list[Transaction | None] = [None] * len(self.sql)
        self.moment = 0
        self.committed: list[Message] = []
        self.sent: list[Message] = []
        self.moved = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def name(self) -> int:
        OutboxMachine.names += 1
        return OutboxMachine.names

    def tick(self) -> int:
        self.moment += 1
        return self.moment

    who = st.integers(0, 2)
    replica = st.integers(0, 1)

    @rule(who=who, level=st.sampled_from(["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]))
    def begin(self, who: int, level: str) -> None:
        if self.open[who] is None:
            self.open[who] = Transaction()
            self.run(self.sql[who].execute(f"BEGIN ISOLATION LEVEL {level}; SELECT 1 FROM catbus.head"))

    @rule(who=who, number=st.integers(1, 4), statement=st.booleans())
    def publish(self, who: int, number: int, statement: bool) -> None:
        """Publish in the open transaction, or in a new one."""
        messages = [Message(self.name(), self.tick()) for _ in range(number)]
        first, last = messages[0].name, messages[-1].name
        transaction = self.open[who]
        calls = f"SELECT catbus.publish('sql', to_json(n)) FROM generate_series({first}, {last}) AS n"
        if transaction is not None and not statement:
            calls = "; ".join(f"SELECT catbus.publish('sql', '{message.name}')" for message in messages)
        self.run(self.sql[who].execute(calls))
        if transaction is None:
            self.commit(messages)
        else:
            transaction.messages += messages

    def commit(self, messages: Sequence[Message]) -> None:
        now = self.tick()
        for message in messages:
            message.committed = now
        self.committed += messages

    @rule(who=who)
    def set_a_savepoint(self, who: int) -> None:
        transaction = self.open[who]
        if transaction is not None:
            transaction.savepoint = len(transaction.messages)
            self.run(self.sql[who].execute("SAVEPOINT s"))

    @rule(who=who)
    def go_back_to_the_savepoint(self, who: int) -> None:
        transaction = self.open[who]
        if transaction is not None and transaction.savepoint is not None:
            del transaction.messages[transaction.savepoint :]
            self.run(self.sql[who].execute("ROLLBACK TO s"))

    @rule(who=who, keep=st.booleans())
    def end(self, who: int, keep: bool) -> None:
        transaction = self.open[who]
        if transaction is not None:
            self.open[who] = None
            self.run(self.sql[who].execute("COMMIT" if keep else "ROLLBACK"))
            if keep:
                self.commit(transaction.messages)

    @rule(replica=replica)
    def move(self, replica: int) -> None:
        self.moved += self.run(move(self.replicas[replica], self.epoch)).moved

    @rule(replica=replica, number=st.integers(1, 3))
    def append(self, replica: int, number: int) -> None:
        messages = [Message(self.name(), self.tick()) for _ in range(number)]
        batch = [Sent(b"p", message.name, "sent", str(message.name)) for message in messages]
        self.run(append(self.replicas[replica], self.epoch, batch))
        now = self.tick()
        for message in messages:
            message.committed = now
        self.sent += messages

    @rule(turn=st.integers(0, 1))
    def take_a_turn(self, turn: int) -> None:
        self.run(self.observer.execute(f"SELECT setval('catbus.outbox_active', {turn})"))

    @rule(replica=replica)
    def make_small(self, replica: int) -> None:
        self.run(self.replicas[replica].execute("SELECT catbus.rotate_outbox()"))

    @rule(tables=st.booleans())
    def take_or_drop_a_long_snapshot(self, tables: bool) -> None:
        if self.reading:
            self.run(self.reader.execute("COMMIT"))
        else:
            query = "SELECT count(*) FROM catbus.outbox_0, catbus.outbox_1" if tables else "SELECT 1 FROM catbus.head"
            self.run(self.reader.execute(f"BEGIN ISOLATION LEVEL REPEATABLE READ; {query}"))
        self.reading = not self.reading

    @invariant()
    def the_log_has_what_was_moved_and_no_more(self) -> None:
        self.check(self.moved)

    def check(self, moved: int) -> None:
        rows = self.run(
            self.observer.fetch(
                "SELECT seq, channel, payload FROM catbus.entries WHERE seq > $1 ORDER BY seq", self.base
            )
        )
        assert [row["seq"] for row in rows] == list(range(self.base + 1, self.base + 1 + len(rows)))
        place = {int(row["payload"]): row["seq"] for row in rows}
        assert len(place) == len(rows) == moved + len(self.sent)
        known = {message.name: message for message in self.committed}
        for row in rows:
            assert row["channel"] == "sent" or int(row["payload"]) in known
        for message in self.committed:
            if message.name in place:
                for other in chain(self.committed, self.sent):
                    assert other.committed is not None
                    if other.committed < message.published or (
                        other.committed == message.committed and other.published < message.published
                    ):
                        assert other.name in place
                        assert place[other.name] < place[message.name]

    def teardown(self) -> None:
        try:
            for who, transaction in enumerate(self.open):
                if transaction is not None:
                    self.end(who, keep=True)
            while self.run(self.observer.fetchval("SELECT catbus.outbox_pending()")):
                self.move(0)
            assert self.moved == len(self.committed)
            self.check(self.moved)
        finally:
            for connection in (*self.sql, *self.replicas, self.observer, self.reader):
                connection.terminate()
            self.runner.close()


def test_outbox_keeps_its_promises(database_url: str) -> None:
    class Machine(OutboxMachine):
        url = database_url

    run_state_machine_as_test(Machine, settings=settings(max_examples=30, stateful_step_count=40))


def test_concurrent_publishers_lose_and_repeat_nothing(database_url: str) -> None:
    """Publishers, replicas that move and rotate, and snapshots run at once, and none waits for another."""

    async def scene(epoch: str, *actors: Connection) -> None:
        publishing, moving, turning, reading = actors[:4], actors[4:7], actors[7:9], actors[9]
        rounds, number = 40, 60
        done = asyncio.Event()

        async def publish_all(connection: Connection, name: str) -> None:
            for n in range(rounds):
                if n % 4 == 3:
                    await connection.execute(f"BEGIN; SELECT catbus.publish('never', '{n}'); ROLLBACK")
                numbers = f"generate_series({n * number}, {n * number + number - 1})"
                await connection.execute(f"SELECT catbus.publish('{name}', to_json(n)) FROM {numbers} AS n")

        async def move_on(connection: Connection, producer: bytes) -> None:
            n = 0
            while not done.is_set():
                n += 1
                await append(connection, epoch, [Sent(producer, n, "sent")])
                await move(connection, epoch)

        async def turn_on(connection: Connection) -> None:
            while not done.is_set():
                await connection.execute(
                    "SELECT setval('catbus.outbox_active', 1 - last_value) FROM catbus.outbox_active"
                )
                await connection.execute("SELECT catbus.rotate_outbox()")

        async def read_on(connection: Connection) -> None:
            while not done.is_set():
                await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM catbus.head")
                await asyncio.sleep(0.02)
                await connection.execute("COMMIT")

        async with asyncio.TaskGroup() as tasks:
            for index, connection in enumerate(moving):
                tasks.create_task(move_on(connection, b"%d" % index))
            for connection in turning:
                tasks.create_task(turn_on(connection))
            tasks.create_task(read_on(reading))
            await asyncio.gather(*(publish_all(connection, f"p{n}") for n, connection in enumerate(publishing)))
            done.set()
        await move_all(actors[0], epoch)
        rows = await actors[0].fetch("SELECT seq, channel, payload FROM catbus.entries ORDER BY seq")
        assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
        for n in range(len(publishing)):
            own = [int(row["payload"]) for row in rows if row["channel"] == f"p{n}"]
            assert own == list(range(rounds * number))
        assert {row["channel"] for row in rows} == {"p0", "p1", "p2", "p3", "sent"}

    play(database_url, scene, connections=10)
