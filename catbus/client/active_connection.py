"""What keeps a conversation going: three tasks that carry its bytes over a transport, and the waiting."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from ..errors import CloseCode, Disconnected, PeerError
from .protocol_connection import Conversation
from .signals import Bell, Lobby
from .transport_interface import Driven, Transport

PATIENCE = 10.0
"""How long, in seconds, full inboxes may keep the connection from being read."""


class Link:
    """One connection at work. The lobby tells what it waits for, and is told what it brings."""

    def __init__(
        self, conversation: Conversation, transport: Transport, lobby: Lobby, *, keepalive: float, timeout: float
    ) -> None:
        self.conversation = conversation
        self.gone = anyio.Event()
        """Set when the connection is lost; the goodbye may still be under way."""
        self.presence = anyio.CancelScope()
        """Cancelled when the connection is lost: for what somebody does as long as it is there."""
        self.due: float | None = None
        """When the broker, which is about to leave, wants us to connect anew; by the clock of the event loop."""
        self._transport = transport
        self._lobby = lobby
        self._keepalive = keepalive
        self._timeout = timeout
        self._whole = anyio.CancelScope()
        self._scope = anyio.CancelScope()
        self._goodbye: tuple[int, str] = (1000, "")
        self._news = Bell()
        self._heard = 0
        self._paused = False
        conversation.wake = self._notice

    @property
    def kind(self) -> str:
        """By what it goes: "websocket" or "webtransport"."""
        return self._transport.kind

    async def run(self) -> None:
        """Carry bytes both ways until `stop` or until the connection is gone; then close it.

        When it is cancelled it closes at once. An exception of an event callback comes out of it.
        """
        with self._whole:
            async with anyio.create_task_group() as drivers:
                if isinstance(self._transport, Driven):
                    drivers.start_soon(self._transport.run)
                try:
                    with self._scope:
                        async with anyio.create_task_group() as tasks:
                            for work in (self._read, self._write, self._keep_alive):
                                tasks.start_soon(self._watch, work)
                finally:
                    self.stop()
                    await self._transport.aclose(*self._goodbye)

    def stop(self) -> None:
        """End it in order."""
        self._lose("it has been closed on this side")

    def abandon(self) -> None:
        """End it without a goodbye."""
        self.stop()
        self._whole.cancel()

    async def wait_news(self) -> None:
        """Wait until the connection is gone or the broker is about to leave. Cancelling it harms nothing."""
        while self.conversation.lost is None and self.conversation.goaway is None:
            await self._news.wait()

    def _notice(self) -> None:
        conversation = self.conversation
        if conversation.lost is not None:
            self.gone.set()
        elif conversation.goaway is not None and self.due is None:
            self.due = anyio.current_time() + conversation.goaway.reconnect_in
        self._news.ring()

    def _lose(self, message: str, code: int | None = None) -> None:
        self.conversation.lose(message, code)
        self._lobby.room.ring()
        self.presence.cancel()
        self._scope.cancel()

    async def _watch(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Disconnected as error:
            self._lose(str(error), error.code)
        except PeerError as error:
            self._goodbye = (error.close or CloseCode.BAD_MESSAGE, error.message)
            self._lose(f"what the broker sent makes no sense: {error.message}", error.close)

    async def _read(self) -> None:
        conversation, transport = self.conversation, self._transport
        while True:
            chunk = await transport.receive()
            self._heard += 1
            conversation.receive(*chunk)
            if transport.pending or conversation.outgoing:
                self._lobby.outbound.ring()
            self._lobby.room.ring()
            if conversation.crowded:
                await self._hold()

    async def _hold(self) -> None:
        """Let the broker's bytes wait in the socket while inboxes are full and nobody waits for what comes.

        Only for so long: goodbyes, revocations and the broker's pings stand behind them.
        """
        conversation = self.conversation
        self._paused = True
        with anyio.move_on_after(PATIENCE) as patience:
            while conversation.crowded and not conversation.waiting and not self._lobby.listeners:
                await self._lobby.inbound.wait()
        self._paused = False
        self._heard += 1
        if patience.cancelled_caught:
            conversation.suspend_crowded()
            self._lobby.outbound.ring()

    async def _write(self) -> None:
        conversation, transport = self.conversation, self._transport
        while True:
            if transport.pending or conversation.outgoing:
                await transport.send(conversation.take())
                self._lobby.room.ring()
            else:
                await self._lobby.outbound.wait()

    async def _keep_alive(self) -> None:
        while True:
            await anyio.sleep(self._keepalive)
            heard = self._heard
            self.conversation.keep_alive()
            self._lobby.outbound.ring()
            await anyio.sleep(self._timeout)
            if self._heard == heard and not self._paused:
                self._goodbye = (CloseCode.UNRESPONSIVE, "no answer to a ping")
                raise Disconnected(f"no answer from the broker within {self._timeout:g} s")
