"""The hooks of an embedding program: each decides about its own request, in bounded time, and harms no other."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import catbus
from catbus import AuthenticatedClient, ClientInfo, CloseCode, Config, ErrorCode, Refused, Replacement
from catbus.auth.grants import Grants
from catbus.auth.tokens import Authenticator, sign
from catbus.config import AuthSettings, LimitSettings, WebTransportSettings
from catbus.http import HttpClient
from catbus.log import MemoryLog
from catbus.replica import Replica
from catbus.session.driver import SessionDriver
from catbus.session.hooks import HOOK_TIMEOUT, Hooks
from tests.brokers import CONFIG, SECRET, TOKEN, running
from tests.test_broker import post
from tests.test_replica import open_client
from tests.test_session import Driver as EffectDriver

ADMIN_KEY = "the admin key of the tests"
UNAVAILABLE = "the application that has to decide about this is unavailable"
FAILED = "the application that has to decide about this failed"

OpenReplica = Callable[..., Replica]


@pytest.fixture
async def open_replica(nursery: trio.Nursery) -> AsyncIterator[Any]:
    async def open_replica(config: Config | None = None, **hooks: Any) -> Replica:
        replica = Replica(
            config or Config(),
            MemoryLog(),
            Authenticator([SECRET], admin_key=ADMIN_KEY),
            hooks=Hooks(nursery, **hooks),
        )
        await nursery.start(replica.log.run, replica.delivery)
        return replica

    yield open_replica
    nursery.cancel_scope.cancel()


def authentication(token: str = TOKEN) -> bytes:
    return json.dumps({"type": "auth", "token": token, "protocol": 1}).encode()


def publish(payload: Any, channel: str = "a", **fields: Any) -> bytes:
    return json.dumps({"type": "publish", "channel": channel, "payload": payload, **fields}).encode()


def replies(client: SessionDriver) -> list[Any]:
    return [
        json.loads(line) for item in client.send_queue.take() if isinstance(item, bytes) for line in item.splitlines()
    ]


async def enter(replica: Replica, token: str = TOKEN) -> SessionDriver:
    client = open_client(replica, "192.0.2.1")
    await client.receive(authentication(token))
    [reply] = replies(client)
    assert reply["type"] == "auth_ok"
    return client


async def payloads(replica: Replica, pattern: str = "a") -> list[Any]:
    entries, _ = await replica.log.history(pattern, before=None, limit=2000)
    return [json.loads(entry.payload) for entry in entries]


def certificate_of(broker: catbus.Broker) -> str:
    assert broker.replica.certificates is not None
    made = broker.replica.certificates.development(datetime.now(UTC))
    assert made is not None
    return made.certificate_pem


def failures(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.message, record.hook) for record in caplog.records if hasattr(record, "hook")]


# authenticate


async def test_authenticate_names_the_client_and_its_permissions(open_replica: OpenReplica) -> None:
    calls = []

    async def authenticate(token: str, client: ClientInfo) -> AuthenticatedClient:
        calls.append((token, client))
        return AuthenticatedClient("bob", read=["a.*"], write=("a.b",))

    replica = await open_replica(authenticate=authenticate)
    client = await enter(replica, "opaque")
    assert calls == [("opaque", ClientInfo(None, "test", "192.0.2.1"))]
    await client.receive(publish(1, "a.b", id=1) + publish(2, "a.c", id=2) + b'{"type":"subscribe","pattern":"b"}')
    await wait_all_tasks_blocked()
    assert {reply["type"]: reply.get("code") for reply in replies(client)} == {
        "publish_error": "unauthorized",
        "subscribe_error": "unauthorized",
        "published": None,
    }
    [entry], _ = await replica.log.history("a.b", before=None, limit=2)
    assert entry.sender == "bob"
    began = time.time()
    found = await replica.authenticate("opaque", "192.0.2.2")
    assert (found.client_id, found.grants, found.expires) == ("bob", Grants(("a.*",), ("a.b",)), None)
    assert began <= found.issued <= time.time(), "for a revocation"
    assert calls[1:] == [("opaque", ClientInfo(None, "http", "192.0.2.2"))]


async def test_token_that_is_not_for_the_hook_is_verified_by_the_broker(open_replica: OpenReplica) -> None:
    asked = []

    async def authenticate(token: str, _: ClientInfo) -> None:
        asked.append(token)

    replica = await open_replica(authenticate=authenticate)
    assert (await replica.authenticate(TOKEN)).client_id == "alice"
    with pytest.raises(catbus.PeerError) as caught:
        await replica.authenticate("nonsense")
    assert (caught.value.code, caught.value.close) == (ErrorCode.UNAUTHENTICATED, CloseCode.UNAUTHENTICATED)
    assert asked == [TOKEN, "nonsense"]


async def test_admin_key_never_reaches_the_hook_and_works_without_it(open_replica: OpenReplica) -> None:
    async def authenticate(token: str, _: ClientInfo) -> None:
        raise RuntimeError(token)

    replica = await open_replica(authenticate=authenticate)
    assert (await replica.authenticate(ADMIN_KEY)).admin
    with pytest.raises(catbus.PeerError) as caught:
        await replica.authenticate(ADMIN_KEY[:-1])
    assert caught.value.code is ErrorCode.INTERNAL


@pytest.mark.parametrize(
    ("code", "close"),
    [
        (ErrorCode.UNAUTHENTICATED, CloseCode.UNAUTHENTICATED),
        (ErrorCode.LIMIT, CloseCode.UNAUTHENTICATED),
        (ErrorCode.TOKEN_EXPIRED, CloseCode.TOKEN_EXPIRED),
        (ErrorCode.UNKNOWN, CloseCode.UNAVAILABLE),
    ],
)
async def test_refused_token_closes_its_connection_with_the_code_of_the_hook(
    open_replica: OpenReplica, code: ErrorCode, close: CloseCode
) -> None:
    async def authenticate(token: str, _: ClientInfo) -> None:
        if token == "bad":
            raise Refused(code, "not you", retry_after=3.0)

    replica = await open_replica(authenticate=authenticate)
    refused, other = open_client(replica), await enter(replica)
    await refused.receive(authentication("bad"))
    assert replies(refused) == [{"type": "auth_error", "message": "not you", "code": code, "retry_after": 3.0}]
    assert refused.closing == (close, "not you")
    assert other.closing is None
    assert replica.runtime_statistics.rejected_tokens["hook"] == 1


async def test_failing_hook_refuses_one_token_and_its_error_is_logged(
    open_replica: OpenReplica, caplog: pytest.LogCaptureFixture
) -> None:
    async def authenticate(token: str, _: ClientInfo) -> Any:
        match token:
            case "raises":
                raise ValueError("a fault")
            case "wrong":
                return True
            case "away":
                raise catbus.Unavailable("the identity provider is unreachable")

    replica = await open_replica(authenticate=authenticate)
    for token, text, close in [
        ("raises", FAILED, CloseCode.INTERNAL),
        ("wrong", FAILED, CloseCode.INTERNAL),
        ("away", UNAVAILABLE, CloseCode.UNAVAILABLE),
    ]:
        client = open_client(replica)
        await client.receive(authentication(token))
        assert client.closing == (close, text)
    assert failures(caplog) == [("a hook failed", "authenticate")] * 3
    assert "a fault" in str(caplog.records[0].exc_info)
    await enter(replica)


async def test_hook_that_hangs_is_cancelled_in_time_while_others_are_served(
    open_replica: OpenReplica, autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async def authenticate(token: str, _: ClientInfo) -> None:
        if token == "slow":
            await trio.sleep_forever()

    replica = await open_replica(authenticate=authenticate)
    slow = open_client(replica)
    nursery.start_soon(slow.receive, authentication("slow"))
    await wait_all_tasks_blocked()
    await enter(replica)
    assert slow.closing is None
    await slow.wait_closing()
    assert (slow.closing, trio.current_time()) == ((CloseCode.UNAVAILABLE, UNAVAILABLE), HOOK_TIMEOUT)
    assert failures(caplog) == [("a hook has not returned in time", "authenticate")]


async def test_client_that_expires_is_closed_and_one_that_has_expired_is_refused(
    open_replica: OpenReplica, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", trio.current_time)

    async def authenticate(token: str, _: ClientInfo) -> AuthenticatedClient:
        return AuthenticatedClient("bob", expires=float(token))

    replica = await open_replica(Config(auth=AuthSettings(leeway=0)), authenticate=authenticate)
    client = await enter(replica, "100")
    await client.wait_closing()
    assert client.closing is not None
    assert client.closing[0] is CloseCode.TOKEN_EXPIRED
    assert trio.current_time() == pytest.approx(130)
    late = open_client(replica)
    await late.receive(authentication("100"))
    assert late.closing == (CloseCode.TOKEN_EXPIRED, "the token has expired")


async def test_client_id_of_the_hook_has_the_limit_of_all_client_ids(open_replica: OpenReplica) -> None:
    async def authenticate(token: str, _: ClientInfo) -> AuthenticatedClient:
        return AuthenticatedClient(token)

    replica = await open_replica(Config(limits=LimitSettings(client_id=16)), authenticate=authenticate)
    assert (await replica.authenticate("x" * 16)).client_id == "x" * 16
    with pytest.raises(catbus.PeerError):
        await replica.authenticate("x" * 17)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"client_id": "bob", "read": "a.*"}, TypeError),
        ({"client_id": "bob", "write": [1]}, TypeError),
        ({"client_id": "bob", "read": ["a.*.b"]}, ValueError),
        ({"client_id": "bob", "expires": float("nan")}, ValueError),
        ({"client_id": "bo\0b"}, ValueError),
        ({"client_id": "bo\ud800b"}, ValueError),
        ({"client_id": 7}, TypeError),
    ],
)
def test_authenticated_client_checks_its_values(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        AuthenticatedClient(**arguments)


# on_publish


async def test_hook_replaces_and_refuses_single_publishes(open_replica: OpenReplica) -> None:
    calls = []

    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> Replacement | None:
        calls.append((client, channel))
        match payload:
            case "null":
                return Replacement(None)
            case {"text": str(text)}:
                return Replacement({"text": text.upper()})
            case "bad":
                raise Refused(ErrorCode.UNAUTHORIZED, "mind your language")
        return None

    replica = await open_replica(on_publish=on_publish)
    client = await enter(replica)
    sent = [1.0, "null", "bad", {"text": "a"}, 2]
    await client.receive(b"".join(publish(payload, id=n) for n, payload in enumerate(sent)))
    await client.receive(publish(0, "elsewhere..", id=9))
    await wait_all_tasks_blocked()
    assert {reply["id"]: reply.get("seq", reply.get("code")) for reply in replies(client)} == {
        0: 1, 1: 2, 2: "unauthorized", 3: 3, 4: 4, 9: "invalid_channel"
    }  # fmt: skip
    entries, _ = await replica.log.history("a", before=None, limit=10)
    assert [entry.payload for entry in entries] == [b"1.0", b"null", b'{"text":"A"}', b"2"]
    assert calls == [(ClientInfo("alice", "test", "192.0.2.1", 1), "a")] * 5, "only what is allowed"
    assert client.session.pending == client.session.usage.cost == 0


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (ValueError("a fault"), "internal"),
        (trio.TooSlowError("too slow"), "unavailable"),
        (Replacement(object()), "internal"),
        ({"text": "not wrapped"}, "internal"),
    ],
)
async def test_failing_hook_fails_one_publish(
    open_replica: OpenReplica, fault: Any, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> Any:
        if payload == 2:
            if isinstance(fault, Exception):
                raise fault
            return fault
        return None

    replica = await open_replica(on_publish=on_publish)
    client = await enter(replica)
    await client.receive(b"".join(publish(n, id=n) for n in (1, 2, 3)))
    await wait_all_tasks_blocked()
    assert {reply["id"]: reply.get("code") for reply in replies(client)} == {1: None, 2: code, 3: None}
    assert await payloads(replica) == [1, 3]
    assert failures(caplog) == [("a hook failed", "on_publish")]


async def test_thousand_pipelined_publishes_keep_their_order(open_replica: OpenReplica) -> None:
    running_now = most = 0

    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> None:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        # Later ones are faster than earlier ones.
        await trio.sleep(0.001 * (1 - payload % 3 / 3))
        running_now -= 1

    replica = await open_replica(on_publish=on_publish)
    client = await enter(replica)
    await client.receive(b"".join(publish(n, id=n) for n in range(1000)))
    await wait_all_tasks_blocked()
    assert await payloads(replica) == list(range(1000))
    assert [reply["id"] for reply in replies(client)] == list(range(1000))
    assert most == 1


async def test_slow_hook_of_one_client_delays_no_other(
    open_replica: OpenReplica, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> None:
        if payload == "slow":
            await trio.sleep_forever()

    replica = await open_replica(on_publish=on_publish)
    slow, fast = await enter(replica), await enter(replica)
    nursery.start_soon(slow.receive, publish("slow", id=1) + publish(2, id=2))
    await wait_all_tasks_blocked()
    await fast.receive(publish(1, id=1))
    await wait_all_tasks_blocked()
    assert [reply["type"] for reply in replies(fast)] == ["published"]
    assert not replies(slow)
    await trio.sleep(HOOK_TIMEOUT)
    await wait_all_tasks_blocked()
    assert {reply["id"]: reply.get("code") for reply in replies(slow)} == {1: "unavailable", 2: None}
    assert await payloads(replica) == [1, 2]


async def test_connection_whose_hook_waits_delays_no_other_connection() -> None:
    waiting, release = trio.Event(), trio.Event()

    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> None:
        if payload == "slow":
            waiting.set()
            await release.wait()

    async with (
        running(on_publish=on_publish) as (_, address),
        catbus.connect(f"ws://{address}/ws", token=TOKEN) as slow,
        catbus.connect(f"ws://{address}/ws", token=TOKEN) as fast,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(slow.publish, "a", "slow")
        await waiting.wait()
        assert [await fast.publish("a", n) for n in range(3)] == [1, 2, 3]
        assert (await post(address, b'{"channel":"a","payload":1}'))[0] == 200
        release.set()


async def test_ephemeral_publish_passes_the_hook(open_replica: OpenReplica) -> None:
    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> Replacement | None:
        if payload == "bad":
            raise Refused(ErrorCode.UNAUTHORIZED, "no")
        return Replacement("x" * 8000) if payload == "grow" else Replacement([payload])

    replica = await open_replica(on_publish=on_publish)
    client = await enter(replica)
    await client.receive(b'{"type":"subscribe","pattern":"a"}')
    replies(client)
    sent = b"".join(publish(text, id=n, ephemeral=True) for n, text in enumerate(["bad", "good", "grow"]))
    await client.receive(sent)
    items = client.send_queue.take()
    assert [json.loads(item).get("code") for item in items if isinstance(item, bytes)] == [
        "unauthorized", None, "too_large"
    ]  # fmt: skip
    [delivered] = [item.entries for item in items if not isinstance(item, bytes)]  # type: ignore[union-attr]
    assert [entry.payload for entry in delivered] == [b'["good"]']


async def test_permission_withdrawn_while_the_hook_runs_stops_the_publish(
    open_replica: OpenReplica, nursery: trio.Nursery
) -> None:
    release = trio.Event()

    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> None:
        await release.wait()

    replica = await open_replica(on_publish=on_publish)
    client = await enter(replica)
    nursery.start_soon(client.receive, publish(1, id=1))
    await wait_all_tasks_blocked()
    client.session.update_grants(Grants(("*",), ()))
    release.set()
    await wait_all_tasks_blocked()
    [reply] = replies(client)
    assert reply["code"] == "unauthorized"
    assert await payloads(replica) == []


@pytest.mark.parametrize("end", ["disconnect", "cancel"])
async def test_publish_whose_client_is_gone_is_not_published(
    open_replica: OpenReplica, nursery: trio.Nursery, end: str
) -> None:
    release, cancelled = trio.Event(), []

    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> None:
        try:
            await release.wait()
        except trio.Cancelled:
            cancelled.append(payload)
            raise

    replica = await open_replica(on_publish=on_publish)
    client = await enter(replica)
    usage, scope = client.session.usage, trio.CancelScope()

    async def receive() -> None:
        with scope:
            await client.receive(publish(1, id=1) + publish(2, id=2))

    nursery.start_soon(receive)
    await wait_all_tasks_blocked()
    if end == "cancel":
        scope.cancel()
        await wait_all_tasks_blocked()
    client.end()
    release.set()
    await wait_all_tasks_blocked()
    assert await payloads(replica) == []
    assert usage.cost == 0
    assert len(replica.client_usages) == 0
    assert cancelled == ([1] if end == "cancel" else [])


@pytest.mark.parametrize(
    ("decision", "code"),
    [
        (Refused(ErrorCode.UNAUTHORIZED, "no"), "unknown"),
        (Replacement("other"), "unknown"),
        (Replacement("first"), None),
    ],
)
async def test_retry_is_never_refused_as_if_its_first_try_had_not_been_published(
    open_replica: OpenReplica, decision: Any, code: str | None
) -> None:
    decisions = [Replacement("first"), decision]

    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> Replacement:
        found = decisions.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    replica = await open_replica(on_publish=on_publish)
    client = await enter(replica)
    await client.receive(publish(1, id=1))
    await wait_all_tasks_blocked()
    replies(client)
    await client.receive(publish(1, id=1, retry=True, after=0, epoch=replica.log.epoch))
    await wait_all_tasks_blocked()
    [reply] = replies(client)
    assert (reply.get("code"), reply.get("duplicate")) == (code, None if code else True)
    assert not decisions, "the hook is called for a retry, too"


def test_state_machine_asks_before_it_appends() -> None:
    driver = EffectDriver()
    driver.session._check_publishes = True
    driver.request({"type": "auth", "token": "t", "protocol": 1})
    driver.effects.clear()
    driver.request({"type": "publish", "channel": "project.a", "payload": 1, "id": 1})
    assert [type(effect).__name__ for effect in driver.effects] == ["CheckPublish", "AppendMessage"]


@pytest.mark.parametrize("kind", ["one", "many"])
async def test_hook_is_called_for_http_requests(kind: str) -> None:
    calls = []

    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> Replacement | None:
        calls.append(client)
        if payload == 2:
            raise Refused(ErrorCode.UNAUTHORIZED, "not two")
        return Replacement(payload * 10) if payload == 3 else None

    bodies = {"one": b'{"channel":"a","payload":2}', "many": b"["}
    bodies["many"] = json.dumps([{"channel": "a", "payload": n} for n in (1, 2, 3)]).encode()
    async with running(on_publish=on_publish) as (broker, address):
        status, found = await post(address, bodies[kind])
        refusal = {"error": "not two", "code": "unauthorized"}
        if kind == "one":
            assert (status, found) == (403, refusal)
        else:
            assert (status, found) == (403, [{"seq": 1, "channel": "a"}, refusal, {"seq": 2, "channel": "a"}])
            assert [message.payload for message in (await broker.history("a")).messages] == [1, 30]
        assert set(calls) == {ClientInfo("alice", "http", "127.0.0.1")}


@pytest.mark.parametrize("transport", ["websocket", "webtransport"])
async def test_hooks_serve_clients_of_both_transports(transport: str, tmp_path: Path) -> None:
    log: list[Any] = []

    async def authenticate(token: str, client: ClientInfo) -> AuthenticatedClient:
        return AuthenticatedClient(token, read=["*"], write=["*"])

    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> Replacement:
        log.append(client)
        return Replacement({"from": client.client_id, "text": payload})

    @asynccontextmanager
    async def on_session(client: ClientInfo) -> AsyncIterator[None]:
        log.append(("open", client))
        yield
        log.append(("closed", client))

    config = msgspec.structs.replace(
        CONFIG, state=str(tmp_path), webtransport=WebTransportSettings(bind=("127.0.0.1:0",))
    )
    serve = partial(catbus.serve, config, authenticate=authenticate, on_publish=on_publish, on_session=on_session)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            broker: catbus.Broker = await nursery.start(serve)
            [url] = [url for url in broker.urls if url.startswith("ws" if transport == "websocket" else "https")]
            options = {} if transport == "websocket" else {"ca": certificate_of(broker)}
            async with catbus.connect(url, token="bob", **options) as bus, bus.subscribe("a") as messages:
                [session] = broker.sessions
                assert (session.client_id, session.transport, session.patterns) == ("bob", transport, ["a"])
                assert abs(session.opened - time.time() * 1000) < 60_000
                await bus.publish("a", "hello")
                assert (await anext(messages)).payload == {"from": "bob", "text": "hello"}
            broker.stop()
    client = ClientInfo("bob", transport, "127.0.0.1", session.id)
    assert log == [("open", client), client, ("closed", client)]


async def test_hooks_serve_event_streams() -> None:
    contexts = Contexts()
    clients = []

    async def authenticate(token: str, client: ClientInfo) -> AuthenticatedClient:
        clients.append(client)
        if token == "bad":
            raise Refused(ErrorCode.UNAUTHENTICATED, "not you")
        return AuthenticatedClient("bob", read=["a"])

    async with running(authenticate=authenticate, on_session=contexts) as (broker, _):
        [url] = broker.http_urls
        async with HttpClient(url, token="bad") as client, client.events("a") as events:
            with pytest.raises(Refused, match="not you"):
                await anext(events)
        async with HttpClient(url, token="good") as client, client.events("a", since=0) as events:
            await broker.publish("a", 1)
            assert (await anext(events)).payload == 1
            assert contexts.log == ["bob entered"]
            assert [each.transport for each in broker.sessions] == ["sse"]
        assert set(clients) == {ClientInfo(None, "sse", "127.0.0.1")}
    assert contexts.log == ["bob entered", "bob left"]


# on_session


class Contexts:
    """A hook `on_session` that records when it enters and leaves, and waits where the test says so."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.entering: Callable[[], Any] | None = None
        self.leaving: Callable[[], Any] | None = None

    @asynccontextmanager
    async def __call__(self, client: ClientInfo) -> AsyncIterator[None]:
        if self.entering is not None:
            await self.entering()
        self.log.append(f"{client.client_id} entered")
        try:
            yield
        finally:
            if self.leaving is not None:
                await self.leaving()
            self.log.append(f"{client.client_id} left")


