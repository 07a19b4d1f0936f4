"""catbus.endpoints.websocket.websocket_connection"""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from catbus.auth.tokens import Authenticator
from catbus.close_codes import CloseCode
from catbus.config import Config, LimitSettings
from catbus.delivery.encoded_messages import EncodedMessages
from catbus.delivery.send_queue import SendQueue
from catbus.endpoints.connection_registry import ConnectionRegistry
from catbus.endpoints.queue_writer import STALL_TIMEOUT, WRITE_SIZE
from catbus.endpoints.replica_interface import ReplicaInterface
from catbus.endpoints.websocket.frame_stream import FrameStream
from catbus.endpoints.websocket.websocket_connection import (
    CLOSE_TIMEOUT,
    WebSocketServerConnection,
    serve_websocket,
)
from catbus.limits.unauthenticated import UNAUTHENTICATED_OBJECT_BYTES
from catbus.log import Entry, MemoryLog
from catbus.protocol.wire_messages import ProtocolVersion
from catbus.replica import Replica
from catbus.session.driver import SessionDriver
from catbus.session.state_machine import Session
from tests.endpoints import raw_peer
from tests.endpoints.fake_replica import FakeClient, FakeReplica
from tests.endpoints.raw_peer import UPGRADE, Peer, close_frame, masked, patience


class Served:
    """Both ends of a served connection."""

    def __init__(self, replica: ReplicaInterface, registry: ConnectionRegistry, peer: Peer, ended: trio.Event) -> None:
        self.replica = replica
        self.registry = registry
        self.peer = peer
        self.ended = ended

    @property
    def client(self) -> FakeClient:
        assert isinstance(self.replica, FakeReplica)
        return self.replica.sessions[0]


@asynccontextmanager
async def served(
    replica: ReplicaInterface | None = None,
    *,
    pair: Callable[[], tuple[Any, Any]] = memory_stream_pair,
    rest: bytes = b"",
    registry: ConnectionRegistry | None = None,
) -> AsyncIterator[Served]:
    replica, registry, ended = replica or FakeReplica(), registry or ConnectionRegistry(), trio.Event()
    ours, theirs = pair()
    settings = replica.config.websocket

    async def serve() -> None:
        await serve_websocket(replica, registry, ours, UPGRADE, rest, lambda: None)
        await ours.aclose()
        ended.set()

    with patience():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(registry.check_connections, min(settings.ping_interval, settings.silence) / 4)
            nursery.start_soon(serve)
            peer = Peer(theirs)
            assert (await peer.response(head=True)).status == 101
            yield Served(replica, registry, peer, ended)
            nursery.cancel_scope.cancel()


def says(reaction: Callable[[FakeClient, bytes], Any]) -> Callable[[FakeClient, bytes], Awaitable[None]]:
    async def on_receive(client: FakeClient, data: bytes) -> None:
        reaction(client, data)

    return on_receive


