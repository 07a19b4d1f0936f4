"""Blocking connections to a broker over either transport, for code that is not a coroutine.

One background thread runs Trio for all of them.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from contextlib import suppress
from typing import Any, Protocol

import anyio
import msgspec
import trio

from ..client import Transport
from ..client.broker_address import make_ssl_context, parse_address
from ..client.transport_interface import DATAGRAM, DrivenTransport
from ..client.websocket_transport import open_websocket
from ..errors import Disconnected, PeerError
from ..protocol.json_splitter import JsonSplitter

MAX_OBJECT_SIZE = 1 << 24
"""Maximum size of a received object, in bytes."""
MAX_UNREAD_OBJECTS = 100_000
"""Maximum number of received objects that wait for `receive`. Beyond it the connection is closed."""


_decode = msgspec.json.Decoder(dict[str, Any]).decode


class BlockingConnection(Protocol):
    """A connection to a broker, over any transport. Its methods block."""

    code: int | None
    """The close code that the broker sent, if any."""

    def send(self, data: bytes) -> None:
        """Send bytes in one piece, whole objects or not. Does nothing on a closed connection."""

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """Return the next object, or None once the broker has closed. Raises `TimeoutError` after `timeout` seconds."""

    def close(self) -> None:
        """Close the connection without a close code."""


class ThreadedConnection:
    """A `BlockingConnection` whose input and output happen on the background thread. `dial` opens one."""

    def __init__(self, thread: _EventLoopThread, transport: Transport) -> None:
        self.code: int | None = None
        """The close code that the broker sent, if any."""
        self._thread = thread
        self._transport = transport
        self._arrived: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        self._outgoing, self._to_send = trio.open_memory_channel[bytes | None](1024)
        self._end: BaseException | None = None

    def send(self, data: bytes) -> None:
        """Send bytes in one piece: over WebSocket, one binary message. Does nothing on a closed connection."""
        self._enqueue(data)

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """Return the next object, or None once the connection is closed.

        Raises `TimeoutError` after `timeout` seconds, and `PeerError` if the broker sent anything but JSON objects.
        """
        if self._end is None:
            try:
                found = self._arrived.get(timeout=max(0.0, timeout))
            except queue.Empty:
                raise TimeoutError(f"nothing arrived within {timeout:.3g} s") from None
            if isinstance(found, dict):
                return found
            self._end = found
        if isinstance(self._end, Disconnected):
            self.code = self._end.code
            return None
        raise self._end

    def wait_closed(self, timeout: float) -> None:
        """Wait until the broker has closed the connection, and discard what arrives. Raises as `receive` does."""
        deadline = time.monotonic() + timeout
        while self.receive(deadline - time.monotonic()) is not None:
            pass

    def close(self) -> None:
        """Close the connection after everything sent so far has left. Returns at once."""
        self._enqueue(None)

    def _enqueue(self, data: bytes | None) -> None:
        with suppress(trio.BrokenResourceError):
            trio.from_thread.run(self._outgoing.send, data, trio_token=self._thread.token)

    # On the background thread

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            if isinstance(self._transport, DrivenTransport):
                nursery.start_soon(self._transport.run)
            nursery.start_soon(self._read)
            with self._to_send:
                await self._write()
            with trio.CancelScope() as at_once:
                at_once.cancel()
                await self._transport.aclose()
            nursery.cancel_scope.cancel()

    async def _write(self) -> None:
        async for data in self._to_send:
            if data is None:
                return
            # `receive` reports the close code.
            with suppress(Disconnected):
                await self._transport.send(data)

    async def _read(self) -> None:
        framers: dict[int, JsonSplitter[dict[str, Any]]] = {}
        try:
            while self._arrived.qsize() <= MAX_UNREAD_OBJECTS:
                chunk = await self._transport.receive()
                for each in framers.setdefault(chunk.stream, JsonSplitter(_decode, MAX_OBJECT_SIZE)).feed(chunk.data):
                    if isinstance(each, PeerError):
                        raise each
                    self._arrived.put(each)
                if chunk.ended or chunk.stream == DATAGRAM:
                    del framers[chunk.stream]
                if self._transport.pending:
                    await self._outgoing.send(b"")
            raise Disconnected(f"more than {MAX_UNREAD_OBJECTS} objects arrived and were not received")
        except (Disconnected, PeerError) as error:
            self._arrived.put(error)
        except trio.BrokenResourceError:
            # This side is closing the connection.
            pass


class _EventLoopThread:
    """A daemon thread that runs Trio until the process ends."""

    def __init__(self) -> None:
        started = threading.Event()

        async def run() -> None:
            async with trio.open_nursery() as self.nursery:
                self.token = trio.lowlevel.current_trio_token()
                started.set()
                await trio.sleep_forever()

        threading.Thread(target=trio.run, args=(run,), name="catbus connections", daemon=True).start()
        started.wait()


_starting = threading.Lock()
_thread: _EventLoopThread | None = None


def dial(
    url: str,
    *,
    ca: str | os.PathLike[str] | None = None,
    certificate_hash: bytes | None = None,
    timeout: float = 10.0,
) -> ThreadedConnection:
    """Open a connection and block meanwhile; `url`, `ca` and `certificate_hash` are as for `catbus.connect`.

    The connection is not authenticated. Must not be called from a Trio task.

    Raises `ValueError` for a wrong URL, `OSError` or `ConfigError` if `ca` cannot be read, and `Disconnected` if no
    broker answers within `timeout` seconds.
    """
    global _thread
    with _starting:
        thread = _thread = _thread or _EventLoopThread()
    return trio.from_thread.run(_open, thread, url, ca, certificate_hash, timeout, trio_token=thread.token)


async def _open(
    thread: _EventLoopThread,
    url: str,
    ca: str | os.PathLike[str] | None,
    certificate_hash: bytes | None,
    timeout: float,
) -> ThreadedConnection:
    address = parse_address(url)
    transport: Transport
    try:
        with anyio.fail_after(timeout):
            if address.quic:
                # aioquic takes longer to import than everything else together.
                from ..client.webtransport_transport import make_configuration, open_webtransport

                transport = await open_webtransport(address, make_configuration(address, ca, certificate_hash))
            else:
                websocket = await open_websocket(address, make_ssl_context(ca) if address.secure else None)
                websocket.binary = True
                transport = websocket
    except TimeoutError:
        raise Disconnected(f"no answer from {url} within {timeout:g} s") from None
    dialled = ThreadedConnection(thread, transport)
    thread.nursery.start_soon(dialled.run)
    return dialled