def raising(error: Exception) -> Callable[[], Any]:
    async def fail() -> None:
        raise error

    return fail


async def test_context_of_a_session_lasts_from_its_first_token_to_its_end(open_replica: OpenReplica) -> None:
    contexts = Contexts()
    replica = await open_replica(on_session=contexts)
    unauthenticated = open_client(replica)
    client = await enter(replica)
    assert contexts.log == ["alice entered"]
    await client.receive(authentication())
    await client.receive(publish(1, id=1))
    unauthenticated.end()
    await wait_all_tasks_blocked()
    assert contexts.log == ["alice entered"], "another token of the same session changes nothing"
    client.end()
    await wait_all_tasks_blocked()
    assert contexts.log == ["alice entered", "alice left"]


@pytest.mark.parametrize(
    ("error", "close"),
    [
        (Refused(ErrorCode.LIMIT, "no room"), (CloseCode.UNAUTHENTICATED, "no room")),
        (Refused(ErrorCode.OVERLOADED, "no room"), (CloseCode.OVERLOADED, "no room")),
        (ValueError("a fault"), (CloseCode.INTERNAL, FAILED)),
    ],
)
async def test_session_whose_context_cannot_be_entered_is_refused(
    open_replica: OpenReplica, error: Exception, close: tuple[CloseCode, str]
) -> None:
    contexts = Contexts()
    replica = await open_replica(on_session=contexts)
    first = await enter(replica)
    contexts.entering = raising(error)
    client = open_client(replica)
    await client.receive(authentication())
    assert client.closing == close
    assert [reply["type"] for reply in replies(client)] == ["auth_error"]
    client.end()
    await wait_all_tasks_blocked()
    assert contexts.log == ["alice entered"]
    assert first.closing is None


