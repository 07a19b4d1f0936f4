"""The stream under trio-websocket: one outbox of whole frames and one writer at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import trio

from ...limits.cpu_scheduler import CpuScheduler
from ..graceful_close import close_gently
from .frame_encoder import close_frame, is_close
from .inbound_frames import InboundFrames

_CHUNK = 65_536


class FrameStream(trio.abc.Stream):
    """A connection that the library and the broker both write to, without mixing their frames.

    Everything that is sent is a whole frame (or the answer to the handshake), and all of it passes through here, in
    order. While nothing waits, a frame goes straight to the kernel. What the kernel does not take is left to a task
    in `nursery`, and while that is at work nobody writes beside it: `busy` says so. When it has sent all that waited
    it asks `refill` for what has gathered meanwhile, and it ends when there is none.

    How much can wait: what one `refill` or one `write` gave, and control frames. The library's reader awaits `send_all`
    for each Pong before it reads on, so a peer that pings and does not read has one Pong waiting here and everything
    else in its own kernel.

    A write that fails or is cancelled may have sent half a frame, so it breaks the connection: nothing is sent any
    more, and `reading` is cancelled. Nothing is sent after a Close frame either.

    Closing the connection underneath is left to whoever accepted it.
    """

    __slots__ = (
        "_answered",
        "_cpu_scheduler",
        "_ended",
        "_fd",
        "_head",
        "_inbound",
        "_moved",
        "_nursery",
        "_queue",
        "_reading",
        "_refill",
        "_rest",
        "_socket",
        "_stream",
        "broken",
        "busy",
        "last_heard",
        "last_moved",
        "on_received",
        "received",
        "sent",
        "shut",
        "waiting",
    )

    def __init__(
        self,
        stream: trio.abc.Stream,
        nursery: trio.Nursery,
        *,
        refill: Callable[[], bytes],
        reading: trio.CancelScope,
        inbound: InboundFrames | None = None,
        cpu_scheduler: CpuScheduler | None = None,
        head: bytes = b"",
        rest: bytes = b"",
    ) -> None:
        """`head` is a request for the library to answer, and `rest` what followed it; both are read first.

        `inbound` makes what the library reads of what comes after `head`, or has the connection closed over it.
        """
        self.busy = False
        """Whether the writer is at work."""
        self.shut = False
        """Whether anything more can be sent."""
        self.broken = False
        self.received = 0
        self.on_received: Callable[[int], None] | None = None
        """Called with the number of bytes whenever some have been received."""
        self.sent = 0
        self.waiting = 0
        """Bytes that the kernel has not taken yet."""
        self.last_heard = self.last_moved = trio.current_time()
        """Trio times: when anything was received, and when the writer last got rid of anything."""
        self._stream = stream
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self._fd = self._socket.fileno() if self._socket else -1
        self._nursery = nursery
        self._refill = refill
        self._inbound = InboundFrames() if inbound is None else inbound
        self._cpu_scheduler = CpuScheduler() if cpu_scheduler is None else cpu_scheduler
        self._reading = reading
        self._head = head
        self._rest = rest
        self._answered = trio.Event()
        self._ended = False
        self._queue: list[bytes] = []
        self._moved = trio.lowlevel.ParkingLot()

    @property
    def stalled_since(self) -> float | None:
        """Since when the writer has been trying in vain, as a Trio time."""
        return self.last_moved if self.busy else None

    # For the broker

    def write(self, frames: bytes) -> None:
        """Send whole frames, or have them sent, without waiting. Drops them when the connection is shut."""
        if self.shut or not frames:
            return
        if not self.busy and self._fd >= 0:
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
        self.waiting += len(frames)
        if not self.busy:
            self.busy = True
            self.last_moved = trio.current_time()
            self._nursery.start_soon(self._write_on)

    def close(self, frame: bytes) -> None:
        """Send what `refill` still has and then a Close frame, after which nothing is sent."""
        while not self.shut and (frames := self._refill()):
            self.write(frames)
        self.write(frame)
        self.shut = True

    def abort(self) -> None:
        """Give the connection up: nothing more is sent, and whoever reads from it or waits for it stops.

        Due before the stream is closed, whose file number may soon be another connection's.
        """
        self.shut = self.broken = True
        self._queue.clear()
        self.waiting = 0
        # Both lead back to who has this connection, and only the garbage collector would free a circle.
        self._refill = bytes
        self.on_received = None
        self._moved.unpark_all()
        self._reading.cancel()

    async def finish(self) -> None:
        """Wait until all has been sent and the peer has closed, too. Nobody else may be reading.

        This side of the connection stays open until the peer's Close frame has come. A proxy ends both sides when one
        has ended, and a peer that still sends then never reads why it was closed.
        """
        while self.busy and not self.broken:
            await self._moved.park()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            more = self._inbound.skip(b"")
            while self.shut and not (self.broken or self._inbound.ended):
                if more:
                    await trio.lowlevel.checkpoint()
                    more = self._inbound.skip(b"")
                elif data := await self._next_bytes(_CHUNK):
                    more = self._inbound.skip(data)
                else:
                    break
        if not self.broken:
            await close_gently(self._stream, self._cpu_scheduler)

    async def _write_on(self) -> None:
        try:
            while self._queue or self._refilled():
                frames = memoryview(b"".join(self._queue))
                self._queue.clear()
                while frames:
                    frames = frames[await self._write_some(frames) :]
                    self.last_moved = trio.current_time()
                    self._moved.unpark_all()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            self.abort()
        except BaseException:
            self.abort()
            raise
        finally:
            self.busy = False
            self._moved.unpark_all()

    def _refilled(self) -> bool:
        if self.shut:
            return False
        frames = self._refill()
        if frames:
            self._queue.append(frames)
            self.waiting += len(frames)
        return bool(frames)

    async def _write_some(self, frames: memoryview) -> int:
        if self._socket is not None:
            size = await self._socket.send(frames)
        else:
            size = min(len(frames), _CHUNK)
            await self._stream.send_all(frames[:size])
        if not self.broken:
            self.sent += size
            self.waiting -= size
        return size

    # For the library

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send one frame, and wait until it has been sent, except for a Close frame, which is waited for by `finish`.

        Cancelling it does not take the frame back.
        """
        if self.broken:
            raise trio.BrokenResourceError
        frame = bytes(data)
        self.write(frame)
        self._answered.set()
        if is_close(frame):
            self.shut = True
        else:
            end = self.sent + self.waiting
            while self.sent < end and not self.broken:
                await self._moved.park()
        if self.broken:
            raise trio.BrokenResourceError
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until nothing waits."""
        await trio.lowlevel.checkpoint()
        while self.busy:
            await self._moved.park()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Read: `head` first, and what follows it once it has been answered.

        wsproto loses bytes that it is given between a request for a WebSocket and its answer.
        """
        if self.broken:
            raise trio.BrokenResourceError
        if self._ended:
            raise trio.ClosedResourceError
        if self._head:
            await trio.lowlevel.checkpoint()
            head, self._head = self._head, b""
            return head
        if not self._answered.is_set():
            await self._answered.wait()
        while True:
            if passed := self._inbound.take():
                # The library may take all that it gets in one go: somebody else's turn comes first.
                await self._cpu_scheduler.yield_cpu()
                return passed
            if self._inbound.refused is not None:
                self.close(close_frame(*self._inbound.refused))
                self._reading.cancel()
                await trio.lowlevel.checkpoint()
            # What is kept is no more than one message of those that the peer may send.
            data = await self._next_bytes(min(max_bytes or _CHUNK, self._inbound.largest))
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
        self.last_heard = trio.current_time()
        self.received += len(data)
        if self.on_received is not None:
            self.on_received(len(data))
        return data

    async def aclose(self) -> None:
        """The library has done with the connection: it reads no more."""
        self._ended = True
        await trio.lowlevel.checkpoint()
