"""catbus.endpoints.websocket.frame_stream"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed, wrap_server_stream

from catbus.endpoints.graceful_close import close_gracefully
from catbus.endpoints.http.http_connection import MAX_BODY_SIZE
from catbus.endpoints.websocket.frame_encoder import PING, close_frame, text_header
from catbus.endpoints.websocket.frame_stream import FrameStream
from catbus.limits.cpu_scheduler import CpuScheduler
from tests.endpoints import raw_peer
from tests.endpoints.raw_peer import UPGRADE, Frame, Mixed, Peer, masked, patience


class Source:
    """A double of the send queue: frames for the writing task."""

    def __init__(self, *frames: bytes) -> None:
        self.frames = list(frames)

    def take(self) -> bytes:
        frames, self.frames = self.frames, []
        return b"".join(frames)


@asynccontextmanager
async def outbox_over(
    stream: trio.abc.Stream,
    source: Source | None = None,
    kind: type[FrameStream] = FrameStream,
    *,
    head: bytes = b"",
    rest: bytes = b"",
) -> AsyncIterator[FrameStream]:
    with patience():
        async with trio.open_nursery() as nursery:
            outbox = kind(
                stream,
                nursery,
                take_more=(source or Source()).take,
                read_scope=trio.CancelScope(),
                head=head,
                rest=rest,
            )
            try:
                yield outbox
            finally:
                outbox.abort()
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def tcp_pair(buffer: int = 8192) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """Open a TCP connection with small buffers."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    socket = trio.socket.socket()
    socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, buffer)
    await socket.connect(listener.socket.getsockname())
    async with listener, trio.SocketStream(socket) as client, await listener.accept() as server:
        server.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, buffer)
        yield server, client


def text(payload: bytes) -> bytes:
    return text_header(len(payload)) + payload


# Frames of two writers, to a slow reader


class TwoWriters(FrameStream):
    """The negative control: writes while the writing task runs."""

    def write(self, frames: bytes) -> None:
        if self.write_closed or not self.writing or not frames.startswith(b"\x81"):
            super().write(frames)
            return
        try:
            sent = os.write(self._fd, frames)
        except BlockingIOError:
            sent = 0
        self._queue.append(frames[sent:])
        self.unsent += len(frames) - sent


class Checker:
    """Check that frames are whole, in order and complete: data has numbers and a checksum, pings have numbers."""

    def __init__(self) -> None:
        self.data = 0
        self.pongs = 0

    def check(self, frame: Frame) -> None:
        if frame.opcode == raw_peer.PONG:
            if frame.payload != b"%08d" % self.pongs + b"p" * 92:
                raise Mixed(frame)
            self.pongs += 1
        else:
            number, checksum, filling = frame.payload.split(b" ", 2)
            if frame.opcode != raw_peer.TEXT or int(number) != self.data or int(checksum) != zlib.crc32(filling):
                raise Mixed(frame)
            self.data += 1

    @staticmethod
    def data_frame(number: int, filling: bytes) -> bytes:
        return text(b"%d %d %b" % (number, zlib.crc32(filling), filling))


async def talk_slowly(kind: type[FrameStream], frames: int, pings: int) -> Checker:
    """Write data frames as the broker and Pongs as trio-websocket, to a peer that reads irregularly."""
    rng = random.Random(1)
    checker = Checker()
    async with tcp_pair() as (server, client), trio.open_nursery() as nursery:
        source = Source()
        async with outbox_over(server, source, kind, head=UPGRADE) as outbox:

            async def library() -> None:
                async with trio.open_nursery() as inner:
                    websocket = await (await wrap_server_stream(inner, outbox)).accept()
                    nursery.start_soon(broker)
                    with pytest.raises(ConnectionClosed):
                        await websocket.get_message()

            async def broker() -> None:
                number = 0
                while number < frames:
                    burst = min(rng.randint(1, 4), frames - number) if outbox.unsent < 50_000 else 0
                    for _ in range(burst):
                        filling = rng.randbytes(1) * rng.randint(0, 3000)
                        source.frames.append(checker.data_frame(number, filling))
                        number += 1
                    if not outbox.writing or kind is TwoWriters:
                        outbox.write(source.take())
                    await trio.sleep(0.0002)

            async def pinger() -> None:
                for number in range(pings):
                    await client.send_all(masked(raw_peer.PING, b"%08d" % number + b"p" * 92))
                    if number % 8 == 0:
                        await trio.sleep(0.0002)

            nursery.start_soon(library)
            peer = Peer(client)
            assert (await peer.response(head=True)).status == 101
            nursery.start_soon(pinger)
            while checker.data < frames or checker.pongs < pings:
                if not peer.buffer:
                    peer.buffer = await client.receive_some(rng.randint(1, 3000))
                data, peer.buffer = peer.buffer, b""
                for frame in peer.parser.feed(data):
                    checker.check(frame)
                if rng.random() < 0.02:
                    await trio.sleep(rng.random() * 0.005)
            nursery.cancel_scope.cancel()
    return checker


