"""Sees to it that there is a connection: makes the first, and another after it or beside it."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio
import anyio.abc

from ..errors import CloseCode, Disconnected, ErrorCode, Refused
from ..protocol.wire_messages import AuthOk, Error, GoAway
from .active_connection import Link
from .argument_checks import check_text
from .in_flight_requests import Ledger
from .protocol_connection import Conversation
from .reconnect_policy import Backoff, Ended, Reconnected, Reconnecting, SignedOut, State, Verdict, judge, judge_refusal
from .signals import Bell, Lobby
from .subscription_manager import Switchboard
from .token_renewal import until_renewal
from .transport_interface import Transport

BusEvent = GoAway | Error | Reconnecting | Reconnected | Ended

Token = str | Callable[[], Awaitable[str | None]]

OUTBOX = 256 * 1024
"""How many bytes may wait to be sent before who publishes has to wait."""

WINDOW = 1000
"""How many publishes may be without an answer where the broker names no limit."""

REPLIES = 2.0
"""How long, in seconds, the old connection has to answer what it was sent before we go over to the next one."""

LONGEST_WAIT = 300.0
"""How long to wait at most, in seconds, where the broker says that the token is not valid yet: a clock may be set."""

PAUSE = 2.0
"""How long to wait, in seconds, before the broker is asked again what became of a publish."""


class Supervisor:
    """The connections of one client, one after the other, and what outlives them.

    `conversation` is the present one, or the last one while there is none. Without a `backoff` the first is the only.
    """

    def __init__(
        self,
        tasks: anyio.abc.TaskGroup,
        dial: Callable[[], Awaitable[Transport]],
        token: Token,
        *,
        backoff: Backoff | None,
        timeout: float,
        keepalive: float,
        on_event: Callable[[BusEvent], None] | None,
        better: Callable[[], Awaitable[Transport]] | None = None,
        upgrade: float = 60.0,
    ) -> None:
        self.ledger = Ledger(keeps_on=backoff is not None)
        self.subscriptions = Switchboard(self.ledger.number)
        self.lobby = Lobby()
        self.conversation = self._converse(on_event)
        self._tasks = tasks
        self._dial = dial
        self._token = token
        self._backoff = backoff
        self._timeout = timeout
        self._keepalive = keepalive
        self._on_event = on_event
        self._better = better
        """A way to WebTransport, to be tried again every `upgrade` seconds where it has not got through."""
        self._upgrade = upgrade
        self._link: Link | None = None
        self._ended: tuple[str, int | None] | None = None
        self._links: set[Link] = set()
        self._scope = anyio.CancelScope()
        self._retries = anyio.CancelScope()
        self._failures = 0
        self._attempt = 0
        """How often the application was told that there is no connection, since there was one."""

    # What the application asks

    @property
    def state(self) -> State:
        if self._ended is not None:
            return State.CLOSED
        connected = self._link is not None and self.conversation.lost is None
        return State.CONNECTED if connected else State.RECONNECTING

    @property
    def transport(self) -> str:
        """What the present connection goes by, or the last one while there is none; empty before the first."""
        return self._link.kind if self._link is not None else ""

    def check(self) -> None:
        """Raise `Disconnected` when there will be no further connection."""
        if self._ended is not None:
            raise Disconnected(*self._ended)

    async def wait_connected(self) -> None:
        """Wait until there is a connection. Raises `Disconnected` when there will be none."""
        while self.state is not State.CONNECTED:
            self.check()
            await self.lobby.room.wait()

    @property
    def congested(self) -> bool:
        """Whether to wait for room before the next publish."""
        window = self.conversation.limits.get("pending_publishes", WINDOW)
        return self.conversation.outgoing + self.ledger.unsent_bytes > OUTBOX or self.ledger.unanswered >= window

    async def wait_for_room(self) -> None:
        """Wait until it is not congested, or nothing will be sent any more. Cancelling it harms nothing."""
        while self.congested and self._ended is None:
            self.lobby.requested()
            await self.lobby.room.wait()

    async def authenticate(self, token: str) -> None:
        """Say who we are, on this connection and those that come. Raises `Refused`, and `Disconnected` at the end."""
        while True:
            await self.wait_connected()
            answer = await self._authenticate(self.conversation, token)
            if answer is not None:
                if isinstance(self._token, str):
                    self._token = token
                return

    # The connections

    async def start(self, *, persist: bool, wait: bool) -> None:
        """Make the first connection; with `persist` until it succeeds, otherwise one time. Without `wait`, beside us.

        Raises `Refused` and `Disconnected`, and what the `token` function raises.
        """
        first = await self._open_first(persist=persist) if wait else None
        self._tasks.start_soon(self._run, first)
        self._tasks.start_soon(self._retry)

    async def _open_first(self, *, persist: bool) -> Link:
        while True:
            try:
                link = await self._open()
                break
            except (Refused, Disconnected) as error:
                if not persist or self._backoff is None or self._judge(error) is Verdict.FINAL:
                    raise
                pause = self._pause(error)
                self._failures += 1
                self._tell_of(error, pause)
                await anyio.sleep(pause)
        # It may be lost again already, and then it is for the next one.
        with suppress(Disconnected):
            link.conversation.take_over()
        self._go_on(link)
        return link

    def stop(self) -> None:
        """End it in order: the connections say goodbye."""
        self._end("it has been closed on this side", None)
        for link in self._links:
            link.stop()
        self._scope.cancel()

    async def _run(self, link: Link | None) -> None:
        with self._scope:
            try:
                if link is None:
                    link = await self._open_first(persist=True)
                    self._tell(Reconnected())
                while True:
                    began = anyio.current_time()
                    link = await self._improve(link)
                    if self._backoff is None:
                        await link.gone.wait()
                        link.conversation.check()
                    elif anyio.current_time() - began >= self._backoff.pause(self._failures, 0):
                        # One that is closed as soon as it is there counts as a failure.
                        self._failures = 0
                    link = await self._replace(link)
            except (Refused, Disconnected) as error:
                self._finish(error)

    async def _improve(self, link: Link) -> Link:
        """Wait until the connection is gone or will be. Until then, try the better way now and then, and go over to it.

        Returns the connection that there is then.
        """
        while self._better is not None and link.kind != "webtransport":
            with anyio.move_on_after(self._upgrade):
                await link.wait_news()
                return link
            with suppress(Refused, Disconnected):
                # What does not get through, still, is as it was.
                new = await self._open(self._better)
                await self._move(link, new)
                link = new
        await link.wait_news()
        return link

    async def _replace(self, old: Link) -> Link:
        """Another connection instead of one that is gone or will be. Raises `Disconnected` when that is the end."""
        reason: Disconnected | Refused | None = None
        due = old.due
        if due is not None and self._failures:
            # Nobody is sent from one replica to the next without a pause.
            due = max(due, anyio.current_time() + self._backed_off(self._failures - 1))
        while True:
            if due is None:
                assert reason is not None or old.conversation.lost is not None
                reason = reason or Disconnected(*(old.conversation.lost or ("", None)))
                due = anyio.current_time() + self._pause(reason)
            await self._wait(due, old, reason)
            self._failures += 1
            token = self._token
            try:
                new = await self._open()
                await self._move(old, new)
            except (Refused, Disconnected) as error:
                reason, due = error, None
                continue
            if self._token is not token and isinstance(self._token, str):
                # It was renewed meanwhile, on the old connection.
                with suppress(Refused, Disconnected):
                    await self._authenticate(new.conversation, self._token)
            return new

    async def _wait(self, due: float, old: Link, reason: Disconnected | Refused | None) -> None:
        """Wait for the moment, and tell the application when there is no connection meanwhile."""
        if old.conversation.lost is None:
            with anyio.CancelScope(deadline=due):
                await old.gone.wait()
        # Closed on this side, it may run on until it waits again.
        self.check()
        if old.conversation.lost is not None:
            end = Disconnected(*old.conversation.lost)
            if self._judge(end) is Verdict.FINAL:
                raise end
            self._tell_of(reason or end, max(0.0, due - anyio.current_time()))
        await anyio.sleep_until(due)

    async def _open(self, dial: Callable[[], Awaitable[Transport]] | None = None) -> Link:
        """Connect, by `dial` where that is given, and authenticate.

        Raises `Disconnected` and `Refused`; nothing is left open then.
        """
        late = Disconnected(f"the broker did not answer within {self._timeout:g} s")
        token = await self._ask_for_token()
        try:
            with anyio.fail_after(self._timeout) as limit:
                transport = await (dial or self._dial)()
        except TimeoutError:
            raise late from None
        conversation = self._converse(self._tell)
        link = Link(conversation, transport, self.lobby, keepalive=self._keepalive, timeout=self._timeout)
        self._links.add(link)
        self._tasks.start_soon(self._carry, link)
        try:
            with anyio.fail_after(limit.deadline - anyio.current_time()):
                answer = await self._authenticate(conversation, token)
        except TimeoutError:
            # No use in waiting for its goodbye.
            link.abandon()
            raise late from None
        except Refused:
            link.stop()
            raise
        except BaseException:
            link.abandon()
            raise
        if answer is None:
            conversation.check()
        if not isinstance(self._token, str):
            self._tasks.start_soon(self._renew, link, token)
        return link

    async def _move(self, old: Link, new: Link) -> None:
        """Go over to another connection, which is made before the old one breaks where that is still there.

        Raises `Disconnected` when the new one is lost on the way; the old one is closed all the same, and all that
        is not finished waits for the next.
        """
        ledger, subscriptions, room = self.ledger, self.subscriptions, self.lobby.room
        new.conversation.check()
        moved = old.conversation.lost is None
        try:
            ledger.hold()
            new.conversation.take_over_subscriptions()
            self.lobby.requested()
            with anyio.move_on_after(REPLIES):
                while ledger.in_doubt and old.conversation.lost is None:
                    await room.wait()
            with anyio.move_on_after(self._timeout):
                while moved and subscriptions.asking and new.conversation.lost is None:
                    await room.wait()
        finally:
            old.stop()
        new.conversation.take_over_requests()
        if moved:
            # That was no failure.
            self._failures = 1
        self._go_on(new)
        self._tell(Reconnected(moved))

    def _go_on(self, link: Link) -> None:
        self._link, self.conversation = link, link.conversation
        self._attempt = 0
        self.lobby.requested()
        self.lobby.room.ring()

    async def _carry(self, link: Link) -> None:
        try:
            await link.run()
        finally:
            self._links.discard(link)

    def _finish(self, error: Disconnected | Refused) -> None:
        """End everything because of an error, and tell the application."""
        if self._ended is None:
            end = error if isinstance(error, Disconnected) else _refused_for_good(error)
            self._end(str(end), end.code)
            for link in self._links:
                link.stop()
            self._tell(Ended(str(end), end.code))

    def _end(self, message: str, code: int | None) -> None:
        """There will be no further connection. The first reason stands."""
        if self._ended is None:
            self._ended = (message, code)
            self._retries.cancel()
            self.ledger.wake()
            self.subscriptions.wake()
            self.lobby.room.ring()

    async def _retry(self) -> None:
        """Ask again, after a pause, for what the broker did not know or could not do: publishes and subscriptions."""
        doubts = Bell()
        self.ledger.doubted = self.subscriptions.doubted = doubts.ring
        with self._retries:
            while True:
                if self.ledger.retrying or self.subscriptions.retrying:
                    await anyio.sleep(PAUSE * random.uniform(0.7, 1))  # noqa: S311
                    self.ledger.retry()
                    self.subscriptions.retry()
                    self.lobby.requested()
                else:
                    await doubts.wait()

    # Tokens

    async def _ask_for_token(self) -> str:
        if isinstance(self._token, str):
            return self._token
        try:
            token = await self._token()
        except OSError as error:
            raise Disconnected(f"no token to be had: {error}") from error
        except Refused as error:
            raise SignedOut(error.code, error.message) from error
        if token is None:
            raise SignedOut(ErrorCode.UNAUTHENTICATED, "the token function returned None")
        return check_text("token", token)

    async def _authenticate(self, conversation: Conversation, token: str) -> AuthOk | None:
        """The answer, or None when the connection is lost before it. Raises `Refused`."""
        bell = Bell()
        answer = conversation.authenticate(token)
        answer.wake = bell.ring
        self.lobby.requested()
        while answer.value is None and conversation.lost is None:
            await bell.wait()
        if isinstance(answer.value, Refused):
            raise answer.value
        return answer.value

    async def _renew(self, link: Link, token: str) -> None:
        """Bring the next token before the time of this one is over, as long as the connection is there."""
        with link.presence:
            while (pause := until_renewal(token, time.time())) is not None:
                await anyio.sleep(pause)
                try:
                    new = await self._ask_for_token()
                    await self._authenticate(link.conversation, new)
                except SignedOut as error:
                    self._scope.cancel()
                    self._finish(error)
                    return
                except (Refused, Disconnected):
                    # Where that matters the broker closes the connection, and the next one begins with a token.
                    continue
                token = new

    # Judging and telling

    def _judge(self, error: Disconnected | Refused) -> Verdict:
        verdict = judge_refusal(error) if isinstance(error, Refused) else judge(error.code)
        if verdict is Verdict.NEW_TOKEN and isinstance(self._token, str):
            # There is no other.
            return Verdict.FINAL
        return verdict

    def _pause(self, error: Disconnected | Refused) -> float:
        """How long to wait after a failure, or the loss of a connection. Raises `Disconnected` when it is final."""
        verdict = self._judge(error)
        if verdict is Verdict.FINAL:
            raise error if isinstance(error, Disconnected) else _refused_for_good(error)
        if verdict is Verdict.NEW_TOKEN and not self._failures:
            return 0.0
        pause = self._backed_off(self._failures)
        wait = error.retry_after if isinstance(error, Refused) else None
        return pause if wait is None else max(pause, min(wait, LONGEST_WAIT) + self._backed_off(0))

    def _backed_off(self, failures: int) -> float:
        assert self._backoff is not None
        return self._backoff.pause(failures, random.random())  # noqa: S311

    def _tell_of(self, reason: Disconnected | Refused, delay: float) -> None:
        code = reason.code if isinstance(reason, Disconnected) else None
        self._attempt += 1
        self._tell(Reconnecting(str(reason), code, self._attempt, delay))

    def _tell(self, event: BusEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def _converse(self, on_event: Callable[[GoAway | Error], None] | None) -> Conversation:
        return Conversation(self.ledger, self.subscriptions, on_event)


def _refused_for_good(refusal: Refused) -> Disconnected:
    if isinstance(refusal, SignedOut):
        return Disconnected(f"signed out: {refusal}", CloseCode.UNAUTHENTICATED)
    code = {ErrorCode.UNAUTHENTICATED: CloseCode.UNAUTHENTICATED, ErrorCode.TOKEN_EXPIRED: CloseCode.TOKEN_EXPIRED}
    return Disconnected(f"the broker does not take the token: {refusal}", code.get(refusal.code))
