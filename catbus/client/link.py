"""What keeps a conversation going: three tasks that carry its bytes over a transport, and the waiting."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from ..errors import CloseCode, Disconnected, PeerError
from .bell import Bell
from .conversation import Conversation
from .inbox import Inbox
from .transport import Transport

OUTBOX = 256 * 1024
"""How many bytes may wait to be sent before who publishes has to wait."""

WINDOW = 1000
"""How many publishes may be without an answer where the broker names no limit."""

PATIENCE = 10.0
"""How long, in seconds, full inboxes may keep the connection from being read."""


class Link:
    """One connection at work. What it waits for is told by the calls that end in -ed."""

    def __init__(self, conversation: Conversation, transport: Transport, *, keepalive: float, timeout: float) -> None:
        self._conversation = conversation
        self._transport = transport
        self._keepalive = keepalive
        self._timeout = timeout
        self._scope = anyio.CancelScope()
        self._goodbye: tuple[int, str] = (1000, "")
        self._outbound = Bell()
        self._inbound = Bell()
        self._room = Bell()
        self._listeners = 0
        self._heard = 0
        self._paused = False

    async def run(self) -> None:
        """Carry bytes both ways until `stop` or until the connection is gone; then close it.

        When it is cancelled it closes at once. An exception of an event callback comes out of it.
        """
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

    def requested(self) -> None:
        """There is something to send, and perhaps somebody who waits for the reply."""
        self._outbound.ring()
        self._inbound.ring()

    def relieved(self, inbox: Inbox) -> None:
        """The application has taken enough out of an inbox that was full."""
        self._conversation.subscriptions.relieve(inbox)
        self.requested()

    async def listen(self, bell: Bell) -> None:
        """Wait for the next message of a subscription. Others that are full do not keep it from coming."""
        self._listeners += 1
        self._inbound.ring()
        try:
            await bell.wait()
        finally:
            self._listeners -= 1

    @property
    def congested(self) -> bool:
        """Whether to wait for room before the next publish."""
        conversation = self._conversation
        window = conversation.limits.get("pending_publishes", WINDOW)
        return conversation.outgoing > OUTBOX or conversation.unanswered >= window

    async def wait_for_room(self) -> None:
        """Wait until it is not congested, or the connection is gone. Cancelling it harms nothing."""
        while self.congested and self._conversation.lost is None:
            self.requested()
            await self._room.wait()

    def _lose(self, message: str, code: int | None = None) -> None:
        self._conversation.lose(message, code)
        self._room.ring()
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
        conversation, transport = self._conversation, self._transport
        while True:
            chunk = await transport.receive()
            self._heard += 1
            conversation.receive(*chunk)
            if transport.pending or conversation.outgoing:
                self._outbound.ring()
            self._room.ring()
            if conversation.crowded:
                await self._hold()

    async def _hold(self) -> None:
        """Let the broker's bytes wait in the socket while inboxes are full and nobody waits for what comes.

        Only for so long: goodbyes, revocations and the broker's pings stand behind them.
        """
        conversation = self._conversation
        self._paused = True
        with anyio.move_on_after(PATIENCE) as patience:
            while conversation.crowded and not conversation.waiting and not self._listeners:
                await self._inbound.wait()
        self._paused = False
        self._heard += 1
        if patience.cancelled_caught:
            for inbox in list(conversation.subscriptions.crowded):
                conversation.subscriptions.suspend(inbox)
            self._outbound.ring()

    async def _write(self) -> None:
        conversation, transport = self._conversation, self._transport
        while True:
            if transport.pending or conversation.outgoing:
                await transport.send(conversation.take())
                self._room.ring()
            else:
                await self._outbound.wait()

    async def _keep_alive(self) -> None:
        while True:
            await anyio.sleep(self._keepalive)
            heard = self._heard
            self._conversation.keep_alive()
            self._outbound.ring()
            await anyio.sleep(self._timeout)
            if self._heard == heard and not self._paused:
                self._goodbye = (CloseCode.UNRESPONSIVE, "no answer to a ping")
                raise Disconnected(f"no answer from the broker within {self._timeout:g} s")
