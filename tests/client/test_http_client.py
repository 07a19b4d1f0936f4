"""`catbus.http` against a real broker: nothing is published twice, lost or repeated when connections are cut."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio

import catbus
from catbus.endpoints.http import event_stream
from catbus.error_codes import ErrorCode
from catbus.errors import ConflictError, Refused, Unavailable
from catbus.http import HttpClient, HttpMessage, MessageStream
from catbus.testing.broker_in_thread import TestServer, open_test_server
from tests.client.cutting_relay import open_relay
from tests.test_readme import examples

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def reconnect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker, which runs in this process, lets clients of event streams come back at once."""
    monkeypatch.setattr(event_stream, "SHORTEST_RETRY", 0.01)
    monkeypatch.setattr(event_stream, "LONGEST_RETRY", 0.05)


@pytest.fixture
def server() -> Iterator[TestServer]:
    with open_test_server() as server:
        yield server


@pytest.fixture
async def client(server: TestServer, anyio_backend: str) -> AsyncIterator[HttpClient]:
    async with HttpClient(server.http_url, token=server.token("alice")) as client:
        yield client


async def payloads(server: TestServer, pattern: str = "*") -> list[Any]:
    async with catbus.connect(server.url, token=server.token()) as bus:
        page = await bus.history(pattern, limit=1000)
    return [message.payload for message in page.messages]


async def sessions(server: TestServer) -> list[catbus.SessionReport]:
    """The sessions of the broker."""
    return await anyio.to_thread.run_sync(
        lambda: trio.from_thread.run_sync(lambda: server._broker.sessions, trio_token=server._token)
    )


# Publishing


async def test_publish_returns_the_seq(client: HttpClient, server: TestServer) -> None:
    assert await client.publish("a", {"n": 1}) == 1
    assert await client.publish("a", None, ephemeral=True) is None
    assert await client.publish_many([("a", 2), ("b", "x")]) == [2, 3]
    assert await client.publish_many([]) == []
    assert await payloads(server) == [{"n": 1}, 2, "x"]


async def test_messages_that_are_published_together_can_be_retained(client: HttpClient, server: TestServer) -> None:
    messages = [("a", 1), ("b", 2), ("a", 3), ("c", 4), ("c", None)]
    assert await client.publish_many(messages, retain=True) == [1, 2, 3, 4, 5]
    async with catbus.connect(server.url, token=server.token()) as bus, bus.retained("*") as found:
        assert {channel: message.payload for channel, message in found.items()} == {"a": 3, "b": 2}


async def test_conflict_tells_the_present_seq(client: HttpClient, server: TestServer) -> None:
    assert await client.publish("a", 1, retain=True, expect=0) == 1
    with pytest.raises(ConflictError) as caught:
        await client.publish("a", 2, retain=True, expect=0)
    assert (caught.value.seq, caught.value.code) == (1, ErrorCode.CONFLICT)
    assert await client.publish("a", None, retain=True, expect=1) == 2
    with pytest.raises(ConflictError) as caught:
        await client.publish("a", 3, retain=True, expect=2)
    assert caught.value.seq == 0
    assert await payloads(server) == [1, None]
    page = await client.page("a", since=0)
    assert [message.retain for message in page.messages] == [True, True]
    for wrong in ({"expect": 0}, {"retain": True, "ephemeral": True}):
        with pytest.raises(ValueError, match="expect needs retain"):
            await client.publish("a", 1, **wrong)


@pytest.mark.parametrize(("expect", "outcome"), [(7, ErrorCode.CONFLICT), (0, ErrorCode.UNKNOWN)])
async def test_conflict_of_a_retry_is_final_unless_none_was_expected(
    server: TestServer, expect: int, outcome: ErrorCode
) -> None:
    async with (
        open_relay(server.http_url) as relay,
        HttpClient(relay.url, token=server.token()) as client,
    ):
        relay.drop_responses = 1
        # A success is never reported as a conflict.
        assert await client.publish("a", 1, retain=True, expect=0) == 1
        relay.cut()
        relay.drop_responses = 1
        with pytest.raises(Refused) as caught:
            await client.publish("a", 2, retain=True, expect=expect)
        assert caught.value.code is outcome


async def test_publish_whose_response_is_lost_is_sent_again_and_published_once(server: TestServer) -> None:
    async with (
        open_relay(server.http_url) as relay,
        HttpClient(relay.url, token=server.token()) as client,
    ):
        relay.drop_responses = 2
        assert await client.publish("a", 1) == 1
        assert relay.connections == 3
        relay.drop_responses = 1
        assert await client.publish_many([("a", 2), ("a", 3)]) == [2, 3]
    assert await payloads(server) == [1, 2, 3]


