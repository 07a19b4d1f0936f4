"""`GET /events`: a session over server-sent events, on a real broker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import trio

import catbus
from catbus.auth.grants import Grants, Identity
from catbus.auth.tokens import sign
from catbus.close_codes import CloseCode
from catbus.config import DrainSettings, LimitSettings
from catbus.delivery import encoded_messages
from catbus.protocol.server_sent_events import encode_message_event
from catbus.session.driver import SessionDriver
from tests.brokers import CONFIG, SECRET, TOKEN, request, running
from tests.endpoints.event_source import events


def config(**changes: object) -> catbus.Config:
    return msgspec.structs.replace(CONFIG, **changes)


async def publish(broker: catbus.Broker, *channels: str) -> None:
    for channel in channels:
        await broker.publish(channel, channel)


def session_of(broker: catbus.Broker) -> SessionDriver:
    [session] = broker.replica.sessions
    return session


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.001)


async def test_messages_arrive_once_and_in_order_whatever_patterns_match() -> None:
    async with running() as (broker, address):
        async with events(address, "pattern=a.*&pattern=a.b&pattern=b") as source:
            assert source.status == 200
            assert source.headers[b"content-type"] == b"text/event-stream"
            assert source.headers[b"x-accel-buffering"] == b"no"
            assert b"no-transform" in source.headers[b"cache-control"]
            await publish(broker, "a.b", "c", "b", "a.c")
            found = [await source.next() for _ in range(3)]
        epoch = broker.replica.log.epoch
        assert [(event.type, event.data["channel"]) for event in found] == [
            ("message", "a.b"),
            ("message", "b"),
            ("message", "a.c"),
        ]
        assert [event.last_id for event in found] == [f"1.{epoch}", f"3.{epoch}", f"4.{epoch}"]
        assert found[0].data == {
            "type": "message",
            "channel": "a.b",
            "payload": "a.b",
            "seq": 1,
            "at": found[0].data["at"],
        }


async def test_last_event_id_resumes_and_counts_more_than_since() -> None:
    async with running() as (broker, address):
        await publish(broker, "a", "b", "a", "a", "b")
        async with events(address, "pattern=a&pattern=b&since=0") as source:
            assert await source.seqs(2) == [1, 2]
            last_id = f"2.{broker.replica.log.epoch}"
        async with events(address, "pattern=a&pattern=b&since=0", last_id=last_id) as source:
            assert await source.seqs(3) == [3, 4, 5]
            live = await source.next()
            assert (live.type, live.data["seq"]) == ("live", 5)
            assert source.parser.last_id == f"5.{broker.replica.log.epoch}"
            await publish(broker, "a")
            assert await source.seqs(1) == [6]


async def test_stream_without_since_begins_with_its_position() -> None:
    """A client that reconnects before the first message misses nothing."""
    async with running() as (broker, address):
        await publish(broker, "a", "a")
        async with events(address, "pattern=a") as source:
            while not source.parser.last_id:
                await source.read()
            assert source.parser.last_id == f"2.{broker.replica.log.epoch}"
            assert source.parser.retry is not None
            assert 1000 <= source.parser.retry <= 3000


async def test_position_of_another_epoch_is_a_gap() -> None:
    async with running() as (broker, address):
        await publish(broker, "a", "a")
        async with events(address, "pattern=a", last_id="7.another") as source:
            gap = await source.next()
            assert (gap.type, gap.data["reason"], gap.data["to"]) == ("gap", "epoch", 0)
            assert gap.last_id == f"0.{broker.replica.log.epoch}"
            assert await source.seqs(2) == [1, 2]


@pytest.mark.parametrize("draining", [False, True], ids=["serving", "draining"])
async def test_no_position_is_ahead_of_what_was_sent(draining: bool) -> None:
    """While a stream catches up, no `id` may pass messages that it still gets."""
    settings = config(drain=DrainSettings(delay=0, window=30, deadline=5))
    async with running(settings) as (broker, address):
        await publish(broker, *["a"] * 20)
        async with events(address, "pattern=b") as other:
            if draining:
                broker.stop()
                assert (await other.next()).type == "goaway"
            async with events(address, "pattern=a&since=0") as source:
                expected = 0
                while expected < 20:
                    event = await source.next()
                    if event.type == "message":
                        expected += 1
                        assert event.data["seq"] == expected
                    assert event.last_id in ("", f"{expected}.{broker.replica.log.epoch}"), event


async def test_ephemeral_messages_move_no_position() -> None:
    async with running() as (broker, address):
        async with events(address, "pattern=a.*&pattern=*") as source:
            await publish(broker, "a.b")
            await broker.publish("a.b", {"x": 1}, ephemeral=True)
            durable, ephemeral = await source.next(), await source.next()
        assert durable.last_id == ephemeral.last_id
        assert "seq" not in ephemeral.data
        assert ephemeral.data["payload"] == {"x": 1}


WRONG = {
    "": (400, "bad_message"),
    "pattern=a..b": (400, "invalid_pattern"),
    "pattern=a&since=": (400, "bad_message"),
    "pattern=a&since=x": (400, "bad_message"),
    "pattern=a&since=-1": (400, "bad_message"),
    "pattern=a&epoch=e": (400, "bad_message"),
    "pattern=a&sinec=1": (400, "bad_message"),
    "pattern=%ff": (400, "bad_message"),
    "pattern=z": (403, "unauthorized"),
    "pattern=a&pattern=z": (403, "unauthorized"),
}


async def test_wrong_requests_get_an_error_and_keep_the_connection() -> None:
    narrow = sign(SECRET, client_id="bob", grants=Grants(("a", "a.*"), ()))
    async with running() as (broker, address):
        async with events(address, "pattern=a", token=narrow) as unharmed:
            host, _, port = address.rpartition(":")
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                for query, (status, code) in WRONG.items():
                    head = f"GET /events?{query} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {narrow}\r\n\r\n"
                    await stream.send_all(head.encode())
                    response = b""
                    while not response.endswith(b"}\n"):
                        response += await stream.receive_some()
                    assert response.startswith(b"HTTP/1.1 %d " % status), query
                    assert json.loads(response.partition(b"\r\n\r\n")[2])["code"] == code, query
            await publish(broker, "a")
            assert await unharmed.seqs(1) == [1]
        await until(lambda: not broker.replica.sessions)


@pytest.mark.parametrize(("token", "status"), [("", 401), ("sub-nonsense", 401)], ids=["missing", "invalid"])
async def test_bad_token_is_final_also_for_an_event_source(token: str, status: int) -> None:
    async with running() as (_, address), events(address, "pattern=a", token=token) as source:
        assert source.status == status
        assert json.loads(await source.body())["code"] == "unauthenticated"


async def test_bad_last_event_id_is_an_error() -> None:
    async with running() as (_, address):
        for last_id in ("x", "1.2.3", "-1", "9" * 30, "1.%"):
            async with events(address, "pattern=a", last_id=last_id) as source:
                assert source.status == 400, last_id


async def test_token_in_the_query_is_accepted_and_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with running() as (broker, address):
        async with events(address, f"pattern=a&access_token={TOKEN}", token="") as source:
            await publish(broker, "a")
            assert await source.seqs(1) == [1]
        async with events(address, "pattern=a&access_token=sub-secret", token="") as source:
            assert source.status == 401
            assert b"sub-secret" not in await source.body()
    assert TOKEN not in caplog.text
    assert "sub-secret" not in caplog.text


async def test_temporary_error_lets_an_event_source_try_again() -> None:
    """Any status but 200 ends an `EventSource` for good; other clients get the error."""
    settings = config(limits=LimitSettings(sessions=1))
    async with running(settings) as (_, address), events(address, "pattern=a") as first:
        assert first.status == 200
        async with events(address, "pattern=a", accept=False) as other:
            assert other.status == 429
            assert json.loads(await other.body())["code"] == "overloaded"
        async with events(address, "pattern=a") as source:
            assert source.status == 200
            assert (await source.body()).startswith(b"retry: ")


async def test_expired_token_ends_the_stream_with_a_reason() -> None:
    settings = config(limits=LimitSettings(token_grace=0), auth=msgspec.structs.replace(CONFIG.auth, leeway=0))
    token = sign(SECRET, client_id="alice", grants=Grants.ALL, expires=time.time() + 2)
    async with running(settings) as (_, address):
        async with events(address, "pattern=a", token=token) as source:
            last = await source.next()
            assert (last.type, last.data["code"]) == ("close", CloseCode.TOKEN_EXPIRED)
            with pytest.raises(EOFError):
                await source.next()
            assert source.ended
        async with events(address, "pattern=a", token=token) as source:
            assert source.status == 401


async def test_withdrawn_pattern_leaves_the_others_and_the_last_one_ends_the_stream() -> None:
    async with running() as (broker, address), events(address, "pattern=a&pattern=b") as source:
        await publish(broker, "a", "b")
        assert await source.seqs(2) == [1, 2]
        session = session_of(broker)
        assert session.session.identity is not None
        session.update_role(Identity("alice", Grants(("a",), ()), None))
        revoked = await source.next()
        assert (revoked.type, revoked.data["pattern"]) == ("revoked", "b")
        await publish(broker, "b", "a")
        assert await source.seqs(1) == [4]
        session.update_role(Identity("alice", Grants(), None))
        assert (await source.next()).type == "revoked"
        last = await source.next()
        assert (last.type, last.data["code"]) == ("close", CloseCode.REVOKED)


async def test_draining_replica_ends_streams_within_its_window() -> None:
    settings = config(drain=DrainSettings(delay=0, window=0.5, deadline=5))
    async with running(settings) as (broker, address), events(address, "pattern=a") as source:
        await publish(broker, "a")
        assert await source.seqs(1) == [1]
        broker.stop()
        assert (await source.next()).type == "goaway"
        last = await source.next()
        assert (last.type, last.data["code"]) == ("close", CloseCode.SHUTTING_DOWN)
        with pytest.raises(EOFError):
            await source.next()
        assert source.ended
        assert source.parser.last_id == f"1.{broker.replica.log.epoch}"


async def test_client_that_does_not_read_lags_and_loses_nothing() -> None:
    """Its send queue stays within its limit, and it gets all messages when it reads."""
    limits = LimitSettings(send_queue=65_536)
    payload = "x" * 10_000
    async with running(config(limits=limits)) as (broker, address), events(address, "pattern=a") as source:
        for _ in range(500):
            await broker.publish("a", payload)
            assert session_of(broker).send_queue.size <= 2 * 65_536
        assert broker.replica.delivery.statistics().lagging == 1
        assert await source.seqs(500) == list(range(1, 501))
        assert (await source.next()).type == "live"


async def test_client_that_leaves_is_noticed_without_a_message() -> None:
    async with running() as (broker, address):
        async with events(address, "pattern=a"):
            assert broker.replica.statistics().sessions["sse"] == 1
        await until(lambda: not broker.replica.sessions)
        assert broker.replica.delivery.statistics().live == 0
        assert broker.replica.statistics().sessions["sse"] == 0


async def test_bytes_after_the_request_are_ignored() -> None:
    async with running() as (broker, address), events(address, "pattern=a") as source:
        await source.stream.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        await publish(broker, "a")
        assert await source.seqs(1) == [1]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_stream_has_no_chunks(version: str) -> None:
    """Proxies hold back events in chunks."""
    async with running() as (broker, address):
        host, _, port = address.rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            head = f"GET /events?pattern=a HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
            await stream.send_all(head.encode())
            received = b""
            while b"retry" not in received:
                received += await stream.receive_some()
            await publish(broker, "a")
            while b'"seq":1' not in received:
                received += await stream.receive_some()
        assert b"transfer-encoding" not in received.lower()
        assert b"content-length" not in received.lower()
        assert received.partition(b"\r\n\r\n")[2].startswith(b"retry: ")


async def test_head_has_no_stream_and_other_methods_are_rejected() -> None:
    async with running() as (broker, address):
        response = await request(address, "/events?pattern=a", method="HEAD")
        assert (response.status, response.headers["content-type"]) == (200, "text/event-stream")
        assert not broker.replica.sessions
        assert (await request(address, "/events?pattern=a", method="POST")).status == 405


async def test_equal_streams_share_what_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []

    def encode(*fields: Any) -> bytes:
        encoded.append(fields)
        return encode_message_event(*fields)

    monkeypatch.setattr(encoded_messages, "encode_message_event", encode)
    async with (
        running() as (broker, address),
        events(address, "pattern=a&pattern=a.*") as one,
        events(address, "pattern=a.*&pattern=a") as two,
    ):
        await publish(broker, "a", "a.b")
        assert await one.seqs(2) == await two.seqs(2) == [1, 2]
        assert len(encoded) == 2
        async with events(address, "pattern=a&pattern=a.*&since=0") as late:
            assert await late.seqs(2) == [1, 2]
