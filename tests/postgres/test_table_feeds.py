"""`catbus.watch` and `catbus.unwatch`: what a feed publishes about each change of a table, and with whose rights."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from tests.postgres.consumers import open_role, outcome, retain
from tests.postgres.sql import open_sql

TAKE = """
WITH taken AS (DELETE FROM catbus.outbox_0 AS o RETURNING o.id, o.channel, o.payload, o.retain)
SELECT t.channel, t.payload, t.retain FROM taken AS t ORDER BY t.id
"""
TRIGGERS = "SELECT tgname::text, tgenabled::text FROM pg_trigger WHERE tgname LIKE '!catbus%' ORDER BY 1"
ORDERS = "SET search_path = public; CREATE TABLE orders (id integer PRIMARY KEY, status text)"


async def take(sql: DatabaseConnection, statement: str = "") -> list[tuple[str, Any]]:
    """Execute a statement, and return channel and payload of the messages that wait in the outbox."""
    if statement:
        await sql.execute(statement)
    return [(channel, json.loads(payload)) for channel, payload, _ in await sql.fetch(TAKE)]


def message(operation: str, row: object, **more: object) -> dict[str, object]:
    return {"operation": operation, "row": row, **more}


async def test_each_change_is_published_on_the_channel_of_its_row(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(f"{ORDERS}; SELECT catbus.watch('orders', 'orders.{{id}}')")
        new, paid = {"id": 1, "status": "new"}, {"id": 1, "status": "paid"}
        assert await take(sql, "INSERT INTO orders VALUES (1, 'new'), (2, 'new')") == [
            ("orders.1", message("insert", new)),
            ("orders.2", message("insert", new | {"id": 2})),
        ]
        assert await take(sql, "UPDATE orders SET status = 'paid' WHERE id = 1") == [
            ("orders.1", message("update", paid))
        ]
        assert await take(sql, "UPDATE orders SET status = 'paid' WHERE id = 1") == []
        assert await take(sql, "INSERT INTO orders VALUES (2, 'x') ON CONFLICT (id) DO UPDATE SET status = 'x'") == [
            ("orders.2", message("update", {"id": 2, "status": "x"}))
        ]
        assert await take(sql, "DELETE FROM orders WHERE id = 1") == [("orders.1", message("delete", paid))]
        assert await take(sql, "BEGIN; DELETE FROM orders; ROLLBACK") == []
        assert await take(sql, "TRUNCATE orders") == [("orders.2", message("delete", {"id": 2, "status": "x"}))]


async def test_row_that_moves_is_deleted_where_it_was(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(
            f"{ORDERS}; SELECT catbus.watch('orders', 'orders.{{id}}'); INSERT INTO orders VALUES (1, 'new')"
        )
        await take(sql)
        assert await take(sql, "UPDATE orders SET id = 2") == [
            ("orders.1", message("delete", {"id": 1, "status": "new"})),
            ("orders.2", message("insert", {"id": 2, "status": "new"})),
        ]
        # The key changes, and not the channel.
        await sql.execute("SELECT catbus.watch('orders', 'orders.{status}')")
        assert await take(sql, "UPDATE orders SET id = 3") == [
            ("orders.new", message("delete", {"id": 2, "status": "new"})),
            ("orders.new", message("insert", {"id": 3, "status": "new"})),
        ]


async def test_chosen_columns_and_the_row_before(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(
            "SET search_path = public; CREATE TABLE t (id integer, secret text, name text, "
            "shout text GENERATED ALWAYS AS (upper(name)) STORED); "
            "SELECT catbus.watch('t', 't', columns => '{shout,id}', old => true); INSERT INTO t VALUES (1, 's', 'a')"
        )
        assert await take(sql) == [("t", message("insert", {"shout": "A", "id": 1}))]
        assert await take(sql, "UPDATE t SET secret = 'other'") == []
        assert await take(sql, "UPDATE t SET name = 'b'") == [
            ("t", message("update", {"shout": "B", "id": 1}, old={"shout": "A", "id": 1}))
        ]


@pytest.mark.parametrize(
    "value",
    ["repeat('x', 70000)", "repeat('x', 9000000)", "repeat('[', 70) || repeat(']', 70)", "'\"\\ud800\"'"],
    ids=["large", "huge", "deep", "half a surrogate pair"],
)
async def test_message_that_cannot_be_published_has_the_key_alone(database_url: str, value: str) -> None:
    column = "json" if "x" not in value else "text"
    async with open_sql(database_url) as sql:
        await sql.execute(
            f"SET search_path = public; CREATE TABLE t (id integer PRIMARY KEY, value {column}); "
            "SELECT catbus.watch('t', 't.{id}', old => true); INSERT INTO t VALUES (1, NULL)"
        )
        await take(sql)
        assert await take(sql, f"UPDATE t SET value = ({value})::{column}") == [
            ("t.1", message("update", {"id": 1}, truncated=True))
        ]
        await sql.execute("SELECT catbus.watch('t', 't.{id}', retain => true)")
        assert await take(sql) == [("t.1", {"id": 1, "truncated": True})]


async def test_key_that_is_too_large_is_left_out(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute("SET search_path = public; CREATE TABLE t (id text); SELECT catbus.watch('t', 't.{id}')")
        [(channel, payload)] = await take(sql, "INSERT INTO t VALUES (repeat('x', 70000))")
        assert (len(channel), payload) == (37, message("insert", None, truncated=True))


@pytest.mark.parametrize("text", [r'"\u0000"', "1e999999", '{"a":\n\r1}', '{"a":1,"a":2}'])
async def test_json_that_jsonb_rejects_is_published(database_url: str, text: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute("SET search_path = public; CREATE TABLE t (v json); SELECT catbus.watch('t', 't')")
        await sql.fetch("INSERT INTO t VALUES ($1::text::json)", text)
        ((_, payload, _),) = await sql.fetch(TAKE)
        assert payload == '{"operation":"insert","row":{"v":' + text.replace("\n", " ").replace("\r", " ") + "}}"


def decode(segment: str) -> str | None:
    """The value of a segment that is no hash."""
    if segment in ("--null", "--empty"):
        return None if segment == "--null" else ""
    return unquote(segment.replace("%", "%25").replace("--", "%"), errors="strict")


async def test_segments_of_different_values_differ(database_url: str) -> None:
    values = st.text(st.sampled_from("aZ0_-.%* é\U0001f600\n"), max_size=30) | st.none()
    async with open_sql(database_url) as sql:
        query = "SELECT catbus.feed_segment(v) FROM unnest($1::text[]) WITH ORDINALITY AS u (v, n) ORDER BY n"
        examples: list[str | None] = [
            None,
            "",
            "-",
            "--",
            "---",
            "a-",
            "a- ",
            "--null",
            "--h",
            "x" * 48,
            "x" * 49,
            "-" * 30,
        ]

        @settings(max_examples=200, database=None, suppress_health_check=list(HealthCheck))
        @given(values)
        def collect(value: str | None) -> None:
            examples.append(value)

        collect()
        segments = [segment for (segment,) in await sql.fetch(query, examples)]
        for value, segment in zip(examples, segments, strict=True):
            assert len(segment) <= 48
            if segment.startswith("--h") and len(segment) == 35:
                assert value is not None
                assert len(value.encode()) > 12
            else:
                assert decode(segment) == value, (value, segment)
        assert len(set(segments)) == len(set(examples))
        await sql.fetch("SELECT catbus.check_message('a.' || s, '1') FROM unnest($1::text[]) AS s", segments)


async def test_names_that_need_quotes(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(
            """CREATE SCHEMA "s.""1";
            CREATE TABLE "s.""1"."T '$1" ("a b" integer PRIMARY KEY, r text, t text, "x""'%I$q$" text);
            SELECT catbus.watch('"s.""1"."T ''$1"', 't.{a b}.{x"''%I$q$}')"""
        )
        row = {"a b": 1, "r": "r", "t": "t", "x\"'%I$q$": "v"}
        assert await take(sql, """INSERT INTO "s.""1"."T '$1" VALUES (1, 'r', 't', 'v')""") == [
            ("t.1.v", message("insert", row))
        ]
        assert await take(sql, """TRUNCATE "s.""1"."T '$1" """) == [("t.1.v", message("delete", row))]
        await sql.execute("""SELECT catbus.unwatch('"s.""1"."T ''$1"')""")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("'t', 'x.{id}; DROP TABLE t'", "not a channel"),
        ("'t', 'x.{id'')}'", "has no column"),
        ("'t', '{id}'", "not a channel"),
        ("'t', '_x.{id}'", "not a channel"),
        ("'t', 'x..{id}'", "not a channel"),
        ("'t', 'x.a{id}'", "not a channel"),
        ("'t', NULL", "not a channel"),
        ("'t', 'x.{id}.{id}.{id}.{id}.{id}.{id}'", "not a channel"),
        ("'t', 'x.{other}'", 'no column "other"'),
        ("'t', 'x', '{other}'", 'no column "other"'),
        ("'t', 'x.{name}', retain => true", "a channel of its own"),
        ("'t', 'x.{id}', '{truncated}', retain => true", "truncated"),
        ("'v', 'x'", "not a table"),
        ("'u', 'x'", "not a table"),
        ("'catbus.roles', 'x'", "not a table"),
    ],
)
async def test_wrong_argument_is_rejected(database_url: str, arguments: str, error: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(
            "SET search_path = public; CREATE TABLE t (id integer PRIMARY KEY, name text, truncated text); "
            "CREATE VIEW v AS SELECT 1; CREATE UNLOGGED TABLE u (id integer)"
        )
        state, text = await outcome(sql, f"SELECT catbus.watch({arguments})")
        assert state == "22023"
        assert error in text
        assert await sql.fetch(TRIGGERS) == []


async def test_renamed_and_dropped_columns_do_not_make_a_change_fail(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(
            f"{ORDERS}; ALTER TABLE orders ADD note text; "
            "SELECT catbus.watch('orders', 'orders.{id}', columns => '{id,note,status}')"
        )
        assert await take(sql, "ALTER TABLE orders DROP note; INSERT INTO orders VALUES (1, 'a')") == [
            ("orders.1", message("insert", {"id": 1, "status": "a"}))
        ]
        assert await take(sql, "ALTER TABLE orders RENAME id TO nr; UPDATE orders SET status = 'b'") == [
            ("orders.--null", message("update", {"status": "b"}))
        ]
        await sql.execute("ALTER TABLE orders RENAME TO o; SELECT catbus.watch('o', 'o.{nr}')")
        assert await take(sql, "UPDATE o SET status = 'c'") == [("o.1", message("update", {"nr": 1, "status": "c"}))]
        assert await take(sql, "ALTER TABLE o ADD more integer DEFAULT 7; UPDATE o SET status = 'd'") == [
            ("o.1", message("update", {"nr": 1, "status": "d", "more": 7}))
        ]


async def test_partitions_publish_like_their_table(database_url: str) -> None:
    """Their columns may have another order, and a row that moves to another partition is deleted and inserted."""
    async with open_sql(database_url) as sql:
        await sql.execute(
            "SET search_path = public; "
            "CREATE TABLE p (id integer, k integer, PRIMARY KEY (id, k)) PARTITION BY RANGE (k); "
            "CREATE TABLE p1 (gone integer, k integer NOT NULL, id integer NOT NULL); ALTER TABLE p1 DROP gone; "
            "ALTER TABLE p ATTACH PARTITION p1 FOR VALUES FROM (0) TO (10); SELECT catbus.watch('p', 'p.{id}'); "
            "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20)"
        )
        assert {enabled for _, enabled in await sql.fetch(TRIGGERS)} == {"A"}
        row = {"id": 1, "k": 1}
        assert await take(sql, "INSERT INTO p VALUES (1, 1)") == [("p.1", message("insert", row))]
        assert await take(sql, "INSERT INTO p2 VALUES (2, 11)") == [("p.2", message("insert", {"id": 2, "k": 11}))]
        assert await take(sql, "UPDATE p SET k = 12 WHERE id = 1") == [
            ("p.1", message("delete", row)),
            ("p.1", message("insert", {"id": 1, "k": 12})),
        ]
        assert sorted(channel for channel, _ in await take(sql, "TRUNCATE p")) == ["p.1", "p.2"]
        assert await take(sql, "SELECT catbus.unwatch('p'); INSERT INTO p VALUES (3, 3)") == []


async def test_replicated_changes_are_published(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(f"{ORDERS}; SELECT catbus.watch('orders', 'orders.{{id}}')")
        assert await sql.fetch(TRIGGERS) == [("!catbus_feed", "A"), ("!catbus_feed_truncate", "A")]
        await sql.execute("SET session_replication_role = replica")
        assert len(await take(sql, "INSERT INTO orders VALUES (1, 'a'); TRUNCATE orders")) == 2


async def test_message_of_a_trigger_that_changes_the_row_again_is_the_later_one(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(
            f"""{ORDERS}; CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN UPDATE orders SET status = 'checked' WHERE id = NEW.id; RETURN NULL; END $$;
            CREATE TRIGGER "00_again" AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION again();
            SELECT catbus.watch('orders', 'orders.{{id}}'); INSERT INTO orders VALUES (1, 'new')"""
        )
        assert [(each["operation"], each["row"]["status"]) for _, each in await take(sql)] == [
            ("insert", "new"),
            ("update", "checked"),
        ]


async def test_retained_feed_makes_the_map_of_the_table(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(f"{ORDERS}; INSERT INTO orders VALUES (1, 'old'), (2, 'old')")
        await sql.execute("SELECT catbus.watch('orders', 'orders.{id}', retain => true)")
        # The budget of the retained messages does not make the changes of a table fail.
        await sql.fetch("SELECT setval('catbus.retained_over_budget', 1)")
        await sql.execute(
            "UPDATE orders SET status = 'new' WHERE id = 2; INSERT INTO orders VALUES (3, 'c'), (4, 'd'); "
            "UPDATE orders SET id = 5 WHERE id = 4; DELETE FROM orders WHERE id = 1"
        )
        await sql.fetch(
            "SELECT m.last FROM catbus.head AS h CROSS JOIN LATERAL catbus.move_outbox('local', h.epoch, NULL) AS m"
        )
        rows = await sql.fetch("SELECT channel, payload::text FROM catbus.retained('orders.*') ORDER BY 1")
        assert {channel: json.loads(payload) for channel, payload in rows} == {
            f"orders.{number}": {"id": number, "status": status} for number, status in [(2, "new"), (3, "c"), (5, "d")]
        }
        assert await sql.fetch("SELECT proname FROM pg_proc WHERE proname LIKE 'catbus!_fill%' ESCAPE '!'") == []
        await retain(sql)


GRANTS = """
GRANT USAGE ON SCHEMA catbus TO shop;
GRANT EXECUTE ON FUNCTION catbus.watch, catbus.unwatch, catbus.feed_query, catbus.publish_change TO shop;
CREATE SCHEMA shop AUTHORIZATION shop;
"""


async def test_owner_of_a_table_watches_it_and_nobody_else_does(database_url: str) -> None:
    async with (
        open_sql(database_url) as sql,
        open_role(database_url, "shop", [GRANTS]) as shop,
        open_role(database_url, "clerk", ["GRANT USAGE ON SCHEMA shop, catbus TO clerk"]) as clerk,
    ):
        await shop.execute("CREATE TABLE shop.orders (id integer PRIMARY KEY); GRANT INSERT ON shop.orders TO clerk")
        await sql.execute("GRANT EXECUTE ON FUNCTION catbus.watch, catbus.unwatch TO clerk")
        watch = "SELECT catbus.watch('shop.orders', 'orders.{id}', retain => true)"
        assert await outcome(clerk, watch) == ("42501", "must be owner of table shop.orders")
        await shop.execute(watch)
        # A role that changes the table needs no right for that to publish.
        await clerk.execute("INSERT INTO shop.orders VALUES (1)")
        assert await take(sql) == [("orders.1", {"id": 1})]
        (function,) = await sql.fetchrow("SELECT tgfoid::regproc::text FROM pg_trigger WHERE tgname = '!catbus_feed'")
        await clerk.execute("CREATE TEMPORARY TABLE mine (id integer)")
        attach = f"CREATE TRIGGER x AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION {function}('x')"
        assert (await outcome(clerk, attach))[0] == "42501"
        assert (await outcome(clerk, "SELECT catbus.unwatch('shop.orders')"))[0] == "42501"
        await shop.execute("SELECT catbus.unwatch('shop.orders')")
        assert (await outcome(shop, "SELECT catbus.unwatch('shop.orders')"))[0] == "42704"
        assert await sql.fetch("SELECT FROM pg_proc WHERE proname LIKE 'catbus!_f%' ESCAPE '!'") == []
        await sql.execute("REVOKE EXECUTE ON FUNCTION catbus.publish_change FROM shop")
        state, text = await outcome(shop, watch)
        assert state == "42501"
        assert text.startswith("the owner of the table shop.orders may not publish a feed")


async def test_code_of_the_owner_of_a_table_runs_with_the_rights_of_that_role(database_url: str) -> None:
    """A cast to json is a function that making JSON calls. The owner of the log watches the table, and changes it."""
    async with (
        open_sql(database_url) as sql,
        open_role(database_url, "forger", ["CREATE SCHEMA m AUTHORIZATION forger"]) as m,
    ):
        await m.execute(
            """CREATE TABLE m.loot (role text); CREATE TYPE m.mood AS ENUM ('sad');
            CREATE FUNCTION m.cast_it(m.mood) RETURNS json LANGUAGE plpgsql AS $$
            BEGIN INSERT INTO m.loot VALUES (current_user); RETURN '1'; END $$;
            CREATE CAST (m.mood AS json) WITH FUNCTION m.cast_it(m.mood);
            CREATE TABLE m.t (id integer PRIMARY KEY, mood m.mood); INSERT INTO m.t VALUES (1, 'sad')"""
        )
        await sql.execute("SELECT catbus.watch('m.t', 't.{id}', retain => true)")
        await sql.execute(
            "INSERT INTO m.t VALUES (2, 'sad'); UPDATE m.t SET id = 3 WHERE id = 2; DELETE FROM m.t; TRUNCATE m.t"
        )
        assert await sql.fetch("SELECT DISTINCT role FROM m.loot") == [("forger",)]


async def test_settings_of_a_session_change_no_message(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(
            "SET search_path = public; CREATE TABLE t (at timestamptz PRIMARY KEY, f float8, b bytea, i interval); "
            "SELECT catbus.watch('t', 't.{at}')"
        )
        fill = "INSERT INTO t VALUES ('2026-01-02 03:04:05+00', 0.1::float8 + 0.2, '\\x00ff', '1 day')"
        first = await take(sql, f"{fill}; DELETE FROM t")
        await sql.execute(
            "SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'SQL, DMY'; SET extra_float_digits = -15; "
            "SET bytea_output = 'escape'; SET IntervalStyle = 'sql_standard'; SET search_path = ''"
        )
        assert await take(sql, fill.replace("INTO t", "INTO public.t") + "; DELETE FROM public.t") == first
        assert len(first) == 2


async def test_old_snapshot_is_rejected(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(ORDERS)
        await sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        assert (await outcome(sql, "SELECT catbus.watch('orders', 'orders')"))[0] == "25001"
