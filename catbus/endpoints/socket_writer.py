"""What is written to one connection: at once as far as the kernel takes it, and the rest by a task."""

from __future__ import annotations

import os
from collections.abc import Callable

import trio

_CHUNK = 65_536


def limit_send_buffer(stream: trio.abc.Stream, size: int) -> trio.SocketStream | None:
    """Limit the kernel's send buffer, and return the socket beneath the stream; None if it has none.

    Otherwise the kernel buffers megabytes for a client that does not read.
    """
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    if not isinstance(transport, trio.SocketStream):
        return None
    transport.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, size)
    return transport


class SocketWriter:
    """Writes to a connection without waiting, in order.

    While nothing is unsent, bytes go straight to the kernel. A task in `nursery` sends what the kernel does not take,
    and nothing else writes while it runs: `writing` is true then. When it has sent everything, it calls `take_more`,
    and ends if that returns nothing. So the unsent bytes are bounded by what one `take_more` and one `write` have.

    A write that fails or is cancelled breaks the connection: nothing more is sent, and `read_scope` is cancelled. The
    caller that accepted the connection closes the stream.
    """

    __slots__ = (
        "_fd",
        "_nursery",
        "_progress",
        "_queue",
        "_read_scope",
        "_socket",
        "_stream",
        "_take_more",
        "broken",
        "last_progress",
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
        take_more: Callable[[], bytes],
        read_scope: trio.CancelScope,
    ) -> None:
        self.writing = False
        """Whether the task that sends unsent bytes is running."""
        self.write_closed = False
        """Whether nothing more can be sent."""
        self.broken = False
        self.sent = 0
        self.unsent = 0
        """Bytes that the kernel has not taken yet."""
        self.last_progress = trio.current_time()
        """Trio time of the last bytes that the kernel took."""
        self._stream = stream
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self._fd = self._socket.fileno() if self._socket else -1
        self._nursery = nursery
        self._take_more = take_more
        self._read_scope = read_scope
        self._queue: list[bytes] = []
        self._progress = trio.lowlevel.ParkingLot()

    @property
    def stalled_since(self) -> float | None:
        """The Trio time since which the kernel has taken nothing, or None if nothing is unsent."""
        return self.last_progress if self.writing else None

    def write(self, data: bytes) -> None:
        """Send or queue bytes, without waiting. Drops them after `close` or a failure."""
        if self.write_closed or not data:
            return
        if not self.writing and self._fd >= 0:
            try:
                sent = os.write(self._fd, data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.abort()
                return
            self.sent += sent
            if sent == len(data):
                return
            data = data[sent:]
        self._queue.append(data)
        self.unsent += len(data)
        if not self.writing:
            self.writing = True
            self.last_progress = trio.current_time()
            self._nursery.start_soon(self._write_queued)

    def close(self, last: bytes) -> None:
        """Send what `take_more` still returns and then `last`, after which nothing is sent."""
        while not self.write_closed and (data := self._take_more()):
            self.write(data)
        self.write(last)
        self.write_closed = True

    def abort(self) -> None:
        """Break the connection: nothing more is sent, and tasks that read or wait here stop.

        Call it before the stream is closed, because another connection may soon have the same file number.
        """
        self.write_closed = self.broken = True
        self._queue.clear()
        self.unsent = 0
        # It refers to the owner of this connection, and only the garbage collector would free a reference cycle.
        self._take_more = bytes
        self._progress.unpark_all()
        self._read_scope.cancel()

    async def wait_sent(self) -> None:
        """Wait until everything is sent, or the connection is broken."""
        while self.writing and not self.broken:
            await self._progress.park()

    async def _write_queued(self) -> None:
        try:
            while self._queue or self._queue_more():
                data = memoryview(b"".join(self._queue))
                self._queue.clear()
                while data:
                    data = data[await self._write_some(data) :]
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
        data = self._take_more()
        if data:
            self._queue.append(data)
            self.unsent += len(data)
        return bool(data)

    async def _write_some(self, data: memoryview) -> int:
        if self._socket is not None:
            size = await self._socket.send(data)
        else:
            size = min(len(data), _CHUNK)
            await self._stream.send_all(data[:size])
        if not self.broken:
            self.sent += size
            self.unsent -= size
        return size
