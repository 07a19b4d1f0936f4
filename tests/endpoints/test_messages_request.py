"""GET /messages: catbus.endpoints.http.messages_request"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus import Broker
from catbus.auth.grants import Grants, Identity
from catbus.auth.tokens import sign
from catbus.config import Config, DrainSettings, LimitSettings
from catbus.endpoints.http.http_connection import SEND_TIMEOUT
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError, Unavailable
from catbus.log import Entry
from tests.brokers import CONFIG, SECRET, TOKEN, running
from tests.endpoints.fake_replica import FakeReplica
from tests.endpoints.raw_peer import Peer, Response
from tests.endpoints.test_http_connection import Served, error_code, get, served
from tests.log.harness import Publisher
from tests.test_wrong_input import AUTH, speaker

AUTHORIZED = f"Authorization: Bearer {TOKEN}"
GOOD = "Authorization: Bearer good"
NARROW = sign(SECRET, client_id="bob", grants=Grants(("a.*",)))
EXPIRED = sign(SECRET, client_id="bob", grants=Grants.ALL, expires=time.time() - 3600)


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Peer]:
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        yield Peer(stream)


async def ask(peer: Peer, query: str, *lines: str) -> dict[str, Any]:
    """The page that answers a query."""
    await peer.send(get(f"/messages?{query}", *(lines or (AUTHORIZED,))))
    return page_of(await peer.response())


def page_of(response: Response) -> dict[str, Any]:
    assert response.status == 200, response
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    page: dict[str, Any] = json.loads(response.body)
    assert page.keys() - {"gap"} == {"messages", "cursor", "more"}
    return page


def seqs(page: dict[str, Any]) -> list[int]:
    return [message["seq"] for message in page["messages"]]


@asynccontextmanager
async def serving(replica: FakeReplica | None = None, **options: Any) -> AsyncIterator[tuple[Served, Publisher]]:
    """A connection to a replica double whose log and delivery run."""
    replica = replica or FakeReplica()
    async with trio.open_nursery() as nursery:
        await nursery.start(replica.log.run, replica.delivery)
        nursery.start_soon(replica.delivery.run)
        async with served(replica, **options) as it:
            yield it, Publisher(replica.log)
        nursery.cancel_scope.cancel()


# Pages


async def test_messages_are_read_forward_page_by_page() -> None:
    async with running() as (broker, address), connected(address) as peer:
        for number in range(5):
            await broker.publish("a.b", {"n": number})
            await broker.publish("x", None)
        epoch = broker.replica.log.epoch
        page = await ask(peer, "pattern=a.*&pattern=a.b&since=0&limit=3")
        assert (seqs(page), page["more"], page["cursor"]) == ([1, 3, 5], True, f"6.{epoch}")
        [first, *_] = page["messages"]
        assert first.pop("at") > 1_700_000_000_000
        assert first == {"channel": "a.b", "payload": {"n": 0}, "seq": 1}
        for query in (f"since={page['cursor']}", f"since=6&epoch={epoch}", "since=6"):
            page = await ask(peer, f"pattern=a.*&{query}")
            assert (seqs(page), page["more"], page["cursor"]) == ([7, 9], False, f"10.{epoch}")
        assert seqs(await ask(peer, f"pattern=a.*&since={page['cursor']}")) == []


async def test_message_has_its_sender() -> None:
    async with running() as (_, address), connected(address) as peer:
        body = b'{"channel":"a","payload":"x"}'
        await peer.send(get("/publish", AUTHORIZED, f"Content-Length: {len(body)}", method="POST") + body)
        await peer.response()
        [message] = (await ask(peer, "pattern=a"))["messages"]
        message.pop("at")
        assert message == {"channel": "a", "payload": "x", "seq": 1, "sender": "alice"}


async def test_new_client_gets_the_newest_messages_and_continues_after_them() -> None:
    async with running() as (broker, address), connected(address) as peer:
        page = await ask(peer, "pattern=a")
        assert (seqs(page), page["more"], page["cursor"]) == ([], False, f"0.{broker.replica.log.epoch}")
        for _ in range(5):
            await broker.publish("a", 1)
        await broker.publish("x", 1)
        newest = await ask(peer, "pattern=a&limit=2")
        assert (seqs(newest), newest["more"]) == ([4, 5], True)
        older = await ask(peer, "pattern=a&limit=2&before=4")
        assert (seqs(older), older["more"]) == ([2, 3], True)
        oldest = await ask(peer, "pattern=a&before=2")
        assert (seqs(oldest), oldest["more"]) == ([1], False)
        await broker.publish("a", 1)
        assert seqs(await ask(peer, f"pattern=a&since={newest['cursor']}")) == [7]


async def test_cursor_of_another_epoch_gets_a_gap() -> None:
    async with running() as (broker, address), connected(address) as peer:
        await broker.publish("a", 1)
        page = await ask(peer, "pattern=a&since=700.another")
        assert page["gap"] == {"from": 1, "to": 0, "reason": "epoch"}
        assert (seqs(page), page["cursor"]) == ([1], f"1.{broker.replica.log.epoch}")


async def test_messages_that_were_dropped_are_a_gap() -> None:
    config = msgspec.structs.replace(CONFIG, limits=LimitSettings(recent=64 << 10))
    async with running(config) as (broker, address), connected(address) as peer:
        for _ in range(300):
            await broker.publish("a", "x" * 1000)
        page = await ask(peer, "pattern=a&since=3&limit=1")
        floor = broker.replica.log.floor
        assert floor > 5
        assert page["gap"] == {"from": 4, "to": floor - 1, "reason": "retention"}
        assert seqs(page) == [floor]


async def test_head_is_the_page_without_its_body() -> None:
    async with running() as (_, address), connected(address) as peer:
        await peer.send(get("/messages?pattern=a", AUTHORIZED, method="HEAD") + get("/health"))
        assert (await peer.response(head=True)).status == 200
        assert (await peer.response()).body == b"ok"


# Wrong input


def query(text: str, *lines: str) -> bytes:
    return get(f"/messages?{text}", *(lines or (AUTHORIZED,)))


WRONG: dict[str, tuple[bytes, int, str]] = {
    "no token": (get("/messages?pattern=a"), 401, "unauthenticated"),
    "a token of nobody": (query("pattern=a&access_token=nobody", "X: y"), 401, "unauthenticated"),
    "an empty token": (query("pattern=a&access_token=", "X: y"), 401, "unauthenticated"),
    "an expired token": (query(f"pattern=a&access_token={EXPIRED}", "X: y"), 401, "token_expired"),
    "two tokens": (query(f"pattern=a&access_token={TOKEN}"), 400, "bad_message"),
    "the token twice": (query(f"pattern=a&access_token={TOKEN}&access_token={TOKEN}", "X: y"), 400, "bad_message"),
    "no pattern": (query("since=1"), 400, "bad_message"),
    "no query": (get("/messages", AUTHORIZED), 400, "bad_message"),
    "an empty pattern": (query("pattern="), 400, "invalid_pattern"),
    "a bad pattern": (query("pattern=a..b"), 400, "invalid_pattern"),
    "a pattern with a line break": (query("pattern=a%0Ab"), 400, "invalid_pattern"),
    "a pattern beyond the grants": (query("pattern=b", f"Authorization: Bearer {NARROW}"), 403, "unauthorized"),
    "one of two patterns": (query("pattern=a.b&pattern=*", f"Authorization: Bearer {NARROW}"), 403, "unauthorized"),
    "too many patterns": (query("&".join(["pattern=a"] * 1001) + "&since=1"), 400, "bad_message"),
    "too many patterns backward": (query("&".join(f"pattern=a{n}" for n in range(11))), 400, "bad_message"),
    "since without a number": (query("pattern=a&since=now"), 400, "bad_message"),
    "a negative since": (query("pattern=a&since=-1"), 400, "bad_message"),
    "a since that is too large": (query("pattern=a&since=9223372036854775808"), 400, "bad_message"),
    "since twice": (query("pattern=a&since=1&since=2"), 400, "bad_message"),
    "two epochs": (query("pattern=a&since=1.e&epoch=f"), 400, "bad_message"),
    "epoch without since": (query("pattern=a&epoch=e"), 400, "bad_message"),
    "since and before": (query("pattern=a&since=1&before=2"), 400, "bad_message"),
    "wait and before": (query("pattern=a&wait=1&before=2"), 400, "bad_message"),
    "a wait that is too long": (query("pattern=a&wait=31"), 400, "bad_message"),
    "a wait without a number": (query("pattern=a&wait=soon"), 400, "bad_message"),
    "a fraction of a second": (query("pattern=a&wait=0.5"), 400, "bad_message"),
    "no limit": (query("pattern=a&limit=0"), 400, "bad_message"),
    "a limit that is too large": (query("pattern=a&limit=1001"), 400, "bad_message"),
    "an unknown parameter": (query("pattern=a&sinse=1"), 400, "bad_message"),
    "not UTF-8": (query("pattern=%ff"), 400, "bad_message"),
    "half an escape": (query("pattern=a%2"), 400, "bad_message"),
    "another method": (get("/messages?pattern=a", AUTHORIZED, method="POST"), 405, "method_not_allowed"),
    "another path": (get("/messages/?pattern=a", AUTHORIZED), 404, "not_found"),
}  # fmt: skip


async def test_wrong_input_has_its_status_and_the_connection_stays_usable() -> None:
    async with running() as (broker, address), connected(address) as peer:
        await broker.publish("a", "secret payload")
        for name, (request, status, code) in WRONG.items():
            await peer.send(request)
            response = await peer.response()
            assert (response.status, error_code(response)) == (status, code), name
            assert response.headers.get("connection") != "close", name
            for private in (TOKEN, EXPIRED, NARROW, "secret payload"):
                assert private not in response.body.decode(), name
        assert seqs(await ask(peer, "pattern=a")) == [1]


async def test_request_with_a_body_is_rejected() -> None:
    async with running() as (_, address), connected(address) as peer:
        await peer.send(get("/messages?pattern=a", AUTHORIZED, "Content-Length: 2") + b"{}")
        response = await peer.response()
        assert (response.status, error_code(response), response.headers["connection"]) == (400, "bad_message", "close")


async def test_pattern_may_occur_as_often_as_a_session_may_subscribe() -> None:
    async with running() as (broker, address), connected(address) as peer:
        await broker.publish("a9", 1)
        patterns = "&".join(f"pattern=a{number}" for number in range(1000))
        assert seqs(await ask(peer, f"{patterns}&since=0")) == [1]
        assert seqs(await ask(peer, f"{'pattern=a9&' * 1000}limit=9")) == [1]


async def test_unreachable_log_is_reported_with_the_time_of_a_retry() -> None:
    async with serving() as (it, _):

        async def read(*arguments: Any, **options: Any) -> Any:
            raise Unavailable("later")

        it.replica.log.read = read  # type: ignore[method-assign]
        it.replica.log._recent.append([Entry(1, 1, "a", b"1")])
        await it.peer.send(get("/messages?pattern=a&since=0&wait=9", GOOD))
        response = await it.peer.response()
        assert (response.status, error_code(response)) == (503, "unavailable")


@pytest.mark.parametrize("method", ["header", "query", "encoded"])
async def test_token_is_not_logged(method: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running() as (_, address), connected(address) as peer:
        for token, status in ((TOKEN, 200), (EXPIRED, 401), (TOKEN[:-3] + "abc", 401)):
            parameters, line = "pattern=a", f"Authorization: Bearer {token}"
            if method != "header":
                written = token.replace("s", "%73") if method == "encoded" else token
                parameters, line = f"access_token={written}&pattern=a", "X: y"
            await peer.send(query(parameters, line))
            assert (await peer.response()).status == status
            await peer.send(query(f"{parameters}&what=1", line))
            await peer.response()
    text = "".join(str(record.__dict__) + str(record.msg) for record in caplog.records)
    assert "/messages" in text
    for token in (TOKEN, EXPIRED, TOKEN[:-3] + "abc"):
        assert token not in text
        assert token.rpartition(".")[2] not in text
        assert token.replace("s", "%73") not in text


# Waiting


async def test_waiting_request_is_answered_by_the_next_message() -> None:
    async with running() as (broker, address), connected(address) as peer:
        await broker.publish("a", "old")
        cursor = (await ask(peer, "pattern=a"))["cursor"]
        for query_ in (f"since={cursor}", "limit=7"):
            await peer.send(query(f"pattern=a&wait=30&{query_}"))
            await waiting(broker, 1)
            await broker.publish("b", 1)
            await broker.publish("a", "new")
            page = page_of(await peer.response())
            assert [message["payload"] for message in page["messages"]] == ["new"]
            assert broker.replica.client_usages.subscriptions == 0
            cursor = page["cursor"]


async def waiting(broker: Broker, number: int) -> None:
    while len(broker.replica.message_pages.wake_ups) != number:
        await trio.lowlevel.checkpoint()


async def test_messages_that_exist_are_not_waited_for(autojump_clock: MockClock) -> None:
    async with serving() as (it, publisher):
        await publisher.publish_seq("a", b"1")
        assert seqs(await ask(it.peer, "pattern=a&since=0&wait=30", GOOD)) == [1]
        assert seqs(await ask(it.peer, "pattern=a", GOOD)) == [1]
        assert trio.current_time() == 0


async def test_wait_ends_with_an_empty_page_whose_cursor_has_advanced(autojump_clock: MockClock) -> None:
    async with serving() as (it, publisher):
        await it.peer.send(get("/messages?pattern=a&since=0&wait=20", GOOD))
        await wait_all_tasks_blocked()
        for _ in range(100):
            publisher.submit("x", b"1")
        await publisher.wait()
        page = page_of(await it.peer.response())
        assert (page["messages"], page["more"], page["cursor"]) == ([], False, f"100.{it.replica.log.epoch}")
        assert trio.current_time() == pytest.approx(20)


async def test_permission_that_is_withdrawn_during_the_wait_is_not_used(autojump_clock: MockClock) -> None:
    async def without_grants(token: str, network: str = "") -> Identity:
        return Identity("alice", Grants(("b",)), None)

    async def expired(token: str, network: str = "") -> Identity:
        raise PeerError(ErrorCode.TOKEN_EXPIRED, "the token has expired")

    for authenticate, status, code in ((without_grants, 403, "unauthorized"), (expired, 401, "token_expired")):
        async with serving() as (it, publisher):
            await it.peer.send(get("/messages?pattern=a&wait=30", GOOD))
            await wait_all_tasks_blocked()
            it.replica.authenticate = authenticate  # type: ignore[method-assign]
            await publisher.publish_seq("a", b'"private"')
            response = await it.peer.response()
            assert (response.status, error_code(response)) == (status, code)
            assert b"private" not in response.body


@pytest.mark.parametrize("how", ["close", "end of input"])
async def test_request_of_a_client_that_disconnects_ends(how: str, autojump_clock: MockClock) -> None:
    async with serving() as (it, _):
        await it.peer.send(get("/messages?pattern=a&wait=30", GOOD))
        await wait_all_tasks_blocked()
        assert len(it.replica.message_pages.wake_ups) == 1
        if how == "close":
            await it.peer.stream.aclose()
        else:
            await it.peer.stream.send_eof()  # type: ignore[attr-defined]
            assert page_of(await it.peer.response())["messages"] == []
            await it.peer.stream.aclose()
        await it.ended.wait()
        assert trio.current_time() == 0
        assert it.replica.message_pages.wake_ups == set()
        assert it.replica.client_usages.subscriptions == len(it.replica.client_usages) == 0
        assert it.registry.internal_errors == 0


async def test_request_of_a_client_whose_connection_is_reset_ends() -> None:
    async with running() as (broker, address):
        async with connected(address) as peer:
            await peer.send(query("pattern=a&wait=30"))
            await waiting(broker, 1)
            peer.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # type: ignore[attr-defined]
        await waiting(broker, 0)


async def test_pipelined_request_is_answered_after_the_wait(autojump_clock: MockClock) -> None:
    async with serving() as (it, publisher):
        await it.peer.send(get("/messages?pattern=a&wait=30", GOOD))
        await wait_all_tasks_blocked()
        await it.peer.send(get("/health") * 2)
        await wait_all_tasks_blocked()
        await publisher.publish_seq("x", b"1")
        await wait_all_tasks_blocked()
        await publisher.publish_seq("a", b"1")
        assert seqs(page_of(await it.peer.response())) == [2]
        assert (await it.peer.response()).body == b"ok"
        assert (await it.peer.response()).body == b"ok"


async def test_stopping_replica_answers_waiting_requests_at_once() -> None:
    """It still drains, because a session stays. A client that asks again opens a connection, to another replica."""
    config = msgspec.structs.replace(CONFIG, drain=DrainSettings(delay=0, window=50))
    async with (
        running(config) as (broker, address),
        speaker(address) as session,
        connected(address) as peer,
        connected(address) as other,
    ):
        await session.say(AUTH)
        await session.reply()
        await peer.send(query("pattern=a&wait=30"))
        await waiting(broker, 1)
        broker.stop()
        response = await peer.response()
        assert page_of(response)["messages"] == []
        assert response.headers["connection"] == "close"
        await other.send(query("pattern=a&wait=30"))
        response = await other.response()
        assert page_of(response)["messages"] == []
        assert response.headers["connection"] == "close"
        assert len(broker.replica.sessions) == 1


async def test_waiting_requests_count_as_connections_and_are_not_evicted() -> None:
    config = msgspec.structs.replace(CONFIG, limits=LimitSettings(connections=3))
    async with (
        running(config) as (broker, address),
        connected(address) as first,
        connected(address) as second,
        connected(address) as newcomer,
    ):
        for peer in (first, second):
            await peer.send(query("pattern=a&wait=30"))
        await waiting(broker, 2)
        # The third is not authenticated, so it makes room for the fourth.
        async with connected(address) as fourth:
            assert await newcomer.at_end()
            await fourth.send(query("pattern=a&wait=30"))
            await waiting(broker, 3)
            async with connected(address) as fifth:
                response = await fifth.response()
                assert (response.status, error_code(response)) == (503, "overloaded")
            await broker.publish("a", 1)
            for peer in (first, second, fourth):
                assert seqs(page_of(await peer.response())) == [1]


async def test_one_client_has_as_many_waiting_requests_as_sessions() -> None:
    config = msgspec.structs.replace(CONFIG, limits=LimitSettings(sessions=1))
    async with running(config) as (broker, address), connected(address) as first, connected(address) as second:
        await first.send(query("pattern=a&wait=30"))
        await waiting(broker, 1)
        await second.send(query("pattern=a&wait=30"))
        response = await second.response()
        assert (response.status, error_code(response), response.headers["retry-after"]) == (429, "overloaded", "1")
        assert seqs(await ask(second, "pattern=a")) == []


# Memory


async def test_response_is_sent_as_slowly_as_the_client_reads_it(autojump_clock: MockClock) -> None:
    """Each 64 KiB have a time limit of their own. Until they are read, the response counts for the budget."""
    async with serving(pair=trio.testing.lockstep_stream_pair) as (it, publisher):
        for _ in range(10):
            await publisher.publish_seq("a", b'"%b"' % (b"x" * 60_000))
        await it.peer.send(get("/messages?pattern=a", GOOD))
        await wait_all_tasks_blocked()
        assert it.replica.delivery.budget.replies > 600_000
        received = b""
        while not received.endswith(b'"more":false}\n'):
            await trio.sleep(SEND_TIMEOUT / 3)
            received += await it.peer.stream.receive_some(40_000)
        assert trio.current_time() > 3 * SEND_TIMEOUT
        await wait_all_tasks_blocked()
        assert it.replica.delivery.budget.replies == 0


async def test_message_that_is_erased_while_its_page_is_made_is_not_sent(autojump_clock: MockClock) -> None:
    async with serving() as (it, publisher):
        right = it.replica.authenticate
        await publisher.publish_seq("a", b'"private"')
        await publisher.publish_seq("a.b", b'"public"')

        async def erase(token: str, network: str = "") -> Identity:
            """At the second check of the permissions, the page has been read."""
            if len(it.replica.networks_of_tokens) == 1:
                assert await it.replica.log.erase("a") == 1
            return await right(token, network)

        it.replica.authenticate = erase  # type: ignore[method-assign]
        page = await ask(it.peer, "pattern=a&pattern=a.b&since=0&wait=1", GOOD)
        assert [message["payload"] for message in page["messages"]] == ["public"]


async def test_response_ends_when_one_of_its_messages_is_erased(autojump_clock: MockClock) -> None:
    async with serving(pair=trio.testing.lockstep_stream_pair) as (it, publisher):
        for _ in range(4):
            await publisher.publish_seq("a", b'"%b"' % (b"x" * 60_000))
        await publisher.publish_seq("b", b'"private"')
        await it.peer.send(get("/messages?pattern=*&since=0", GOOD))
        received = await it.peer.stream.receive_some(60_000)
        assert await it.replica.log.erase("b") == 1
        with suppress(trio.BrokenResourceError):
            while part := await it.peer.stream.receive_some(60_000):
                received += part
        assert b"private" not in received
        await it.ended.wait()
        assert it.registry.internal_errors == 0


async def test_page_is_not_made_while_clients_leave_too_many_responses_unread() -> None:
    replica = FakeReplica(Config())
    async with serving(replica) as (it, publisher):
        await publisher.publish_seq("a", b"1")
        replica.delivery.budget.replies = replica.delivery.budget.for_replies + 1
        for parameters in ("since=0", "limit=1", "since=1"):
            await it.peer.send(get(f"/messages?pattern=a&{parameters}", GOOD))
            response = await it.peer.response()
            assert (response.status, error_code(response)) == (429, "overloaded")