async def test_closed_connection_leaves_no_reference_cycles(nursery: trio.Nursery) -> None:
    replica = Replica(Config(), MemoryLog(), Authenticator([]))
    nursery.start_soon(replica.flusher.run)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        async with served(replica) as it:
            await it.peer.send(masked(raw_peer.TEXT, b'{"type":"ping","seq":1}{"type":"history","pattern":"a"}'))
            assert b"pong" in (await it.peer.frame()).payload
            await it.peer.send(close_frame(1000))
            await it.ended.wait()
        gc.collect()
        kept = [
            type(each)
            for each in gc.garbage
            if isinstance(each, SessionDriver | WebSocketServerConnection | FrameStream | SendQueue | Session)
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert kept == []


# Messages


@pytest.mark.parametrize("opcode", [raw_peer.TEXT, raw_peer.BINARY])
async def test_messages_reach_the_session_and_replies_come_back(opcode: int) -> None:
    async with served() as it:
        await it.peer.send(masked(opcode, "grüße".encode()))
        assert await it.peer.frame() == (raw_peer.TEXT, "grüße\n".encode())
        assert it.client.received == ["grüße".encode()]


async def test_message_may_have_many_fragments_with_pings_between() -> None:
    async with served() as it:
        await it.peer.send(masked(raw_peer.TEXT, b"a", fin=False) + masked(raw_peer.PING, b"?") + masked(0, b"b"))
        assert await it.peer.frame() == (raw_peer.PONG, b"?")
        assert await it.peer.frame() == (raw_peer.TEXT, b"ab\n")


async def test_frames_that_came_with_the_request_are_not_lost() -> None:
    async with served(rest=masked(raw_peer.TEXT, b"early")) as it:
        assert await it.peer.frame() == (raw_peer.TEXT, b"early\n")


async def test_flush_sends_the_send_queue() -> None:
    async with served() as it:
        await wait_all_tasks_blocked()
        it.client.send_queue.put(b"one\n")
        it.client.send_queue.put(b"two\n")
        it.client.send_queue.writer.flush()
        it.client.send_queue.writer.flush()
        assert await it.peer.frame() == (raw_peer.TEXT, b"one\ntwo\n")


async def test_flush_does_nothing_while_the_task_is_writing() -> None:
    async with served(pair=lockstep_stream_pair) as it:
        await wait_all_tasks_blocked()
        send_queue = it.client.send_queue
        send_queue.put(b"a" * 1000)
        send_queue.writer.flush()
        send_queue.put(b"b" * 1000)
        send_queue.writer.flush()
        assert send_queue
        assert await it.peer.frame() == (raw_peer.TEXT, b"a" * 1000)
        assert await it.peer.frame() == (raw_peer.TEXT, b"b" * 1000)


async def test_first_version_client_gets_one_frame_per_line() -> None:
    replica = FakeReplica()
    replica.on_receive = says(lambda client, data: [client.send_queue.put(b"1\n"), client.send_queue.put(b"2\n")])
    async with served(replica) as it:
        await wait_all_tasks_blocked()
        it.client.send_queue.protocol = ProtocolVersion.FIRST
        await it.peer.send(masked(raw_peer.TEXT, b"?"))
        assert [await it.peer.frame(), await it.peer.frame()] == [(raw_peer.TEXT, b"1"), (raw_peer.TEXT, b"2")]


# Closing


async def test_close_flushes_first_and_then_waits_for_the_peer(autojump_clock: MockClock) -> None:
    async with served() as it:
        await wait_all_tasks_blocked()
        client = it.client
        client.send_queue.put(b"goodbye\n")
        client.close(CloseCode.SHUTTING_DOWN, "stopping")
        assert await it.peer.frame() == (raw_peer.TEXT, b"goodbye\n")
        frame = await it.peer.frame()
        assert (frame.code, frame.payload[2:]) == (4504, b"stopping")
        assert client.left
        await trio.sleep(CLOSE_TIMEOUT / 2)
        assert not it.ended.is_set()
        await it.peer.send(close_frame(4504))
        assert await it.peer.at_end()
        await it.peer.stream.aclose()
        await it.ended.wait()
        assert trio.current_time() < CLOSE_TIMEOUT


async def test_peer_that_does_not_answer_a_close_is_disconnected(autojump_clock: MockClock) -> None:
    async with served() as it:
        await wait_all_tasks_blocked()
        began = trio.current_time()
        it.client.close(CloseCode.SHUTTING_DOWN, "stopping")
        await it.ended.wait()
        assert trio.current_time() == pytest.approx(began + CLOSE_TIMEOUT)


async def test_closing_peer_that_does_not_read_is_disconnected(autojump_clock: MockClock) -> None:
    async with served(pair=lockstep_stream_pair) as it:
        await wait_all_tasks_blocked()
        it.client.send_queue.put(b"a" * 100_000)
        it.client.send_queue.writer.flush()
        it.client.close(CloseCode.SHUTTING_DOWN, "stopping")
        began = trio.current_time()
        await it.ended.wait()
        assert trio.current_time() == pytest.approx(began + CLOSE_TIMEOUT)


async def test_messages_during_the_close_are_read_and_dropped(autojump_clock: MockClock) -> None:
    async with served() as it:
        await wait_all_tasks_blocked()
        it.client.close(CloseCode.SHUTTING_DOWN, "stopping")
        assert (await it.peer.frame()).opcode == raw_peer.CLOSE
        for number in range(10):
            await it.peer.send(masked(raw_peer.TEXT, b"%d" % number) + masked(raw_peer.PING, b"?"))
        await it.peer.send(close_frame(1000))
        assert await it.peer.at_end()
        await it.peer.stream.aclose()
        await it.ended.wait()
        assert it.client.received == []
        assert trio.current_time() < CLOSE_TIMEOUT


async def test_session_that_waits_for_room_can_be_closed(autojump_clock: MockClock) -> None:
    replica = FakeReplica()

    async def wait(client: FakeClient, data: bytes) -> None:
        await trio.sleep_forever()

    replica.on_receive = wait
    async with served(replica) as it:
        await it.peer.send(masked(raw_peer.TEXT, b"x") * 5)
        await wait_all_tasks_blocked()
        it.client.close(CloseCode.SHUTTING_DOWN, "stopping")
        assert (await it.peer.frame()).code == 4504


async def test_close_of_a_peer_is_answered(autojump_clock: MockClock) -> None:
    async with served() as it:
        await it.peer.send(masked(raw_peer.TEXT, b"last") + close_frame(1001))
        assert await it.peer.frame() == (raw_peer.TEXT, b"last\n")
        assert (await it.peer.frame()).code == 1001
        assert await it.peer.at_end()
        await it.peer.stream.aclose()
        await it.ended.wait()
        assert it.client.left
        assert it.registry.internal_errors == 0


async def test_frames_after_a_close_affect_nothing(autojump_clock: MockClock) -> None:
    async with served() as it:
        await it.peer.send(
            close_frame(1000) + masked(raw_peer.PING, b"?") + masked(raw_peer.TEXT, b"x") + close_frame(1000)
        )
        assert (await it.peer.frame()).code == 1000
        assert await it.peer.at_end()
        await it.ended.wait()
        assert it.registry.internal_errors == 0


async def test_vanished_peer_is_detected() -> None:
    async with served() as it:
        await wait_all_tasks_blocked()
        await it.peer.stream.aclose()
        await it.ended.wait()
        assert it.client.left
        assert it.registry.internal_errors == 0


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (masked(raw_peer.TEXT, b"\xff"), 1007),
        (b"\x83\x80\0\0\0\0", 1002),
        (masked(0, b"continues nothing"), 1002),
        (b"\x81\x01x", 1002),
    ],
    ids=["not UTF-8", "unknown opcode", "stray continuation", "not masked"],
)
async def test_protocol_violation_is_answered_with_its_code(data: bytes, code: int, autojump_clock: MockClock) -> None:
    async with served() as it:
        await it.peer.send(data)
        assert (await it.peer.frame()).code == code
        assert await it.peer.at_end()
        await it.ended.wait()
        assert it.client.left
        assert it.registry.internal_errors == 0


