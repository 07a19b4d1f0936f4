"""`/api/`: what administrators see and do, on a real broker with sessions over both transports."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
import trio

import catbus
from catbus.auth.grants import Grants, Identity
from catbus.auth.tokens import Authenticator, sign
from catbus.close_codes import CloseCode
from catbus.config import AuthSettings, Config, WebTransportSettings
from catbus.endpoints.http.api import channels
from catbus.endpoints.http.api.administrator import MAX_CLIENT_ID
from catbus.endpoints.http.api.channels import list_channels
from catbus.endpoints.http.api.replicas import ReplicasReport, list_replicas
from catbus.endpoints.http.api.retained import list_retained
from catbus.endpoints.http.api.sessions import SessionsPage, list_sessions
from catbus.endpoints.http.http_request import HttpRequest
from catbus.endpoints.http.http_response import HttpResponse
from catbus.endpoints.http.operation import Access, Handler
from catbus.endpoints.http.routes import ROUTES
from catbus.limits.cpu_scheduler import TimeSlices
from catbus.log import MemoryLog, RetainedPage
from catbus.protocol.wire_messages import Publish, Subscribe
from catbus.replica import Replica
from catbus.version import version
from tests.brokers import CONFIG, SECRET, TOKEN, request
from tests.endpoints.event_source import events
from tests.endpoints.raw_peer import Response
from tests.test_both_transports import discover
from tests.test_metrics import scrape

NAME = f"{socket.gethostname()}:{os.getpid()}"
ADMIN_KEY = "the-admin-key-of-the-tests"

OPERATIONS = [
    (method, path.format(client_id="somebody", name="c", seq=1, channel="a"))
    for path, methods in ROUTES.items()
    for method, operation in methods.items()
    if operation.access is Access.ADMINISTRATOR
]


def token(client_id: str | None, read: str = "*", write: str = "*") -> str:
    return sign(SECRET, client_id=client_id, grants=Grants((read,), (write,)))


class Server:
    """A broker that is serving, and what its clients need."""

    def __init__(self, broker: catbus.Broker, address: str, found: dict[str, Any]) -> None:
        self.broker = broker
        self.address = address
        self.websocket = f"ws://{address}/ws"
        self.webtransport, self.certificate = found["webtransport"], found["certificate"]

    async def get(self, target: str, **options: Any) -> Any:
        """The JSON of a successful response."""
        response = await request(self.address, target, **options)
        assert response.status == 200, response.body
        assert response.headers["content-type"] == "application/json"
        return json.loads(response.body)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    config = msgspec.structs.replace(
        CONFIG,
        state=str(tmp_path),
        auth=AuthSettings(secrets=(SECRET,), admin_key=ADMIN_KEY),
        webtransport=WebTransportSettings(bind=("127.0.0.1:0",)),
    )
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, config)
            address = dict(broker.addresses)["websocket"]
            yield Server(broker, address, await discover(address))
            broker.stop()


# Who may


def refused(response: Response, status: int, code: str) -> None:
    assert (response.status, json.loads(response.body)["code"]) == (status, code)
    assert json.loads(response.body).keys() == {"error", "code"}


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
async def test_only_administrators_may_use_the_api(server: Server, method: str, path: str) -> None:
    expected = 404 if path.startswith("/api/consumers") else 200  # the log in memory has no consumers
    for admitted in (ADMIN_KEY, TOKEN, token(None)):
        assert (await request(server.address, path, admitted, method=method)).status == expected
    for narrow in (token("bob", write="a.*"), token("bob", read="a.*"), sign(SECRET, client_id="b", grants=Grants())):
        refused(await request(server.address, path, narrow, method=method), 403, "unauthorized")
    for wrong in ("", "nonsense", TOKEN[:-1]):
        response = await request(server.address, path, wrong, method=method)
        refused(response, 401, "unauthenticated")
        assert response.headers["www-authenticate"] == 'Bearer realm="catbus"'
    refused(
        await request(server.address, f"{path}?access_token={ADMIN_KEY}", "", method=method), 401, "unauthenticated"
    )
    refused(await request(server.address, path, TOKEN, method="DELETE"), 405, "method_not_allowed")
    refused(await request(server.address, f"{path}?nonsense=1", TOKEN, method=method), 400, "bad_message")


async def test_calls_of_administrators_are_logged_without_their_query(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "catbus.audit")
    await request(server.address, "/api/clients/bob/disconnect?access_token=secret", TOKEN, method="POST")
    await request(server.address, f"/api/clients/{'x' * 5000}/disconnect", ADMIN_KEY, method="POST")
    await request(server.address, "/api/sessions", token("bob", read="a.*"))
    [one, other] = caplog.records
    fields = ("method", "path", "status", "client_id", "address")
    assert [getattr(one, name) for name in fields] == ["POST", "/api/clients/bob/disconnect", 200, "alice", "127.0.0.1"]
    assert (vars(other)["status"], vars(other)["client_id"], len(vars(other)["path"])) == (400, None, 255)
    assert "secret" not in str([vars(record) for record in caplog.records])


# Replicas


async def test_replica_with_its_log_in_memory_is_the_only_one(server: Server) -> None:
    found = await server.get("/api/replicas")
    [replica] = found["replicas"]
    assert found["available"] is True
    assert (replica["state"], replica["clients"], replica["silent"]) == ("ready", 0, 0)
    assert replica["version"] == version()


async def test_reports_of_other_releases_are_listed_as_far_as_they_are_known() -> None:
    class OtherReleases(MemoryLog):
        def report(self) -> dict[str, object]:
            return {"replicas": [{"id": "a", "silent": 1, "clients": "many", "colour": "red"}, {"id": "b", "pid": 1}]}

    replica = Replica(Config(), OtherReleases(), Authenticator([SECRET]))
    found = msgspec.json.decode((await ask(list_replicas, replica)).body, type=ReplicasReport)
    assert [(each.id, each.clients, each.silent, each.pid) for each in found.replicas] == [
        ("a", None, 1.0, None),
        ("b", None, 0.0, 1),
    ]


# Sessions


async def test_sessions_of_both_transports_are_listed_with_their_figures(server: Server) -> None:
    before = time.time_ns() // 1_000_000
    async with (
        catbus.connect(server.websocket, token=token("alice")) as one,
        catbus.connect(server.webtransport, token=token("bob"), ca=server.certificate) as other,
        one.subscribe("orders.*") as here,
        one.subscribe("nothing"),
        other.subscribe("orders.1", stream=True) as there,
    ):
        for _ in range(3):
            await one.publish("orders.1", 1)
        await other.publish("orders.2", 1, ephemeral=True)
        for messages, number in ((here, 4), (there, 3)):
            for _ in range(number):
                await anext(messages)
        await one.ping()
        found = await server.get("/api/sessions")
        for session in found["sessions"]:
            assert before <= session.pop("opened") <= time.time_ns() // 1_000_000
    assert found == {
        "replica": NAME,
        "open": 2,
        "sessions": [
            {
                "id": 1, "client_id": "alice", "state": "open", "transport": "websocket", "protocol": 1,
                "network": "127.0.0.1", "admin": False, "role": None, "expires": None, "subscriptions": 2,
                "patterns": ["orders.*", "nothing"], "lagging": 0, "lag": 0, "queued": 0, "pending": 0,
                "published": 3, "delivered": 4,
            },
            {
                "id": 2, "client_id": "bob", "state": "open", "transport": "webtransport", "protocol": 1,
                "network": "127.0.0.1", "admin": False, "role": None, "expires": None, "subscriptions": 1,
                "patterns": ["orders.1"], "lagging": 0, "lag": 0, "queued": 0, "pending": 0,
                "published": 1, "delivered": 3,
            },
        ],
        "next": None,
    }  # fmt: skip


async def test_pages_of_sessions_contain_each_once_while_others_end(server: Server) -> None:
    names = ["alice", "bob", "alice", "carol", "alice"]
    async with trio.open_nursery() as nursery:

        async def stay(name: str, *, task_status: trio.TaskStatus[catbus.Bus]) -> None:
            async with catbus.connect(server.websocket, token=token(name)) as bus:
                task_status.started(bus)
                await trio.sleep_forever()

        for name in names:
            await nursery.start(stay, name)
        pages = []
        after: int | None = 0
        while after is not None:
            page = await server.get(f"/api/sessions?limit=2&after={after}")
            pages.append([session["client_id"] for session in page["sessions"]])
            after = page["next"]
        assert pages == [["alice", "bob"], ["alice", "carol"], ["alice"]]
        page = await server.get("/api/sessions?client_id=alice&limit=2")
        assert [session["id"] for session in page["sessions"]] == [1, 3]
        assert page["next"] == 3
        # The last session of a page may have ended before the next page is requested.
        await server.get("/api/clients/alice/disconnect", method="POST")
        page = await server.get("/api/sessions?after=3")
        assert [session["client_id"] for session in page["sessions"]][:1] == ["carol"]
        nursery.cancel_scope.cancel()


async def test_session_that_is_not_authenticated_is_listed(server: Server) -> None:
    host, _, port = server.address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(
            b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        await stream.receive_some()
        while not (found := await server.get("/api/sessions"))["sessions"]:
            await trio.lowlevel.checkpoint()
    [session] = found["sessions"]
    assert (session["state"], session["client_id"]) == ("new", None)


async def test_event_stream_is_listed(server: Server) -> None:
    async with (
        events(server.address, "pattern=a.*&pattern=b", token=token("alice")) as stream,
        catbus.connect(server.websocket, token=token("bob")) as bus,
    ):
        await bus.publish("a.b", 1)
        await stream.seqs(1)
        [session, _] = (await server.get("/api/sessions"))["sessions"]
    expected = {"client_id": "alice", "transport": "sse", "state": "open", "subscriptions": 2, "patterns": ["a.*", "b"]}
    assert {name: session[name] for name in expected} == expected
    assert (session["delivered"], session["lag"]) == (1, 0)


async def test_event_stream_has_one_start_for_all_its_patterns(server: Server) -> None:
    """What was published before it began was not delivered to it, unless it has resumed before that."""

    async def fate(seq: int, client_id: str) -> str:
        [session] = (await server.get(f"/api/clients/{client_id}/messages/{seq}"))["sessions"]
        return str(session["fate"])

    async with catbus.connect(server.websocket, token=token("bob")) as bus:
        await bus.publish("a.b", 1)
        await bus.publish("a.b", 2)
        resumed = events(server.address, "pattern=a.*&pattern=b&since=1", token=token("carol"))
        async with events(server.address, "pattern=a.*&pattern=b", token=token("alice")) as stream, resumed as other:
            await bus.publish("b", 3)
            await stream.seqs(1)
            await other.seqs(1)
            assert [await fate(seq, "alice") for seq in (1, 2, 3)] == ["earlier", "earlier", "sent"]
            assert [await fate(seq, "carol") for seq in (1, 2)] == ["earlier", "sent"]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "limit=", "limit=1&limit=2", "after=-1", "after=1e99", "client_id=",
     "client_id=%zz", "client_id=%ff", f"client_id={'x' * (MAX_CLIENT_ID + 1)}", "client_id=a%00b", "x=1"],
)  # fmt: skip
async def test_wrong_parameters_are_rejected(query: str) -> None:
    replica = Replica(Config(), MemoryLog(), Authenticator([SECRET]))
    response = await ask(list_sessions, replica, query)
    assert (response.status, json.loads(response.body)["code"]) == (400, "bad_message")


async def ask(handler: Handler, replica: Replica, query: str = "") -> HttpResponse:
    """The response of a handler without a network."""
    headers = [(b"authorization", f"Bearer {TOKEN}".encode())]
    return await handler(replica, HttpRequest("GET", "/", headers, query=query))


class Silent:
    def flush(self) -> None:
        """Write nothing."""


async def steps_of_other_tasks(handler: Handler, replica: Replica, query: str) -> tuple[HttpResponse, int]:
    """The response, and how often another task ran meanwhile."""
    steps = 0

    async def other() -> None:
        nonlocal steps
        while True:
            steps += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        response = await ask(handler, replica, query)
        nursery.cancel_scope.cancel()
    return response, steps


async def test_list_of_10000_sessions_lets_other_tasks_run() -> None:
    """Also when the sessions are only searched, and those of nobody are found."""
    replica = Replica(Config(), MemoryLog(), Authenticator([SECRET]))
    # A slice that is over at once: the time that the loop takes does not decide about the test.
    replica.cpu_scheduler.slices = TimeSlices(0.0, 0.0)
    for number in range(10_000):
        opened = replica.open_session(Silent(), transport="websocket")
        opened.session.identity = Identity(f"client-{number % 100}", Grants.ALL, None)
    response, steps = await steps_of_other_tasks(list_sessions, replica, "limit=1000")
    page = msgspec.json.decode(response.body, type=SessionsPage)
    assert (page.open, len(page.sessions), page.next) == (10_000, 1000, 1000)
    assert steps > 900
    response, steps = await steps_of_other_tasks(list_sessions, replica, "client_id=nobody")
    assert msgspec.json.decode(response.body, type=SessionsPage).sessions == []
    assert steps > 9000
    assert len(response.body) < 100


# Retained messages


async def test_answer_with_retained_messages_is_never_sent_after_their_erasure() -> None:
    class ErasedMeanwhile(MemoryLog):
        """A log of which a message is erased just after a page was read for the first time."""

        pages = 0

        async def retained(self, *args: Any, **options: Any) -> RetainedPage:
            page = await super().retained(*args, **options)
            self.pages += 1
            if self.pages == 1:
                await self.erase("a")
            return page

    log = ErasedMeanwhile()
    replica = Replica(Config(), log, Authenticator([SECRET]))
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run, replica.delivery)
        for channel in ("a", "b"):
            await replica.publish(Identity(None, Grants.ALL, None), [Publish(channel, msgspec.Raw(b"1"), retain=True)])
        response = await ask(list_retained, replica)
        assert [each["channel"] for each in json.loads(response.body)["messages"]] == ["b"]
        assert log.pages == 2
        assert response.is_valid()
        await log.erase("b")
        assert not response.is_valid()
        nursery.cancel_scope.cancel()


# Channels


async def test_busiest_channels_and_patterns_come_first(server: Server) -> None:
    async with (
        catbus.connect(server.websocket, token=TOKEN) as one,
        catbus.connect(server.websocket, token=TOKEN) as two,
        one.subscribe("orders.*"),
        two.subscribe("orders.*"),
        two.subscribe("orders.1"),
    ):
        for channel, number in (("orders.1", 3), ("orders.2", 5), ("other", 1)):
            for _ in range(number):
                await one.publish(channel, 1)
        await one.publish("other", 1, ephemeral=True)
        found = await server.get("/api/channels?limit=2")
    assert 0 < found.pop("seconds") < 61
    assert found == {
        "replica": NAME,
        "messages": 10,
        "missed": 0,
        "channels": [
            {"channel": "orders.2", "messages": 5, "subscriptions": 2},
            {"channel": "orders.1", "messages": 3, "subscriptions": 3},
        ],
        "patterns": [
            {"pattern": "orders.*", "subscriptions": 2, "lagging": 0},
            {"pattern": "orders.1", "subscriptions": 1, "lagging": 0},
        ],
    }


async def test_patterns_are_counted_turn_by_turn_and_few_are_kept() -> None:
    replica = Replica(Config(), MemoryLog(), Authenticator([SECRET]))
    replica.cpu_scheduler.slices = TimeSlices(0.0, 0.0)
    for number in range(2000):
        client = replica.open_session(Silent(), transport="websocket")
        client.subscriptions.subscribe(Subscribe(f"p{number}"))
        if number >= 1990:
            replica.open_session(Silent(), transport="websocket").subscriptions.subscribe(Subscribe(f"p{number}"))
    response, steps = await steps_of_other_tasks(list_channels, replica, "limit=12")
    found = msgspec.json.decode(response.body, type=channels.ChannelsReport).patterns
    assert [each.pattern for each in found[:10]] == [f"p{number}" for number in range(1990, 2000)]
    assert [each.subscriptions for each in found] == [2] * 10 + [1] * 2
    assert steps > 1900


# Disconnecting


@pytest.mark.parametrize("name", ["alice", "a/b", "a%2Fb", "ü ?#&+", "..", "{client_id}", "x" * 256])
async def test_client_is_disconnected_whatever_its_name_is(server: Server, name: str) -> None:
    ended: list[int | None] = []

    async def stay(name: str, transport: str, *, task_status: trio.TaskStatus[None]) -> None:
        ca = None if transport == server.websocket else server.certificate
        try:
            async with (
                catbus.connect(transport, token=token(name), ca=ca, reconnect=False) as bus,
                bus.subscribe("a.*") as messages,
            ):
                task_status.started()
                await anext(messages)
        except catbus.Disconnected as end:
            ended.append(end.code)

    async with trio.open_nursery() as nursery:
        for transport in (server.websocket, server.webtransport):
            await nursery.start(stay, name, transport)
            await nursery.start(stay, "other", transport)
        found = await server.get(f"/api/clients/{quote(name, safe='')}/disconnect", method="POST")
        assert found == {"replica": NAME, "client_id": name, "sessions": 2}
        while len(ended) < 2:
            await trio.sleep(0.01)
        assert ended == [CloseCode.DISCONNECTED] * 2
        assert {each.client_id for each in server.broker.replica.sessions_after(0)} == {"other"}
        again = await server.get(f"/api/clients/{quote(name, safe='')}/disconnect", method="POST")
        assert again["sessions"] == 0
        nursery.cancel_scope.cancel()


async def test_disconnected_client_connects_again_by_itself(server: Server) -> None:
    async with (
        catbus.connect(server.websocket, token=token("alice")) as bus,
        bus.subscribe("a.*") as messages,
    ):
        await server.get("/api/clients/alice/disconnect", method="POST")
        seq = await bus.publish("a.b", 1)
        assert (await anext(messages)).seq == seq


@pytest.mark.parametrize("name", ["%00", "a%00", "%", "%f", "%zz", "%ff", "%ed%a0%80", "x" * 10_000])
async def test_name_that_no_client_can_have_is_rejected(server: Server, name: str) -> None:
    for action in ("disconnect", "revoke"):
        refused(await request(server.address, f"/api/clients/{name}/{action}", method="POST"), 400, "bad_message")


# Revoking


async def revoke(server: Server, client_id: str, body: bytes = b"") -> Response:
    return await request(server.address, f"/api/clients/{client_id}/revoke", ADMIN_KEY, method="POST", body=body)


async def test_tokens_of_a_client_are_revoked(server: Server) -> None:
    before = time.time()
    async with (
        catbus.connect(server.websocket, token=token("alice"), reconnect=False) as bus,
        catbus.connect(server.websocket, token=token("bob"), reconnect=False) as other,
        bus.subscribe("a.*") as messages,
    ):
        found = json.loads((await revoke(server, "alice")).body)
        assert found["client_id"] == "alice"
        assert before - 1 <= found["issued_before"] <= time.time()
        with pytest.raises(catbus.Disconnected) as ended:
            await anext(messages)
        assert ended.value.code == CloseCode.REVOKED
        await other.ping()
    refused(await request(server.address, "/api/sessions", token("alice")), 401, "revoked")


async def test_time_of_a_revocation_is_given_in_seconds(server: Server) -> None:
    body = b'{"issued_before": 1000.5, "forget_after": 2000, "more": 1}'
    assert json.loads((await revoke(server, "bob", body)).body) == {"client_id": "bob", "issued_before": 1000.5}
    earlier = await revoke(server, "bob", b'{"issued_before": 7}')
    assert json.loads(earlier.body)["issued_before"] == 1000.5
    assert json.loads((await revoke(server, "carol", b"{}")).body)["issued_before"] > 1_700_000_000


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"null", b'"now"', b'{"issued_before": "now"}', b'{"issued_before": -1}', b'{"issued_before": 1e12}',
     b'{"forget_after": 1e999}', b'{"issued_before": NaN}', b"\xff", b"[" * 100_000],
)  # fmt: skip
async def test_wrong_body_revokes_nothing(server: Server, body: bytes) -> None:
    refused(await revoke(server, "alice", body), 400, "bad_message")
    assert not len(server.broker.replica.revocations)


@pytest.mark.parametrize("path", ["/api/clients//disconnect", "/api/clients/a/b/disconnect", "/api/clients/a", "/api/"])
async def test_other_paths_are_not_found(server: Server, path: str) -> None:
    refused(await request(server.address, path, method="POST"), 404, "not_found")


async def test_metrics_have_one_label_for_all_clients(server: Server) -> None:
    for name in ("alice", "bob", "%00"):
        await request(server.address, f"/api/clients/{name}/disconnect", method="POST")
    samples, _ = await scrape(server.address)
    counted = {labels: number for labels, number in samples["catbus_http_requests_total"].items() if "api" in labels[0]}
    assert counted == {
        ("/api/clients/{client_id}/disconnect", "200"): 2,
        ("/api/clients/{client_id}/disconnect", "400"): 1,
    }
