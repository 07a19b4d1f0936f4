"""One connection at work: the tasks that read, write and ping over a transport."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from ..close_codes import CloseCode
from ..errors import Disconnected, PeerError
from .protocol_connection import ProtocolConnection
from .signals import ClientSignals, Signal
from .transport_interface import DrivenTransport, Transport

MAX_READ_PAUSE = 10.0
"""Seconds for which full queues may pause reading."""


class ActiveConnection:
    """A transport and the protocol on it.

    A ping is sent every `keepalive` seconds. The connection is lost if nothing arrives within `timeout` seconds of it.
    """

    def __init__(
        self,
        protocol: ProtocolConnection,
        transport: Transport,
        signals: ClientSignals,
        *,
        keepalive: float,
        timeout: float,
    ) -> None:
        self.protocol = protocol
        self.lost_event = anyio.Event()
        """Set when the connection is lost. The close handshake may still be under way."""
        self.lifetime = anyio.CancelScope()
        """Cancelled when the connection is lost, for tasks that last as long as it."""
        self.reconnect_at: float | None = None
        """When to reconnect to another replica after a `goaway`, by the clock of the event loop."""
        self._transport = transport
        self._signals = signals
        self._keepalive = keepalive
        self._timeout = timeout
        self._whole_scope = anyio.CancelScope()
        self._scope = anyio.CancelScope()
        self._close_reason: tuple[int, str] = (1000, "")
        self._changed = Signal()
        self._chunks_received = 0
        self._reading_paused = False

    @property
    def kind(self) -> str:
        """The kind of the transport: "websocket" or "webtransport"."""
        return self._transport.kind

    async def run(self) -> None:
        """Carry bytes both ways until `stop` or the loss of the connection, then close the transport.

        Cancelling it closes at once. Raises what an event callback raises.
        """
        with self._whole_scope:
            async with anyio.create_task_group() as drivers:
                if isinstance(self._transport, DrivenTransport):
                    drivers.start_soon(self._transport.run)
                try:
                    with self._scope:
                        async with anyio.create_task_group() as tasks:
                            for work in (self._read, self._write, self._keep_alive):
                                tasks.start_soon(self._run_task, work)
                finally:
                    self.stop()
                    await self._transport.aclose(*self._close_reason)

    def stop(self) -> None:
        """End the connection with a close handshake."""
        self._connection_lost("it has been closed on this side")

    def abort(self) -> None:
        """End the connection without a close handshake."""
        self.stop()
        self._whole_scope.cancel()

    async def wait_lost_or_goaway(self) -> None:
        """Wait until the connection is lost or the broker announces its end. Safe to cancel."""
        while self.protocol.lost is None and self.protocol.goaway is None:
            await self._changed.wait()

    def _connection_lost(self, message: str, code: int | None = None) -> None:
        self.protocol.connection_lost(message, code)
        self.lost_event.set()
        self._changed.notify()
        self._signals.progress.notify()
        self.lifetime.cancel()
        self._scope.cancel()

    async def _run_task(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Disconnected as error:
            self._connection_lost(str(error), error.code)
        except PeerError as error:
            self._close_reason = (error.close or CloseCode.BAD_MESSAGE, error.message)
            self._connection_lost(f"the broker violated the protocol: {error.message}", error.close)

    async def _read(self) -> None:
        protocol, transport = self.protocol, self._transport
        while True:
            chunk = await transport.receive()
            self._chunks_received += 1
            protocol.receive(*chunk)
            if protocol.goaway is not None and self.reconnect_at is None:
                self.reconnect_at = anyio.current_time() + protocol.goaway.reconnect_in
                self._changed.notify()
            if transport.pending or protocol.outgoing_bytes:
                self._signals.send_ready.notify()
            self._signals.progress.notify()
            if protocol.has_full_queue:
                await self._pause_reading()

    async def _pause_reading(self) -> None:
        """Leave bytes in the socket while queues are full and no task waits for a message or a reply.

        The pause is bounded: `goaway`, `revoked` and the pings of the broker arrive after those bytes.
        """
        protocol = self.protocol
        self._reading_paused = True
        with anyio.move_on_after(MAX_READ_PAUSE) as pause:
            while protocol.has_full_queue and not protocol.awaiting_reply and not self._signals.waiting_readers:
                await self._signals.read_wanted.wait()
        self._reading_paused = False
        self._chunks_received += 1
        if pause.cancelled_caught:
            protocol.pause_full_queues()
            self._signals.send_ready.notify()

    async def _write(self) -> None:
        protocol, transport = self.protocol, self._transport
        while True:
            if transport.pending or protocol.outgoing_bytes:
                await transport.send(protocol.data_to_send())
                self._signals.progress.notify()
            else:
                await self._signals.send_ready.wait()

    async def _keep_alive(self) -> None:
        while True:
            await anyio.sleep(self._keepalive)
            received = self._chunks_received
            self.protocol.send_ping()
            self._signals.send_ready.notify()
            await anyio.sleep(self._timeout)
            if self._chunks_received == received and not self._reading_paused:
                self._close_reason = (CloseCode.UNRESPONSIVE, "no reply to a ping")
                raise Disconnected(f"no reply from the broker within {self._timeout:g} s")