async def test_too_long_message_is_rejected(autojump_clock: MockClock) -> None:
    async with served(FakeReplica(Config(limits=LimitSettings(message_size=100)))) as it:
        await it.peer.send(masked(raw_peer.TEXT, b"x" * 1600))
        assert await it.peer.frame() == (raw_peer.TEXT, b"x" * 1600 + b"\n")
        await it.peer.send(masked(raw_peer.TEXT, b"x" * 1601))
        assert (await it.peer.frame()).code == 1009
        assert await it.peer.at_end()
        await it.ended.wait()
        assert len(it.client.received) == 1


@pytest.mark.parametrize("more", [masked(raw_peer.PING, b"?"), masked(raw_peer.TEXT, b"x" * 1601)])
async def test_frames_after_a_too_long_message_affect_nothing(more: bytes, autojump_clock: MockClock) -> None:
    async with served(FakeReplica(Config(limits=LimitSettings(message_size=100)))) as it:
        await it.peer.send(masked(raw_peer.TEXT, b"x" * 1601) + more)
        assert (await it.peer.frame()).code == 1009
        assert await it.peer.at_end()
        await it.ended.wait()
        assert it.client.left
        assert it.registry.internal_errors == 0


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (masked(raw_peer.TEXT, b"x" * (UNAUTHENTICATED_OBJECT_BYTES + 1)), 1009),
        (masked(raw_peer.TEXT, b"\xff" * 1600), 1007),
    ],
    ids=["too long", "not UTF-8"],
)
async def test_sending_peer_receives_the_close_reason(message: bytes, code: int, autojump_clock: MockClock) -> None:
    """A proxy between them would end both sides when the broker ends its own."""
    async with served(FakeReplica(Config(limits=LimitSettings(message_size=100)))) as it:
        await it.peer.send(message[:20])
        assert (await it.peer.frame()).code == code
        began = trio.current_time()
        with trio.move_on_after(CLOSE_TIMEOUT / 2) as waiting:
            await it.peer.at_end()
        assert waiting.cancelled_caught
        await it.peer.send(message[20:] + raw_peer.close_frame(code))
        assert await it.peer.at_end()
        assert trio.current_time() - began == CLOSE_TIMEOUT / 2
        await it.ended.wait()


