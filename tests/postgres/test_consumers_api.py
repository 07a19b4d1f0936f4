"""`/api/consumers`: what administrators see of the consumers and do with them, on a real broker and a real database."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio

import catbus
from catbus.config import Config, DatabaseSettings
from catbus.endpoints.http.routes import route_of
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from tests.brokers import CONFIG, TOKEN, request, running
from tests.endpoints.raw_peer import Response
from tests.endpoints.test_openapi_document import valid
from tests.postgres.consumers import create, positions, publish, receive, retain
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql


class Scene:
    """A broker with a database, and a connection to that. Each answer is compared with the OpenAPI document."""

    def __init__(self, broker: catbus.Broker, address: str, sql: DatabaseConnection) -> None:
        self.broker = broker
        self.address = address
        self.sql = sql

    async def call(self, path: str, body: object = None, *, method: str = "") -> Response:
        data = b"" if body is None else msgspec.json.encode(body)
        method = method or ("GET" if body is None else "POST")
        target = f"/api/consumers{path}"
        response = await request(self.address, target, method=method, body=data)
        route = route_of(target.partition("?")[0])
        assert route is not None
        valid(route, method, response.status, response.headers["content-type"], response.body)
        return response

    async def read(self, path: str, body: object = None, *, method: str = "") -> Any:
        """The JSON of a successful response."""
        response = await self.call(path, body, method=method)
        assert response.status == 200, response.body
        return json.loads(response.body)

    async def refused(self, path: str, body: object = None, *, method: str = "") -> tuple[int, str]:
        """The status and the code of an error."""
        response = await self.call(path, body, method=method)
        return response.status, json.loads(response.body)["code"]


def settings(url: str) -> Config:
    return msgspec.structs.replace(CONFIG, database=DatabaseSettings(url=url, connect_timeout=5))


@asynccontextmanager
async def open_scene(url: str) -> AsyncIterator[Scene]:
    async with running(settings(url)) as (broker, address), open_sql(url) as sql:
        await broker.replica.log.wait_open()
        yield Scene(broker, address, sql)


@pytest.fixture
async def scene(database_url: str) -> AsyncIterator[Scene]:
    async with open_scene(database_url) as found:
        yield found


async def reject(sql: DatabaseConnection, *seqs: int) -> None:
    """Receive with the consumer `c`, and reject these messages."""
    await sql.execute("BEGIN")
    await receive(sql)
    for seq in seqs:
        await sql.fetch("SELECT catbus.reject('c', $1, 'broken')", seq)
    await sql.execute("COMMIT")


async def test_consumers_are_listed_in_pages_with_their_positions(scene: Scene) -> None:
    assert await scene.read("") == {"consumers": [], "next": None}
    for name in ("b", "c", "Z", "a-1"):
        await create(scene.sql, name, "a.*", partitions=2, hold=name == "c")
    await publish(scene.sql, "a.x", "b", "a.x")
    await reject(scene.sql, 3)
    first = await scene.read("?limit=3")
    assert ([each["consumer"] for each in first["consumers"]], first["next"]) == (["Z", "a-1", "b"], "b")
    last = await scene.read("?limit=3&after=b")
    assert ([each["consumer"] for each in last["consumers"]], last["next"]) == (["c"], None)
    [found] = last["consumers"]
    assert await scene.read("/c") == found | {
        "lag_seconds": pytest.approx(found["lag_seconds"], abs=60),
        "partitions": [
            each | {"lag_seconds": pytest.approx(each["lag_seconds"], abs=60)} for each in found["partitions"]
        ],
    }
    partitions = found.pop("partitions")
    assert found.pop("lag_seconds") > 0
    ((owner,),) = await scene.sql.fetch("SELECT current_user::text")
    assert found == {
        "consumer": "c", "pattern": "a.*", "owner": owner, "hold": True, "lag": 3, "gap": False, "dead_letters": 1,
    }  # fmt: skip
    for partition, position in zip(partitions, await positions(scene.sql), strict=True):
        assert partition.pop("moved") > 1_700_000_000_000
        assert (partition.pop("lag_seconds") > 0) == (position.lag > 0)
        assert partition == position._asdict()


async def test_dead_letters_are_read_in_pages_and_deleted(scene: Scene) -> None:
    await create(scene.sql)
    await publish(scene.sql, "a.x", "a.y", "a.z")
    await reject(scene.sql, 1, 2, 3)
    page = await scene.read("/c/dead?limit=2")
    assert [(each["seq"], each["channel"], each["payload"]) for each in page["letters"]] == [
        (1, "a.x", 1),
        (2, "a.y", 2),
    ]
    assert [page["letters"][0][name] for name in ("sender", "reason")] == [None, "broken"]
    assert page["letters"][0]["at"] <= page["letters"][0]["rejected"]
    assert page["next"] == 2
    page = await scene.read("/c/dead?limit=2&after=2")
    assert ([each["seq"] for each in page["letters"]], page["next"]) == ([3], None)
    assert await scene.read("/c/dead/delete", {"seqs": [3, 1, 9]}) == {"consumer": "c", "seqs": [1, 3]}
    assert [each["seq"] for each in (await scene.read("/c/dead"))["letters"]] == [2]


async def test_page_of_large_dead_letters_ends_early(scene: Scene) -> None:
    await create(scene.sql)
    await scene.sql.fetch(
        "INSERT INTO catbus.rejected_messages (consumer, seq, at, channel, payload) "
        "SELECT 'c', n, 0, 'a.x', to_json(repeat('x', 600000))::text FROM generate_series(1, 3) AS n"
    )
    seqs, after, pages = [], 0, 0
    while after is not None:
        page = await scene.read(f"/c/dead?after={after}")
        seqs += [each["seq"] for each in page["letters"]]
        after, pages = page["next"], pages + 1
    assert (seqs, pages) == ([1, 2, 3], 3)


async def test_dead_letter_is_published_again_and_deleted_in_one_transaction(scene: Scene) -> None:
    await create(scene.sql)
    await publish(scene.sql, "a.x", "a.y")
    await reject(scene.sql, 1, 2)
    # A letter of a reserved channel cannot be published, so nothing happens to the other one either.
    await scene.sql.execute("UPDATE catbus.rejected_messages SET channel = '_a' WHERE seq = 2")
    assert await scene.refused("/c/dead/publish", {"seqs": [1, 2]}) == (409, "conflict")
    assert len((await scene.read("/c/dead"))["letters"]) == 2
    assert await scene.sql.fetchrow("SELECT catbus.outbox_pending()") == (False,)
    await scene.sql.execute("UPDATE catbus.rejected_messages SET channel = 'a.y' WHERE seq = 2")
    async with catbus.connect(f"ws://{scene.address}/ws", token=TOKEN) as bus, bus.subscribe("a.*") as messages:
        assert (await scene.read("/c/dead/publish", {"seqs": [2, 1, 7]}))["seqs"] == [1, 2]
        found = [await anext(messages) for _ in range(2)]
    assert [(each.seq, each.channel, each.payload, each.sender) for each in found] == [
        (3, "a.x", 1, None),
        (4, "a.y", 2, None),
    ]
    assert (await scene.read("/c/dead"))["letters"] == []
    assert await receive(scene.sql) == [3, 4]


async def test_consumer_is_moved_and_told_what_it_has_missed(scene: Scene) -> None:
    await create(scene.sql, start="head")
    await publish(scene.sql, "a.x", "a.x", "a.x")
    for start, cursor in (("floor", 0), ("2", 2), ("head", 3)):
        found = await scene.read("/c/reset", {"start": start})
        assert ([each["cursor"] for each in found["consumer"]["partitions"]], found["skipped"]) == ([cursor], [])
    assert await scene.refused("/c/reset", {"start": "4"}) == (409, "conflict")
    await scene.read("/c/reset", {"start": "floor"})
    await retain(scene.sql)
    await retain(scene.sql)
    assert (await scene.read("/c"))["gap"] is True
    found = await scene.read("/c/reset", {"start": "gap"})
    assert found["skipped"] == [{"partition": 0, "first": 1, "last": 3}]
    assert (found["consumer"]["gap"], found["consumer"]["lag"]) == (False, 0)


async def test_consumer_in_use_is_busy_and_then_deleted(scene: Scene) -> None:
    await create(scene.sql)
    await publish(scene.sql, "a.x")
    await scene.sql.execute("BEGIN")
    await receive(scene.sql)
    assert await scene.refused("/c/delete", method="POST") == (503, "unavailable")
    await scene.sql.execute("ROLLBACK")
    assert await scene.read("/c/delete", method="POST") == {"consumer": "c"}
    assert await scene.refused("/c") == (404, "not_found")


UNKNOWN: list[tuple[str, object]] = [
    ("/d", None),
    ("/d/dead", None),
    ("/d/reset", {"start": "head"}),
    ("/d/reset", {"start": "gap"}),
    ("/d/delete", {}),
    ("/d/dead/delete", {"seqs": [1]}),
    ("/d/dead/publish", {"seqs": [1]}),
]
WRONG: list[tuple[str, object]] = [
    ("/a%20b", None),
    (f"/{'x' * 65}", None),
    ("?limit=0", None),
    ("?after=a%20b", None),
    ("/c?x=1", None),
    ("/c/dead?after=-1", None),
    ("/c/reset", {}),
    ("/c/reset", {"start": "now"}),
    ("/c/reset", {"start": 1}),
    ("/c/dead/delete", {"seqs": []}),
    ("/c/dead/delete", {"seqs": ["1"]}),
    ("/c/dead/publish", {"seqs": [-1]}),
    ("/c/dead/publish", {"seqs": [*range(1001)]}),
]


async def test_wrong_calls_change_nothing_and_say_what_is_wrong(scene: Scene) -> None:
    await create(scene.sql)
    await publish(scene.sql, "a.x")
    await reject(scene.sql, 1)
    for path, body in UNKNOWN:
        assert await scene.refused(path, body) == (404, "not_found"), path
    for path, body in WRONG:
        assert await scene.refused(path, body) == (400, "bad_message"), path
    [position] = await positions(scene.sql)
    assert (position.cursor, position.dead_letters) == (1, 1)


async def test_calls_are_in_the_audit_log(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "catbus.audit")
    await create(scene.sql)
    await scene.read("/c/reset", {"start": "head"})
    await scene.refused("/c/dead/publish", {"seqs": []})
    assert [tuple(vars(record)[name] for name in ("method", "path", "status")) for record in caplog.records] == [
        ("POST", "/api/consumers/c/reset", 200),
        ("POST", "/api/consumers/c/dead/publish", 400),
    ]


async def test_unreachable_database_is_an_error(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, open_scene(proxy.url) as scene:
        proxy.close()
        for path, body in (("", None), ("/c", None), ("/c/delete", {})):
            assert await scene.refused(path, body) == (503, "unavailable"), path


async def test_log_in_memory_has_no_consumers() -> None:
    async with running() as (broker, address), trio.open_nursery():
        for path, body in [("", None), *UNKNOWN]:
            data = b"" if body is None else msgspec.json.encode(body)
            response = await request(
                address, f"/api/consumers{path}", method="GET" if body is None else "POST", body=data
            )
            assert (response.status, json.loads(response.body)["code"]) == (404, "not_found")
            assert "its log is in memory" in json.loads(response.body)["error"]
        assert broker.replica.consumers is None