async def test_context_that_hangs_is_cancelled_in_time(
    open_replica: OpenReplica, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    contexts = Contexts()
    replica = await open_replica(on_session=contexts)
    client = await enter(replica)
    given_up = []

    async def hang() -> None:
        try:
            await trio.sleep_forever()
        finally:
            given_up.append(trio.current_time())

    contexts.entering = contexts.leaving = hang
    late = open_client(replica)
    await late.receive(authentication())
    assert (late.closing, trio.current_time()) == ((CloseCode.UNAVAILABLE, UNAVAILABLE), HOOK_TIMEOUT)
    await trio.sleep(HOOK_TIMEOUT * 10)
    assert client.closing is None, "between them it has no limit"
    client.end()
    await wait_all_tasks_blocked()
    assert failures(caplog) == [("a hook has not returned in time", "on_session")]
    ended = trio.current_time()
    await trio.sleep(HOOK_TIMEOUT * 1.1)
    assert given_up == [HOOK_TIMEOUT, ended + HOOK_TIMEOUT]
    contexts.entering = None
    await enter(replica)


@pytest.mark.parametrize("end", ["disconnect", "cancel"])
async def test_context_is_left_if_the_client_goes_while_it_is_entered(
    open_replica: OpenReplica, nursery: trio.Nursery, end: str
) -> None:
    contexts, release, scope = Contexts(), trio.Event(), trio.CancelScope()
    contexts.entering = release.wait
    replica = await open_replica(on_session=contexts)
    client = open_client(replica)

    async def receive() -> None:
        with scope:
            await client.receive(authentication())

    nursery.start_soon(receive)
    await wait_all_tasks_blocked()
    if end == "cancel":
        scope.cancel()
        await wait_all_tasks_blocked()
    client.end()
    release.set()
    await wait_all_tasks_blocked()
    assert contexts.log == ([] if end == "cancel" else ["alice entered", "alice left"])
    assert len(replica.client_usages) == 0


async def test_session_is_closed_when_its_context_fails(
    open_replica: OpenReplica, caplog: pytest.LogCaptureFixture
) -> None:
    fail = trio.Event()

    async def work() -> None:
        await fail.wait()
        raise ValueError("a fault")

    @asynccontextmanager
    async def on_session(client: ClientInfo) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            yield
            nursery.cancel_scope.cancel()

    replica = await open_replica(on_session=on_session)
    left, client = await enter(replica), await enter(replica)
    left.end()
    await wait_all_tasks_blocked()
    assert not failures(caplog), "a nursery of the context ends with the session"
    fail.set()
    await wait_all_tasks_blocked()
    assert client.closing == (CloseCode.INTERNAL, "the application that serves this session failed")
    assert failures(caplog) == [("a hook failed", "on_session")]


async def test_stopping_broker_leaves_every_context_before_it_returns() -> None:
    contexts = Contexts()
    contexts.leaving = partial(trio.sleep, 0.05)
    async with (
        running(on_session=contexts) as (broker, address),
        catbus.connect(f"ws://{address}/ws", token=TOKEN, reconnect=False) as bus,
        bus.subscribe("a") as messages,
    ):
        broker.stop()
        with pytest.raises(catbus.Disconnected):
            await anext(messages)
    assert contexts.log == ["alice entered", "alice left"]


async def test_cancelled_broker_cancels_its_hooks() -> None:
    entered, ends = trio.Event(), []

    async def on_publish(client: ClientInfo, channel: str, payload: Any) -> None:
        entered.set()
        try:
            await trio.sleep_forever()
        finally:
            ends.append("publish")

    @asynccontextmanager
    async def on_session(client: ClientInfo) -> AsyncIterator[None]:
        try:
            yield
        finally:
            ends.append("session")

    async def publish_for_ever(url: str) -> None:
        async with catbus.connect(url, token=TOKEN, reconnect=False) as bus:
            with pytest.raises(catbus.Disconnected):
                await bus.publish("a", 1)

    with trio.fail_after(30):
        async with trio.open_nursery() as clients, trio.open_nursery() as nursery:
            broker = await nursery.start(partial(catbus.serve, CONFIG, on_publish=on_publish, on_session=on_session))
            clients.start_soon(publish_for_ever, broker.urls[0])
            await entered.wait()
            nursery.cancel_scope.cancel()
    assert sorted(ends) == ["publish", "session"]


# The broker, for the program that embeds it


async def test_sessions_of_the_broker_are_described(open_replica: OpenReplica) -> None:
    replica = await open_replica()
    broker = catbus.Broker(replica)
    open_client(replica)
    first, _ = await enter(replica), await enter(replica, sign(SECRET, client_id=None, grants=Grants.ALL))
    await first.receive(b'{"type":"subscribe","pattern":"a"}{"type":"subscribe","pattern":"b.*"}')
    before = broker.sessions
    assert [(each.id, each.client_id, each.state, each.patterns) for each in before] == [
        (1, None, "new", []),
        (2, "alice", "open", ["a", "b.*"]),
        (3, None, "open", []),
    ]
    first.end()
    assert [each.id for each in broker.sessions] == [1, 3]


async def test_history_pages_backward_through_the_log() -> None:
    async with catbus.open_broker() as broker:
        for number in range(5):
            await broker.publish(f"a.{number % 2}", number, sender="carol")
        newest = await broker.history("a.*", limit=2)
        assert [message.payload for message in newest.messages] == [3, 4]
        assert newest.more
        assert newest.messages[0].sender == "carol"
        older = await broker.history("a.*", before=newest.messages[0].seq, limit=3)
        assert ([message.payload for message in older.messages], older.more) == ([0, 1, 2], False)
        with pytest.raises(Refused):
            await broker.history("a.*.b")
        for limit in (0, 1001):
            with pytest.raises(ValueError, match="limit"):
                await broker.history("a", limit=limit)


async def test_sender_of_the_broker_is_not_charged_to_that_client() -> None:
    config = Config(limits=LimitSettings(publish_rate=1, client_id=16))
    async with catbus.open_broker(config) as broker:
        for number in range(10):
            await broker.publish("a", number, sender="alice")
        for sender in ("x" * 17, "a\0b", "\ud800"):
            with pytest.raises(ValueError, match=r"sender|surrogates"):
                await broker.publish("a", 1, sender=sender)


async def test_http_urls_are_where_the_broker_answers() -> None:
    async with running() as (broker, address):
        assert broker.http_urls == [f"http://{address}"]