# Internal errors


async def test_failed_session_closes_its_own_connection_only(autojump_clock: MockClock) -> None:
    replica = FakeReplica()

    def fail(client: FakeClient, data: bytes) -> None:
        if data == b"bug":
            client.send_queue.put(b"said before\n")
            raise RuntimeError("a bug")
        client.send_queue.put(data)

    replica.on_receive = says(fail)
    async with served(replica) as it, served(replica) as other:
        await it.peer.send(masked(raw_peer.TEXT, b"bug"))
        assert (await it.peer.frame()).payload == b"said before\n"
        frame = await it.peer.frame()
        assert (frame.code, frame.payload[2:]) == (4500, b"internal error")
        assert it.registry.internal_errors == 1
        await other.peer.send(masked(raw_peer.TEXT, b"fine"))
        assert (await other.peer.frame()).payload == b"fine"
        await it.ended.wait()


async def test_failed_replica_closes_the_connection(autojump_clock: MockClock) -> None:
    replica = FakeReplica()

    def fail(*args: object, **names: object) -> Any:
        raise RuntimeError("a bug")

    replica.open_session = fail  # type: ignore[method-assign]
    async with served(replica) as it:
        assert (await it.peer.frame()).code == 4500
        assert it.registry.internal_errors == 1
        await it.ended.wait()


async def test_flush_never_raises(autojump_clock: MockClock) -> None:
    async with served() as it:
        await wait_all_tasks_blocked()
        it.client.send_queue.offer(EncodedMessages("a", [Entry(1, 5, cast(Any, b"not text"), b"1", None)]))
        it.client.send_queue.writer.flush()
        await it.ended.wait()
        assert it.registry.internal_errors == 1
        assert it.client.left


async def test_stalled_handshake_is_closed(autojump_clock: MockClock) -> None:
    replica, registry = FakeReplica(), ConnectionRegistry()
    ours, theirs = memory_stream_pair()
    await theirs.send_all(b"what will never be answered")
    await serve_websocket(replica, registry, ours, b"GET /ws HTTP/1.1\r\n", b"", lambda: None)
    assert 10 <= trio.current_time() < 13
    assert replica.sessions == []


# Keep-alive


async def test_silent_peer_that_answers_pings_stays_connected(autojump_clock: MockClock) -> None:
    async with served() as it:
        for _ in range(10):
            began = trio.current_time()
            assert await it.peer.frame() == (raw_peer.PING, b"")
            assert 15 <= trio.current_time() - began <= 25
            await it.peer.send(masked(raw_peer.PONG, b""))
        assert it.client.closing is None


async def test_active_peer_is_not_pinged(autojump_clock: MockClock) -> None:
    async with served() as it:
        for _ in range(30):
            await trio.sleep(10)
            await it.peer.send(masked(raw_peer.TEXT, b"x"))
            assert await it.peer.frame() == (raw_peer.TEXT, b"x\n")


async def test_silent_peer_is_closed(autojump_clock: MockClock) -> None:
    async with served() as it:
        pings = 0
        while (frame := await it.peer.frame()).opcode == raw_peer.PING:
            pings += 1
        assert frame.code == CloseCode.UNRESPONSIVE
        assert 60 <= trio.current_time() <= 66
        assert pings == 2
        await it.ended.wait()
        assert trio.current_time() <= 70


async def test_peer_that_reads_nothing_is_disconnected(autojump_clock: MockClock) -> None:
    async with served(pair=lockstep_stream_pair) as it:
        await wait_all_tasks_blocked()
        it.client.send_queue.put(b"a" * 100_000)
        it.client.send_queue.writer.flush()
        began = trio.current_time()
        while not it.ended.is_set():
            with trio.move_on_after(7):
                # It does not count as silent.
                await it.peer.send(masked(raw_peer.PONG, b""))
                await it.ended.wait()
        assert STALL_TIMEOUT <= trio.current_time() - began <= STALL_TIMEOUT + 6
        assert it.client.left


