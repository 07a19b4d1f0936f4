"""The stream beneath trio-websocket, on which the library and the broker write whole frames in order."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import trio

from ...limits.cpu_scheduler import CpuScheduler
from ..graceful_close import close_gracefully
from .frame_encoder import close_frame, is_close
from .inbound_frame_limits import InboundFrames

_CHUNK = 65_536


def _ignore(size: int) -> None:
    """Count nothing."""


class FrameStream(trio.abc.Stream):
    """A connection that the library and the broker both write to, without mixing their frames.

    Everything that is sent is a whole frame (or the response of the handshake), and all of it is sent here, in order.
    While nothing is unsent, a frame goes straight to the kernel. A task in `nursery` sends what the kernel does not
    take, and nothing else writes while it runs: `writing` is true then. When it has sent everything, it calls
    `take_frames` for more, and ends if there is none.

    The unsent bytes are bounded: the result of one `take_frames` or one `write`, and control frames. The library's
    reader awaits `send_all` for each Pong before it reads on. So for a peer that pings and does not read, one Pong
    waits here, and all other pings wait in the peer's own kernel.

    A write that fails or is cancelled may have sent half a frame, so it breaks the connection: nothing more is sent,
    and `read_scope` is cancelled. Nothing is sent after a Close frame either.

    The caller that accepted the connection closes the stream beneath.
    """

    __slots__ = (
        "_closed",
        "_cpu_scheduler",
        "_fd",
        "_handshake_sent",
        "_head",
        "_inbound",
        "_nursery",
        "_on_received",
        "_progress",
        "_queue",
        "_read_scope",
        "_rest",
        "_socket",
        "_stream",
        "_take_frames",
        "broken",
        "last_progress",
        "last_received",
        "received",
        "sent",
        "unsent",
        "write_closed",
        "writing",
    )

    def __init__(
        self,
        stream: trio.abc.Stream,
        nursery: trio.Nursery,
        *,
        take_frames: Callable[[], bytes],
        read_scope: trio.CancelScope,
        on_received: Callable[[int], None] = _ignore,
        inbound: InboundFrames | None = None,
        cpu_scheduler: CpuScheduler | None = None,
        head: bytes = b"",
        rest: bytes = b"",
    ) -> None:
        """`head` is an upgrade request for the library, and `rest` the bytes after it; both are read first.

        `inbound` rewrites what is received after `head`, or closes the connection if it exceeds a limit. `on_received`
        is called with the number of bytes after each read.
        """
        self.writing = False
        """Whether the task that sends unsent bytes is running."""
        self.write_closed = False
        """Whether nothing more can be sent."""
        self.broken = False
        self.received = 0
        self._on_received = on_received
        self.sent = 0
        self.unsent = 0
        """Bytes that the kernel has not taken yet."""
        self.last_received = self.last_progress = trio.current_time()
        """Trio times of the last read, and of the last bytes that the kernel took."""
        self._stream = stream
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self._fd = self._socket.fileno() if self._socket else -1
        self._nursery = nursery
        self._take_frames = take_frames
        self._inbound = InboundFrames() if inbound is None else inbound
        self._cpu_scheduler = CpuScheduler() if cpu_scheduler is None else cpu_scheduler
        self._read_scope = read_scope
        self._head = head
        self._rest = rest
        self._handshake_sent = trio.Event()
        self._closed = False
        self._queue: list[bytes] = []
        self._progress = trio.lowlevel.ParkingLot()

    @property
    def stalled_since(self) -> float | None:
        """The Trio time since which the kernel has taken nothing, or None if nothing is unsent."""
        return self.last_progress if self.writing else None

    # For the broker

    def write(self, frames: bytes) -> None:
        """Send or queue whole frames, without waiting. Drops them after a Close frame or a failure."""
        if self.write_closed or not frames:
            return
        if not self.writing and self._fd >= 0:
            try:
                sent = os.write(self._fd, frames)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.abort()
                return
            self.sent += sent
            if sent == len(frames):
                return
            frames = frames[sent:]
        self._queue.append(frames)
        self.unsent += len(frames)
        if not self.writing:
            self.writing = True
            self.last_progress = trio.current_time()
            self._nursery.start_soon(self._write_queued)

    def close(self, frame: bytes) -> None:
        """Send what `take_frames` still returns and then a Close frame, after which nothing is sent."""
        while not self.write_closed and (frames := self._take_frames()):
            self.write(frames)
        self.write(frame)
        self.write_closed = True

    def abort(self) -> None:
        """Break the connection: nothing more is sent, and tasks that read or wait here stop.

        Call it before the stream is closed, because another connection may soon have the same file number.
        """
        self.write_closed = self.broken = True
        self._queue.clear()
        self.unsent = 0
        # Both refer to the owner of this connection, and only the garbage collector would free a reference cycle.
        self._take_frames = bytes
        self._on_received = _ignore
        self._progress.unpark_all()
        self._read_scope.cancel()

    async def wait_closed(self) -> None:
        """Wait until everything is sent and the peer has closed, too. No other task may be reading.

        This side stays open until the peer's Close frame arrives. A proxy ends both sides when one has ended, and a
        peer that is still sending then would never read why it was closed.
        """
        while self.writing and not self.broken:
            await self._progress.park()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            more = self._inbound.discard(b"")
            while self.write_closed and not (self.broken or self._inbound.close_received):
                if more:
                    await trio.lowlevel.checkpoint()
                    more = self._inbound.discard(b"")
                elif data := await self._next_bytes(_CHUNK):
                    more = self._inbound.discard(data)
                else:
                    break
        if not self.broken:
            await close_gracefully(self._stream, self._cpu_scheduler)

    async def _write_queued(self) -> None:
        try:
            while self._queue or self._queue_more():
                frames = memoryview(b"".join(self._queue))
                self._queue.clear()
                while frames:
                    frames = frames[await self._write_some(frames) :]
                    self.last_progress = trio.current_time()
                    self._progress.unpark_all()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            self.abort()
        except BaseException:
            self.abort()
            raise
        finally:
            self.writing = False
            self._progress.unpark_all()

    def _queue_more(self) -> bool:
        if self.write_closed:
            return False
        frames = self._take_frames()
        if frames:
            self._queue.append(frames)
            self.unsent += len(frames)
        return bool(frames)

    async def _write_some(self, frames: memoryview) -> int:
        if self._socket is not None:
            size = await self._socket.send(frames)
        else:
            size = min(len(frames), _CHUNK)
            await self._stream.send_all(frames[:size])
        if not self.broken:
            self.sent += size
            self.unsent -= size
        return size

    # For the library

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send one frame, and wait until it is sent. For a Close frame, `wait_closed` waits instead.

        A cancelled call still sends the frame.
        """
        if self.broken:
            raise trio.BrokenResourceError
        frame = bytes(data)
        self.write(frame)
        self._handshake_sent.set()
        if is_close(frame):
            self.write_closed = True
        else:
            end = self.sent + self.unsent
            while self.sent < end and not self.broken:
                await self._progress.park()
        if self.broken:
            raise trio.BrokenResourceError
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until nothing is unsent."""
        await trio.lowlevel.checkpoint()
        while self.writing:
            await self._progress.park()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return `head` first, and the bytes after it once the handshake is sent.

        wsproto loses bytes that it gets between an upgrade request and its response.
        """
        if self.broken:
            raise trio.BrokenResourceError
        if self._closed:
            raise trio.ClosedResourceError
        if self._head:
            await trio.lowlevel.checkpoint()
            head, self._head = self._head, b""
            return head
        if not self._handshake_sent.is_set():
            await self._handshake_sent.wait()
        while True:
            if passed := self._inbound.take():
                # The library may process all that it gets without a pause, so other peers come first.
                await self._cpu_scheduler.yield_cpu()
                return passed
            if self._inbound.close_reason is not None:
                self.close(close_frame(*self._inbound.close_reason))
                self._read_scope.cancel()
                await trio.lowlevel.checkpoint()
            # No more is buffered than one message of the size that the peer may send.
            data = await self._next_bytes(min(max_bytes or _CHUNK, self._inbound.max_message_size))
            if not data:
                return data
            self._inbound.feed(data)

    async def _next_bytes(self, max_bytes: int | None) -> bytes:
        if self._rest:
            await trio.lowlevel.checkpoint()
            data = self._rest[:max_bytes]
            self._rest = self._rest[len(data) :]
        else:
            data = bytes(await self._stream.receive_some(max_bytes))
            await self._cpu_scheduler.acquire()
        self.last_received = trio.current_time()
        self.received += len(data)
        self._on_received(len(data))
        return data

    async def aclose(self) -> None:
        """Called by the library when it has finished: it reads no more."""
        self._closed = True
        await trio.lowlevel.checkpoint()
