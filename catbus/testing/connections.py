"""Blocking connections to a broker, over either transport, for what is no coroutine: one thread carries all of them."""

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
from ..client.transport import DATAGRAM, Driven, make_ssl_context, parse_address
from ..client.websocket import open_websocket
from ..errors import Disconnected, PeerError
from ..protocol.json_splitter import Framer

LONGEST = 1 << 24
"""Bytes of the longest object that is taken."""
UNREAD = 100_000
"""Objects that may wait for whoever receives. Beyond that, the connection is given up."""


_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Connection(Protocol):
    """A connection to a broker, whatever carries it. The methods block."""

    code: int | None
    """With which the broker has closed it, where it has named one."""

    def send(self, data: bytes) -> None:
        """Send bytes, whole objects or not, as one piece. Nothing happens when it is closed."""

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next object; None when the broker has closed the connection. Raises `TimeoutError` after `timeout` s."""

    def close(self) -> None:
        """Close it, without a word."""


class Dialled:
    """A `Connection` that `dial` has opened."""

    def __init__(self, thread: _Thread, transport: Transport) -> None:
        self.code: int | None = None
        """With which the broker has closed it, where it has named one."""
        self._thread = thread
        self._transport = transport
        self._arrived: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        self._outgoing, self._departures = trio.open_memory_channel[bytes | None](1024)
        self._end: BaseException | None = None

    def send(self, data: bytes) -> None:
        """Send bytes as one piece: over WebSocket, one binary message. Nothing happens when it is closed."""
        self._pass_on(data)

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next object; None when the connection has been closed.

        Raises `TimeoutError` after `timeout` seconds, and `PeerError` where what came is no JSON object.
        """
        if self._end is None:
            try:
                found = self._arrived.get(timeout=max(0.0, timeout))
            except queue.Empty:
                raise TimeoutError(f"nothing came within {timeout:.3g} s") from None
            if isinstance(found, dict):
                return found
            self._end = found
        if isinstance(self._end, Disconnected):
            self.code = self._end.code
            return None
        raise self._end

    def wait_closed(self, timeout: float) -> None:
        """Wait until the broker has closed it, and drop what comes until then. Raises as `receive` does."""
        deadline = time.monotonic() + timeout
        while self.receive(deadline - time.monotonic()) is not None:
            pass

    def close(self) -> None:
        """Close it, without a word, once what has been sent has left. Does not wait for that."""
        self._pass_on(None)

    def _pass_on(self, data: bytes | None) -> None:
        with suppress(trio.BrokenResourceError):
            trio.from_thread.run(self._outgoing.send, data, trio_token=self._thread.token)

    # In the thread

    async def carry(self) -> None:
        async with trio.open_nursery() as nursery:
            if isinstance(self._transport, Driven):
                nursery.start_soon(self._transport.run)
            nursery.start_soon(self._read)
            with self._departures:
                await self._write()
            with trio.CancelScope() as at_once:
                at_once.cancel()
                await self._transport.aclose()
            nursery.cancel_scope.cancel()

    async def _write(self) -> None:
        async for data in self._departures:
            if data is None:
                return
            # What it was closed with is for who receives.
            with suppress(Disconnected):
                await self._transport.send(data)

    async def _read(self) -> None:
        framers: dict[int, Framer[dict[str, Any]]] = {}
        try:
            while self._arrived.qsize() <= UNREAD:
                chunk = await self._transport.receive()
                for each in framers.setdefault(chunk.stream, Framer(_decode, LONGEST)).feed(chunk.data):
                    if isinstance(each, PeerError):
                        raise each
                    self._arrived.put(each)
                if chunk.ended or chunk.stream == DATAGRAM:
                    del framers[chunk.stream]
                if self._transport.pending:
                    await self._outgoing.send(b"")
            raise Disconnected(f"{UNREAD} objects came, and nobody received them")
        except (Disconnected, PeerError) as error:
            self._arrived.put(error)
        except trio.BrokenResourceError:
            # It is being closed on this side.
            pass


class _Thread:
    """A thread that runs Trio for as long as the process lives."""

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
_thread: _Thread | None = None


def dial(
    url: str,
    *,
    ca: str | os.PathLike[str] | None = None,
    certificate_hash: bytes | None = None,
    timeout: float = 10.0,
) -> Dialled:
    """Open a connection, which is blocking; `url`, `ca` and `certificate_hash` are as for `catbus.connect`.

    Nobody has authenticated yet. Raises `ValueError` for a wrong URL, `OSError` and `ConfigError` for a `ca` that
    cannot be read, and `Disconnected` where there is no broker, or it is not there within `timeout` seconds. Not to be
    called from a Trio task.
    """
    global _thread
    with _starting:
        thread = _thread = _thread or _Thread()
    return trio.from_thread.run(_open, thread, url, ca, certificate_hash, timeout, trio_token=thread.token)


async def _open(
    thread: _Thread, url: str, ca: str | os.PathLike[str] | None, certificate_hash: bytes | None, timeout: float
) -> Dialled:
    address = parse_address(url)
    transport: Transport
    try:
        with anyio.fail_after(timeout):
            if address.quic:
                # It takes longer to import than all the rest.
                from ..client.webtransport import make_configuration, open_webtransport

                transport = await open_webtransport(address, make_configuration(address, ca, certificate_hash))
            else:
                websocket = await open_websocket(address, make_ssl_context(ca) if address.secure else None)
                websocket.binary = True
                transport = websocket
    except TimeoutError:
        raise Disconnected(f"no answer from {url} within {timeout:g} s") from None
    dialled = Dialled(thread, transport)
    thread.nursery.start_soon(dialled.carry)
    return dialled