async def test_key_of_the_caller_makes_calls_idempotent(client: HttpClient, server: TestServer) -> None:
    assert [await client.publish("a", 1, key="job 7") for _ in range(2)] == [1, 1]
    with pytest.raises(Refused) as caught:
        await client.publish("a", 2, key="job 7")
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    assert await client.publish("a", 1) == 2, "without a key, each call is another message"
    for key in ("", "x" * 256, "ö", "a\nb"):
        with pytest.raises(ValueError, match="key"):
            await client.publish("a", 1, key=key)


async def test_ephemeral_message_whose_response_is_lost_is_not_sent_again(server: TestServer) -> None:
    token = server.token()
    async with (
        open_relay(server.http_url) as relay,
        HttpClient(relay.url, token=token) as client,
        catbus.connect(server.url, token=token) as bus,
        bus.subscribe("a") as messages,
    ):
        relay.drop_responses = 1
        with pytest.raises(Unavailable):
            await client.publish("a", 1, ephemeral=True)
        await client.publish("a", 2)
        assert [(await anext(messages)).payload for _ in range(2)] == [1, 2]


async def test_publish_gives_up_when_its_patience_ends(server: TestServer) -> None:
    async with (
        open_relay(server.http_url) as relay,
        HttpClient(relay.url, token=server.token()) as client,
    ):
        relay.drop_responses = 1000
        with pytest.raises(Unavailable):
            await client.publish("a", 1, patience=2)
        assert relay.connections > 1


async def test_unreachable_broker_is_unavailable() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with HttpClient(f"http://127.0.0.1:{bound.getsockname()[1]}", token="t") as client:
            with pytest.raises(Unavailable, match="unreachable"):
                await client.publish("a", 1, ephemeral=True, patience=0.3)


async def test_refusal_of_a_first_try_is_definite_and_of_a_retry_unknown(server: TestServer) -> None:
    reader = server.token("bob", write=())
    async with open_relay(server.http_url) as relay, HttpClient(relay.url, token=reader) as client:
        with pytest.raises(Refused) as caught:
            await client.publish("a", 1)
        assert caught.value.code is ErrorCode.UNAUTHORIZED
        [result] = await client.publish_many([("a", 1)])
        assert isinstance(result, Refused)
        assert result.code is ErrorCode.UNAUTHORIZED
        relay.cut()
        relay.drop_responses = 1
        with pytest.raises(Refused) as caught:
            await client.publish("a", 1)
        assert caught.value.code is ErrorCode.UNKNOWN


async def test_message_that_is_refused_stops_no_other(client: HttpClient, server: TestServer) -> None:
    limited = server.token("bob", write=("a",))
    async with HttpClient(server.http_url, token=limited) as bob:
        first, second, third = await bob.publish_many([("a", 1), ("b", 2), ("a", 3)])
    assert isinstance(second, Refused)
    assert (first, second.code, third) == (1, ErrorCode.UNAUTHORIZED, 2)


async def test_malformed_channel_or_pattern_is_refused_before_a_request(client: HttpClient) -> None:
    with pytest.raises(Refused, match="invalid_channel"):
        await client.publish("a..b", 1)
    with pytest.raises(Refused, match="invalid_pattern"):
        await client.page("a.*.b")
    with pytest.raises(Refused, match="invalid_pattern"):
        client.messages("a.*.b")
    with pytest.raises(Refused, match="invalid_pattern"):
        client.events(["a", "a.*.b"])


async def test_payload_without_a_json_form_is_a_type_error(client: HttpClient) -> None:
    with pytest.raises(TypeError):
        await client.publish("a", object())


async def test_token_function_is_called_again_when_the_token_is_rejected(server: TestServer) -> None:
    tokens = ["expired", server.token()]

    async def token() -> str:
        return tokens.pop(0)

    async with HttpClient(server.http_url, token=token) as client:
        with pytest.raises(Refused) as caught:
            await client.publish("a", 1)
        assert caught.value.code is ErrorCode.UNAUTHENTICATED
        assert await client.publish("a", 1) == 1
        assert await client.publish("a", 2) == 2, "a token that works is used again"


