"""The stream beneath trio-websocket, on which the library and the broker write whole frames in order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from ...limits.cpu_scheduler import CpuScheduler
from ..graceful_close import close_gracefully
from ..socket_writer import SocketWriter
from .frame_encoder import close_frame, is_close
from .inbound_frame_limits import InboundFrames

_CHUNK = 65_536


def _ignore(size: int) -> None:
    """Count nothing."""


class FrameStream(SocketWriter, trio.abc.Stream):
    """A connection that the library and the broker both write to, without mixing their frames.

    Everything that is sent is a whole frame (or the response of the handshake), and all of it is sent by `write`, in
    order. Nothing is sent after a Close frame. Few control frames are unsent at a time: the library's reader awaits
    `send_all` for each Pong before it reads on. So for a peer that pings and does not read, one Pong waits here, and
    all other pings wait in the peer's own kernel.
    """

    __slots__ = (
        "_closed",
        "_cpu_scheduler",
        "_handshake_sent",
        "_head",
        "_inbound",
        "_on_received",
        "_rest",
        "last_received",
        "received",
    )

    def __init__(
        self,
        stream: trio.abc.Stream,
        nursery: trio.Nursery,
        *,
        take_more: Callable[[], bytes],
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
        super().__init__(stream, nursery, take_more=take_more, read_scope=read_scope)
        self.received = 0
        self.last_received = self.last_progress
        """Trio time of the last read."""
        self._on_received = on_received
        self._inbound = InboundFrames() if inbound is None else inbound
        self._cpu_scheduler = CpuScheduler() if cpu_scheduler is None else cpu_scheduler
        self._head = head
        self._rest = rest
        self._handshake_sent = trio.Event()
        self._closed = False

    # For the broker

    def abort(self) -> None:
        """Break the connection, as `SocketWriter.abort` does."""
        self._on_received = _ignore
        super().abort()

    async def wait_closed(self) -> None:
        """Wait until everything is sent and the peer has closed, too. No other task may be reading.

        This side stays open until the peer's Close frame arrives. A proxy ends both sides when one has ended, and a
        peer that is still sending then would never read why it was closed.
        """
        await self.wait_sent()
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