async def test_frames_of_broker_and_library_are_never_mixed_or_lost() -> None:
    with trio.fail_after(60):
        checker = await talk_slowly(FrameStream, 5000, 4000)
    assert (checker.data, checker.pongs) == (5000, 4000)


async def test_checker_detects_a_second_writer() -> None:
    with trio.fail_after(60), pytest.RaisesGroup(Mixed, flatten_subgroups=True, allow_unwrapped=True):
        await talk_slowly(TwoWriters, 5000, 4000)


# Writing


async def test_bytes_that_the_kernel_takes_are_sent_at_once() -> None:
    async with tcp_pair() as (server, client), outbox_over(server) as outbox:
        outbox.write(text(b"hello"))
        assert not outbox.writing
        assert outbox.sent == 7
        assert await client.receive_some() == text(b"hello")


async def test_writing_task_sends_the_rest_and_then_takes_more_frames() -> None:
    source = Source()
    async with tcp_pair() as (server, client), outbox_over(server, source) as outbox:
        outbox.write(text(b"a" * 1_000_000))
        assert outbox.writing
        assert outbox.sent + outbox.unsent == 1_000_010
        source.frames.append(text(b"b"))
        peer = Peer(client)
        assert await peer.frame() == (raw_peer.TEXT, b"a" * 1_000_000)
        assert await peer.frame() == (raw_peer.TEXT, b"b")
        await outbox.wait_send_all_might_not_block()
        assert (outbox.writing, outbox.unsent) == (False, 0)


async def test_frame_stream_works_without_a_file_descriptor() -> None:
    ours, theirs = lockstep_stream_pair()
    source = Source()
    async with outbox_over(ours, source) as outbox:
        outbox.write(text(b"a" * 100_000))
        source.frames.append(text(b"b"))
        peer = Peer(theirs)
        assert await peer.frame() == (raw_peer.TEXT, b"a" * 100_000)
        assert await peer.frame() == (raw_peer.TEXT, b"b")


async def test_send_all_waits_for_its_own_frame_only() -> None:
    ours, theirs = lockstep_stream_pair()
    source = Source()
    async with outbox_over(ours, source) as outbox, trio.open_nursery() as nursery:
        sent = trio.Event()

        async def library() -> None:
            await outbox.send_all(b"\x8a\x00")
            sent.set()

        outbox.write(text(b"first"))
        nursery.start_soon(library)
        await wait_all_tasks_blocked()
        source.frames.append(text(b"later" * 10_000))
        assert not sent.is_set()
        assert await theirs.receive_some(7) == text(b"first")
        assert await theirs.receive_some(2) == b"\x8a\x00"
        await wait_all_tasks_blocked()
        assert sent.is_set()
        assert outbox.writing


async def test_pings_of_a_peer_that_does_not_read_queue_one_pong(autojump_clock: MockClock) -> None:
    ours, theirs = lockstep_stream_pair()
    async with outbox_over(ours, head=UPGRADE) as outbox, trio.open_nursery() as nursery:

        async def library() -> None:
            async with trio.open_nursery() as inner:
                await (await wrap_server_stream(inner, outbox)).accept()

        nursery.start_soon(library)
        await Peer(theirs).response(head=True)
        with trio.move_on_after(1) as limit:
            for _ in range(1000):
                await theirs.send_all(masked(raw_peer.PING, b"p" * 125))
        assert limit.cancelled_caught
        assert outbox.unsent == 127
        nursery.cancel_scope.cancel()


async def test_cancelled_send_all_sends_its_whole_frame() -> None:
    ours, theirs = lockstep_stream_pair()
    async with outbox_over(ours) as outbox:
        with trio.move_on_after(0):
            await outbox.send_all(b"\x8a\x02hi")
        outbox.write(PING)
        peer = Peer(theirs)
        assert await peer.frame() == (raw_peer.PONG, b"hi")
        assert await peer.frame() == (raw_peer.PING, b"")
        assert not outbox.broken


async def test_nothing_follows_a_close_frame() -> None:
    source = Source(text(b"what was still to be said"))
    async with tcp_pair() as (server, client), outbox_over(server, source) as outbox:
        outbox.close(close_frame(4000, ""))
        source.frames.append(text(b"late"))
        outbox.write(text(b"later"))
        await outbox.send_all(b"\x8a\x00")
        peer = Peer(client)
        assert (await peer.frame()).payload == b"what was still to be said"
        assert (await peer.frame()).code == 4000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.wait_closed)
            await peer.send(raw_peer.close_frame(4000))
            assert await peer.at_end()
            await client.send_eof()