@pytest.mark.parametrize("url", ["ws://127.0.0.1:8080", "127.0.0.1:8080", ""])
async def test_url_of_another_kind_is_an_error(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        HttpClient(url, token="t")


def test_importing_the_package_imports_no_http_client() -> None:
    code = "import catbus, sys; catbus.connect; assert 'httpx' not in sys.modules, 'httpx'"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import catbus.http, sys; assert not {'trio_websocket', 'aioquic', 'asyncpg'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# Events


async def take(stream: MessageStream) -> HttpMessage:
    with anyio.fail_after(30):
        return await anext(stream)


async def follow(stream: MessageStream, number: int) -> list[Any]:
    return [(await take(stream)).payload for _ in range(number)]


async def test_events_begin_after_a_cursor_and_go_on_with_new_messages(client: HttpClient, server: TestServer) -> None:
    await client.publish_many([("a.x", 1), ("b", 2), ("c", 3)])
    async with client.events(["a.*", "b"], since=0) as events:
        assert await follow(events, 2) == [1, 2]
        cursor = events.cursor
        await client.publish_many([("c", 4), ("a.y", 5)])
        message = await take(events)
        assert (message.payload, message.seq, message.sender, message.channel) == (5, 5, "alice", "a.y")
        assert message.data == b"5"
        assert abs((message.at or 0) - time.time() * 1000) < 60_000
        assert message.cursor == events.cursor
        assert not events.gaps
    async with client.events("a.*", since=cursor) as events:
        assert await follow(events, 1) == [5]


async def test_events_without_since_are_new_messages(client: HttpClient, server: TestServer) -> None:
    await client.publish("a", "old")
    async with client.events("a") as events, anyio.create_task_group() as group:

        async def publish() -> None:
            while not any(session.patterns for session in await sessions(server)):
                await anyio.sleep(0.01)
            await client.publish("a", "lost", ephemeral=True)
            await client.publish("a", "new")

        group.start_soon(publish)
        ephemeral, message = await take(events), await take(events)
    assert (ephemeral.payload, ephemeral.seq, ephemeral.cursor) == ("lost", None, None)
    assert message.payload == "new"
    assert message.cursor is not None


async def test_stream_that_is_cut_resumes_without_a_loss_or_a_repeat(server: TestServer) -> None:
    rounds, each = 3, 20
    async with (
        open_relay(server.http_url) as relay,
        HttpClient(relay.url, token=server.token()) as client,
        HttpClient(server.http_url, token=server.token()) as publisher,
        client.events(["a.*", "b"], since=0) as events,
    ):

        async def publish(first: int) -> None:
            for number in range(first, first + each):
                await publisher.publish("b" if number % 2 else "a.x", number)
                await publisher.publish("c", "not for this stream")

        received = []
        for first in range(0, rounds * each, each):
            async with anyio.create_task_group() as group:
                group.start_soon(publish, first)
                for _ in range(each):
                    received.append((await take(events)).payload)
                    if received[-1] == first + each // 2:
                        relay.cut()
    assert received == list(range(rounds * each))
    assert relay.connections >= rounds
    assert all(b"last-event-id:" in request.lower() for request in relay.requests)


async def test_stream_that_is_cut_within_an_event_takes_nothing_of_it(client: HttpClient, server: TestServer) -> None:
    await client.publish_many([("a", [n, "x" * 50]) for n in range(60)])
    async with (
        open_relay(server.http_url) as relay,
        HttpClient(relay.url, token=server.token()) as cut,
        cut.events("a", since=0) as events,
    ):
        relay.limits = [1500, 1520]
        assert [payload[0] for payload in await follow(events, 60)] == list(range(60))
        assert relay.connections == 3


async def test_cancelled_iteration_loses_no_message(client: HttpClient, server: TestServer) -> None:
    async with client.events("a", since=0) as events:
        for number in range(20):
            with anyio.move_on_after(0.01 * (number % 3)):
                await take(events)
                pytest.fail("there is nothing yet")
            await client.publish("a", number)
            assert (await take(events)).payload == number


async def test_cursor_moves_past_messages_that_do_not_match(client: HttpClient, server: TestServer) -> None:
    async with client.events("a", since=0) as events:
        await client.publish("a", 1)
        assert await follow(events, 1) == [1]
        await client.publish_many([("b", n) for n in range(10)])
    async with client.events("a", since=events.cursor) as events, anyio.create_task_group() as group:
        group.start_soon(anext, events)
        # The block of an id alone that follows the catch-up is no message.
        with anyio.fail_after(30):
            while events.cursor is None or not events.cursor.startswith("11."):
                await anyio.sleep(0.01)
        group.cancel_scope.cancel()


async def test_gap_is_reported_and_the_iteration_continues(client: HttpClient, server: TestServer) -> None:
    await client.publish_many([("a", n) for n in range(3)])
    async with client.events("a", since="2.another-epoch") as events:
        assert await follow(events, 3) == [0, 1, 2]
    [gap] = events.gaps
    assert gap.reason == "epoch"


@pytest.mark.parametrize("problem", ["token", "grant"])
async def test_refused_stream_is_an_error_and_no_retry(server: TestServer, problem: str) -> None:
    token = "nonsense" if problem == "token" else server.token("bob", read=("b",))
    async with open_relay(server.http_url) as relay, HttpClient(relay.url, token=token) as client:
        for start in (lambda: client.events("a"), lambda: client.events(["a", "b"], since=0)):
            async with start() as events:
                with pytest.raises(Refused) as caught:
                    await take(events)
                assert caught.value.code == ("unauthenticated" if problem == "token" else "unauthorized")


async def test_stream_gives_up_when_its_patience_ends(server: TestServer) -> None:
    async with open_relay(server.http_url) as relay, HttpClient(relay.url, token=server.token()) as client:
        relay.drop_responses = 1000
        async with client.events("a", patience=2) as events:
            with pytest.raises(Unavailable):
                await take(events)
    assert relay.connections > 1


async def test_stream_that_is_left_ends_its_session(client: HttpClient, server: TestServer) -> None:
    async with client.events("a", since=0) as events:
        await client.publish("a", 1)
        await take(events)
        assert len(await sessions(server)) == 1
    while await sessions(server):
        await anyio.sleep(0.01)


# Pages


async def test_pages_lead_forward_and_backward_through_the_log(client: HttpClient) -> None:
    await client.publish_many([("ab"[n % 2], n) for n in range(10)])
    first = await client.page("a", since=0, limit=3)
    assert ([message.payload for message in first.messages], first.more) == ([0, 2, 4], True)
    rest = await client.page("a", since=first.cursor, limit=3)
    assert ([message.payload for message in rest.messages], rest.more) == ([6, 8], False)
    newest = await client.page(["a", "b"], limit=2)
    assert ([message.payload for message in newest.messages], newest.more) == ([8, 9], True)
    older = await client.page(["a", "b"], before=newest.messages[0].seq, limit=2)
    assert [message.payload for message in older.messages] == [6, 7]
    assert (older.messages[0].sender, older.messages[0].channel) == ("alice", "a")
    assert [m.payload for m in (await client.page("a", since=older.messages[0].cursor)).messages] == [8]
    with pytest.raises(ValueError, match="before"):
        await client.page("a", before=3, since=1)


async def test_iteration_over_pages_ends_without_wait(client: HttpClient) -> None:
    await client.publish_many([("ab"[n % 2], n) for n in range(20)])
    async with client.messages("a", limit=3, wait=0) as messages:
        assert [message.payload async for message in messages] == list(range(0, 20, 2))
    assert messages.cursor is not None
    assert messages.cursor.startswith("20."), "past what does not match"
    async with client.messages("a", since=messages.cursor, wait=0) as messages:
        assert [message.payload async for message in messages] == []


async def test_long_polling_follows_the_log_through_lost_connections(server: TestServer) -> None:
    async with (
        open_relay(server.http_url) as relay,
        HttpClient(relay.url, token=server.token()) as client,
        HttpClient(server.http_url, token=server.token()) as publisher,
        client.messages(["a", "b"]) as messages,
    ):
        for number in range(6):
            if number % 2:
                relay.drop_responses = 1
            async with anyio.create_task_group() as group:
                group.start_soon(publisher.publish, "ab"[number % 2], number)
                assert (await take(messages)).payload == number
            relay.cut()
        assert relay.connections >= 6


async def test_cancelled_long_poll_loses_no_message(client: HttpClient) -> None:
    async with client.messages("a", limit=2) as messages:
        for number in range(5):
            with anyio.move_on_after(0.05):
                await take(messages)
                pytest.fail("there is nothing yet")
            await client.publish_many([("a", 2 * number), ("a", 2 * number + 1)])
            assert await follow(messages, 2) == [2 * number, 2 * number + 1]


async def test_page_after_another_epoch_reports_a_gap(client: HttpClient) -> None:
    await client.publish("a", 1)
    page = await client.page("a", since="1.another-epoch")
    assert [message.payload for message in page.messages] == [1]
    assert page.gap is not None
    assert page.gap.reason == "epoch"
    async with client.messages("a", since="1.another-epoch", wait=0) as messages:
        assert [message.payload async for message in messages] == [1]
    assert messages.gaps == [page.gap]


# The page of the documentation


async def test_example_of_the_documentation_runs(server: TestServer, capsys: pytest.CaptureFixture[str]) -> None:
    script, function = examples(Path(__file__).parents[2] / "docs" / "python-http.md", "python")
    script = script.replace("http://127.0.0.1:8080", server.http_url).replace("anyio.run(main)\n", "")
    names: dict[str, Any] = {"token": server.token()}
    exec(compile(script, "python-http.md", "exec"), names)
    await names["main"]()
    assert capsys.readouterr().out == "1 orders.42 {'status': 'paid'}\n"
    exec(compile(function, "python-http.md", "exec"), names)
    async with HttpClient(server.http_url, token=server.token()) as client:
        cursor = await names["handle"](client, "0")
        assert capsys.readouterr().out == "{'status': 'paid'}\n"
        await names["handle"](client, cursor)
    assert capsys.readouterr().out == ""