async def test_stalled_clients_are_logged_at_a_limited_rate(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    registry = ConnectionRegistry()
    with caplog.at_level(logging.INFO):
        for _ in range(20):
            async with served(pair=lockstep_stream_pair, registry=registry) as it:
                await wait_all_tasks_blocked()
                it.client.send_queue.put(b"a" * 100_000)
                it.client.send_queue.writer.flush()
                [connection] = registry.websockets
                connection.check(trio.current_time() + STALL_TIMEOUT)
                await it.ended.wait()
    assert [record.getMessage() for record in caplog.records] == ["a client does not read"]


async def test_unsent_bytes_of_a_peer_that_does_not_read_are_bounded(autojump_clock: MockClock) -> None:
    async with served(pair=lockstep_stream_pair) as it:
        await wait_all_tasks_blocked()
        writer = it.client.send_queue.writer
        assert isinstance(writer, WebSocketServerConnection)
        for _ in range(20):
            it.client.send_queue.put(b"a" * 20_000 + b"\n")
        writer.flush()
        received = b""
        while len(received) < 20 * 20_001:
            assert writer.frame_stream.unsent <= WRITE_SIZE + 20_100
            received += (await it.peer.frame()).payload
            await wait_all_tasks_blocked()
        assert received == (b"a" * 20_000 + b"\n") * 20


async def test_unread_replies_count_until_they_are_sent(autojump_clock: MockClock) -> None:
    async with served(pair=lockstep_stream_pair) as it:
        await wait_all_tasks_blocked()
        send_queue = it.client.send_queue
        budget, room = send_queue._budget, trio.Event()
        budget.for_replies = 100_000
        send_queue.put(b"a" * 300_000 + b"\n")
        send_queue.writer.flush()
        assert not send_queue
        assert send_queue.full
        send_queue.when_emptied(room.set)
        send_queue.put(b"b\n")
        assert (await it.peer.frame()).payload == b"a" * 300_000 + b"\n"
        assert (await it.peer.frame()).payload == b"b\n"
        await room.wait()
        await wait_all_tasks_blocked()
        assert budget.replies == 0


async def test_send_queue_is_sent_before_the_close(autojump_clock: MockClock) -> None:
    async with served(pair=lockstep_stream_pair) as it:
        await wait_all_tasks_blocked()
        for _ in range(10):
            it.client.send_queue.put(b"a" * 30_000 + b"\n")
        it.client.close(CloseCode.SHUTTING_DOWN, "over")
        received = b""
        while (frame := await it.peer.frame()).opcode == raw_peer.TEXT:
            received += frame.payload
        assert frame.code == CloseCode.SHUTTING_DOWN
        assert len(received) == 10 * 30_001


async def test_slow_reader_does_not_count_as_silent(autojump_clock: MockClock) -> None:
    async with served(pair=lockstep_stream_pair) as it:
        await wait_all_tasks_blocked()
        for _ in range(20):
            it.client.send_queue.put(b"a" * 60_000)
        it.client.send_queue.writer.flush()
        for _ in range(20):
            await trio.sleep(20)
            assert (await it.peer.frame()).opcode == raw_peer.TEXT
        # Reading everything counts as a sign of life, too.
        began = trio.current_time()
        assert (await it.peer.frame()).opcode == raw_peer.PING
        assert trio.current_time() - began <= 25
        assert not it.client.left


async def test_peer_that_reads_after_a_pause_is_pinged_first(
    autojump_clock: MockClock,
) -> None:
    async with served(pair=lockstep_stream_pair) as it:
        await trio.sleep(15)
        it.client.send_queue.put(b"a" * 60_000)
        it.client.send_queue.writer.flush()
        await trio.sleep(STALL_TIMEOUT - 5)
        # Its last bytes are more than a minute old, but no ping was possible since.
        assert (await it.peer.frame()).opcode == raw_peer.TEXT
        began = trio.current_time()
        assert (await it.peer.frame()).opcode == raw_peer.PING
        assert 15 <= trio.current_time() - began <= 25
        await it.peer.send(masked(raw_peer.PONG, b""))
        assert (await it.peer.frame()).opcode == raw_peer.PING
        assert not it.client.left