async def test_nothing_follows_a_close_frame_of_the_library() -> None:
    async with tcp_pair() as (server, client), outbox_over(server) as outbox:
        await outbox.send_all(close_frame(1000, ""))
        outbox.write(text(b"later"))
        assert outbox.sent == 4
        assert (await Peer(client).frame()).code == 1000


async def test_failed_write_breaks_the_connection() -> None:
    async with tcp_pair() as (server, client), outbox_over(server) as outbox:
        reading = outbox._read_scope
        client.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        await client.aclose()
        with trio.fail_after(5):
            while not outbox.broken:
                outbox.write(PING)
                await trio.lowlevel.checkpoint()
        assert reading.cancel_called
        outbox.write(PING)
        with pytest.raises(trio.BrokenResourceError):
            await outbox.send_all(PING)
        with pytest.raises(trio.BrokenResourceError):
            await outbox.receive_some()
        await outbox.wait_closed()


async def test_cancelled_writing_task_breaks_the_connection() -> None:
    async with tcp_pair() as (server, _):
        async with trio.open_nursery() as nursery:
            outbox = FrameStream(server, nursery, take_more=Source().take, read_scope=trio.CancelScope())
            outbox.write(text(b"a" * 1_000_000))
            assert outbox.writing
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert outbox.broken
        assert not outbox.writing
        outbox.write(PING)
        assert outbox.unsent == 0


async def test_aborted_frame_stream_does_not_use_its_file_descriptor() -> None:
    async with tcp_pair() as (server, client), outbox_over(server) as outbox:
        outbox.abort()
        outbox.write(PING)
        await server.aclose()
        assert await client.receive_some() == b""


async def test_progress_and_stalls_are_distinguished(autojump_clock: MockClock) -> None:
    ours, theirs = lockstep_stream_pair()
    async with outbox_over(ours) as outbox:
        assert outbox.stalled_since is None
        await trio.sleep(5)
        outbox.write(text(b"a" * 100_000))
        began = trio.current_time()
        assert outbox.stalled_since == began
        await trio.sleep(10)
        assert outbox.stalled_since == began
        await Peer(theirs).frame()
        await wait_all_tasks_blocked()
        assert outbox.stalled_since is None
        assert outbox.last_progress == began + 10


# Reading


async def test_bytes_after_the_request_are_read_after_the_response() -> None:
    ours, theirs = memory_stream_pair()
    await theirs.send_all(b"three")
    async with outbox_over(ours, head=b"one", rest=b"two") as outbox:
        assert await outbox.receive_some() == b"one"
        with trio.move_on_after(0) as too_early:
            await outbox.receive_some()
        assert too_early.cancelled_caught
        await outbox.send_all(b"HTTP/1.1 101 \r\n\r\n")
        assert [await outbox.receive_some(2), await outbox.receive_some(2)] == [b"tw", b"o"]
        assert await outbox.receive_some() == b"three"
        assert outbox.received == 8


async def test_received_bytes_are_counted(autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    async with outbox_over(ours) as outbox:
        await outbox.send_all(b"HTTP/1.1 101 \r\n\r\n")
        await trio.sleep(3)
        await theirs.send_all(b"x")
        await outbox.receive_some()
        assert outbox.last_received == trio.current_time()


async def test_nothing_is_read_after_the_library_closed() -> None:
    ours, theirs = memory_stream_pair()
    async with outbox_over(ours) as outbox:
        await outbox.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await outbox.receive_some()
        outbox.write(PING)
        assert (await Peer(theirs).frame()).opcode == raw_peer.PING


async def test_graceful_close_ends_when_the_peer_closes() -> None:
    async with tcp_pair() as (server, client):
        await client.send_all(b"never read by the server" * 10)
        await server.send_all(b"goodbye")
        closed = trio.Event()

        async def close() -> None:
            await close_gracefully(server, CpuScheduler())
            closed.set()

        with patience():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(close)
                assert await client.receive_some() == b"goodbye"
                assert await client.receive_some() == b""
                await client.send_all(b"still talking")
                await wait_all_tasks_blocked()
                assert not closed.is_set()
                await client.aclose()
                await closed.wait()


class CountingScheduler(CpuScheduler):
    count = 0

    async def yield_cpu(self) -> None:
        self.count += 1
        await super().yield_cpu()


async def test_graceful_close_lets_others_run_and_reads_no_more_than_a_body() -> None:
    async with tcp_pair() as (server, client):
        cpu_scheduler, sent = CountingScheduler(), 0

        async def go_on() -> None:
            nonlocal sent
            with suppress(trio.BrokenResourceError):
                while True:
                    await client.send_all(bytes(65_536))
                    sent += 65_536

        with patience():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(go_on)
                await close_gracefully(server, cpu_scheduler)
                await server.aclose()
        assert MAX_BODY_SIZE < sent < 4 * MAX_BODY_SIZE
        assert cpu_scheduler.count > MAX_BODY_SIZE // 65_536
