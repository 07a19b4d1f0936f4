"""The way to a broker, as the application sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar, overload

import anyio
from anyio.lowlevel import checkpoint
from msgspec import Raw
from msgspec.structs import force_setattr

from ..errors import Refused
from ..protocol.channels import check_channel, check_pattern
from .argument_checks import (
    MOST_RECENT,
    check_flags,
    check_function,
    check_integer,
    check_name,
    check_place,
    check_text,
    encode_cursor,
)
from .connection_supervisor import Supervisor
from .in_flight_requests import Answer, Batch
from .message_queue import Event, Inbox, Mark, Phase, Recent
from .reconnect_policy import State
from .server_messages import Gap, Message, Page, encode_payload
from .signals import Bell

FAIRNESS = 100
"""How many messages are handed out in one go before other tasks have their turn."""


class Messages(AsyncIterator[Message]):
    """The messages of one subscription, in the order of their seqs.

    They go on over the loss of a connection, none left out and none twice. Iterating raises `Refused` when the
    permission is withdrawn (with the code `revoked`; with another when the next connection's broker refuses to go on),
    and `Disconnected` when there will be no further connection, after what had arrived before has been handed out.
    Cancelling it loses no message.
    """

    def __init__(
        self,
        inbox: Inbox,
        supervisor: Supervisor,
        bell: Bell,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.gaps: list[Gap] = []
        """What may have been missed, oldest first."""
        self._inbox = inbox
        self._supervisor = supervisor
        self._bell = bell
        self._on_event = on_event
        self._low = inbox.limit // 2
        self._turns = 0

    @property
    def pattern(self) -> str:
        return self._inbox.pattern

    @property
    def cursor(self) -> int:
        """Complete up to this seq: where to go on from, together with `epoch`.

        It counts the last message that was handed out as taken: keep it once that message has been dealt with.
        """
        return self._inbox.cursor

    @property
    def epoch(self) -> str:
        """The incarnation of the log that `cursor` belongs to."""
        return self._inbox.epoch

    @property
    def resume_from(self) -> str:
        """`cursor` and `epoch` as opaque text that `since` takes."""
        return encode_cursor(self._inbox.cursor, self._inbox.epoch)

    async def __anext__(self) -> Message:
        inbox = self._inbox
        items = inbox.items
        if self._turns >= FAIRNESS:
            await checkpoint()
            self._turns = 0
        while True:
            if items:
                item = items.popleft()
                if inbox.pressed and len(items) <= self._low:
                    self._supervisor.subscriptions.relieve(inbox)
                    self._supervisor.lobby.requested()
                if type(item) is Message:
                    if item.seq is not None:
                        inbox.cursor = item.seq
                        force_setattr(item, "epoch", inbox.epoch)
                    self._turns += 1
                    return item
                self._pass(item)  # type: ignore[arg-type]
            elif inbox.ending is not None:
                raise Refused(inbox.ending.code, inbox.ending.message)
            elif inbox.phase is Phase.ENDED:
                raise StopAsyncIteration
            else:
                self._supervisor.check()
                self._turns = 0
                await self._supervisor.lobby.listen(self._bell)

    def _pass(self, mark: Mark) -> None:
        self._inbox.cursor, self._inbox.epoch = mark.cursor, mark.epoch
        if isinstance(mark.event, Gap):
            self.gaps.append(mark.event)
        if self._on_event is not None and mark.event is not None:
            self._on_event(mark.event)


T = TypeVar("T")

AUTH = 200
"""What an `auth` has beside its token, at most, in bytes."""


class Bus:
    """An authenticated client, made by `connect`. Any number of tasks may use it.

    It outlives its connections: while there is none, what is asked for waits for the next one. Once there will be no
    further one, every method and every iteration raises `Disconnected`. A method that is cancelled leaves everything as
    it was; what it asked for may still happen, if it had been sent.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    @property
    def state(self) -> State:
        """Whether there is a connection just now, will be one again, or will be none."""
        return self._supervisor.state

    async def wait_connected(self) -> None:
        """Wait until there is a connection. Raises `Disconnected` when there will be none. May be cancelled."""
        await self._supervisor.wait_connected()

    @property
    def transport(self) -> str:
        """What the present connection goes by, or went: "websocket" or "webtransport"."""
        return self._supervisor.transport

    @property
    def client_id(self) -> str | None:
        """Who the token says we are; what others see as `sender`."""
        return self._supervisor.conversation.client_id

    @property
    def producer(self) -> str:
        """What the broker recognises our retries by."""
        return self._supervisor.conversation.producer

    @property
    def epoch(self) -> str:
        """The incarnation of the broker's log, as far as it has told us."""
        return self._supervisor.conversation.epoch

    @property
    def head(self) -> int:
        """The newest seq that the broker has told us of in answers and marks."""
        return self._supervisor.conversation.head

    @property
    def floor(self) -> int | None:
        """The oldest seq that the broker still had when we authenticated, if it said."""
        return self._supervisor.conversation.floor

    @property
    def limits(self) -> dict[str, int]:
        """The broker's limits, each by its name: `message_size` (bytes), `subscriptions`, `pending_publishes`."""
        return dict(self._supervisor.conversation.limits)

    @overload
    async def publish(
        self, channel: str, payload: Any, *, ephemeral: Literal[False] = False, echo: bool = True
    ) -> int: ...

    @overload
    async def publish(self, channel: str, payload: Any, *, ephemeral: bool, echo: bool = True) -> int | None: ...

    async def publish(self, channel: str, payload: Any, *, ephemeral: bool = False, echo: bool = True) -> int | None:
        """Publish a JSON value and return its seq once it is committed.

        An ephemeral message is passed on to whoever is there, and has no seq (None). With `echo=False` our own
        subscriptions do not get it back. A payload may be anything that msgspec encodes (NaN and infinities become
        null), or a `msgspec.Raw` that holds JSON.

        When the connection is lost before the answer, or the broker does not know the answer, it is sent again, and is
        in the log once all the same; what is published later waits for that. An ephemeral one is not sent again, and
        ends as `unknown`. While there is no connection it waits, however long: to bound that, cancel it, for example
        with `anyio.fail_after`. Up to 256 KiB and as many publishes as the broker allows unanswered wait here, and more
        outside for their turn. What a replica that stops gives back goes to the next one, unless what came later is
        published already.

        Raises `TypeError` for a payload that has no JSON form, before anything is sent; `Refused`, after which the
        message is not published and never will be, unless the code is `unknown`: then it could not be found out, for
        example because the log is another one by now. Raises `Disconnected` when there will be no further connection;
        then too nobody here can say, and so it is when this is cancelled after it was sent.
        """
        batch = Batch(1)
        check_name("channel", channel, check_channel)
        check_flags(ephemeral=ephemeral, echo=echo)
        await self._publish([(0, channel, encode_payload(payload))], batch, ephemeral=ephemeral, echo=echo)
        [result] = batch.results
        if isinstance(result, Refused):
            raise result
        return result

    async def publish_many(
        self, messages: Iterable[tuple[str, Any]], *, ephemeral: bool = False, echo: bool = True
    ) -> list[int | Refused | None]:
        """Publish pairs of a channel and a payload, in order, in as few frames as there is need for.

        Returns for each its seq (None for an ephemeral one) or the refusal. Otherwise as `publish`: after
        `Disconnected` any of them may be committed.
        """
        check_flags(ephemeral=ephemeral, echo=echo)
        requests = []
        refused = []
        for place, message in enumerate(messages):
            if not isinstance(message, tuple | list) or len(message) != 2:
                raise TypeError(f"messages[{place}]: a pair of a channel and a payload")
            channel, payload = message
            try:
                check_name(f"channel of messages[{place}]", channel, check_channel)
            except Refused as refusal:
                refused.append((place, refusal))
            else:
                requests.append((place, channel, encode_payload(payload)))
        batch = Batch(len(requests) + len(refused))
        for place, reason in refused:
            batch.settle(place, reason)
        await self._publish(requests, batch, ephemeral=ephemeral, echo=echo)
        return batch.results

    @asynccontextmanager
    async def subscribe(
        self,
        pattern: str,
        *,
        since: int | str | None = None,
        epoch: str | None = None,
        last: int | None = None,
        buffer: int = 1000,
        stream: bool = False,
        datagrams: bool = False,
        on_event: Callable[[Event], None] | None = None,
    ) -> AsyncIterator[Messages]:
        """Subscribe to what matches `pattern`: from now on, or everything after `since` first, or the `last` so many.

        `since` is the `cursor` of a message or of a page of history, or the `resume_from` of an earlier subscription. A
        seq will do too, with the `epoch` that it is of. With `last`, the newest `last` messages of the log come first,
        then what is new, with no hole and no repeat between. `on_event` is called by the iteration, in order with the
        messages, with each `Gap` (what may be missing), `Live` (catching up has ended) and `Head` (complete up to
        there).

        Over WebTransport, with `stream` the messages come on a stream of their own, so that a packet lost of one
        subscription holds up no other, unless the connection has no more streams to give; and with `datagrams`,
        ephemeral ones that fit come as datagrams. Elsewhere neither means anything.

        Up to `buffer` messages wait here for the application. When there are so many, nothing more is read from the
        connection, and the broker keeps the rest in its log; but while somebody waits for a reply, or for a message of
        another subscription, it is read, and up to 8 MiB more wait here. A subscription that has taken these too, or
        has kept the connection from being read for ten seconds, is given back to the broker, and taken up again from
        where it stopped when half of `buffer` is empty: nothing is lost but ephemeral messages.

        After the loss of a connection it goes on with the next one from where it was: nothing is left out or comes
        twice, but for ephemeral messages.

        Any number of tasks may subscribe to one pattern, each from its own start, with its own buffer. They share one
        subscription of the broker's, which ends with the last of them, and has `stream` and `datagrams` once one of
        them asks for that. When one of them begins further back, the others wait until the broker has caught up; an
        iteration that is always much slower than the others is better off with a bus of its own.

        Raises `Refused`; `TypeError` and `ValueError`, which name it, for a wrong argument. Leaving does not wait for
        the broker.
        """
        check_name("pattern", pattern, check_pattern)
        seq, epoch = check_place("since", since, epoch)
        if last is not None:
            check_integer("last", last, 1, MOST_RECENT)
            if seq is not None:
                raise ValueError("since and last: one of them")
        check_integer("buffer", buffer, 1)
        check_flags(stream=stream, datagrams=datagrams)
        check_function("on_event", on_event)
        supervisor = self._supervisor
        supervisor.check()
        subscriptions, present = supervisor.subscriptions, supervisor.conversation.epoch
        options = {"stream": stream, "datagrams": datagrams}
        inbox = subscriptions.subscribe(pattern, seq, epoch, buffer, present=present, **options)
        try:
            bell = Bell()
            inbox.wake = bell.ring
            supervisor.lobby.requested()
            while not inbox.begun:
                if inbox.ending is not None:
                    raise inbox.ending
                supervisor.check()
                await bell.wait()
            if last is not None:
                recent = Recent(inbox, last)
                while (wanted := recent.wanted) is not None:
                    recent.take(await self._answer(supervisor.ledger.history(pattern, *wanted)))
            yield Messages(inbox, supervisor, bell, on_event)
        finally:
            subscriptions.leave(inbox)
            supervisor.lobby.requested()

    async def history(self, pattern: str, *, limit: int = 100, before: int | str | None = None) -> Page:
        """The newest messages that match, below `before`, oldest first; `Page.more` says if there are older.

        `before` is a seq, or the cursor of a message. The broker may give fewer than `limit` at a time. Raises
        `Refused`; `TypeError` and `ValueError`, which name it, for a wrong argument.
        """
        check_name("pattern", pattern, check_pattern)
        check_integer("limit", limit, 1)
        seq, _ = check_place("before", before)
        head = self._supervisor.conversation.head
        page = await self._answer(self._supervisor.ledger.history(pattern, limit, seq))
        epoch = self._supervisor.conversation.epoch
        for message in page.messages:
            force_setattr(message, "epoch", epoch)
        # What matches nothing is complete up to where the log was before it was asked.
        upto = page.messages[-1].seq if page.messages else head if seq is None else min(head, max(seq - 1, 0))
        page.cursor = encode_cursor(upto or 0, epoch)
        return page

    async def ping(self) -> float:
        """How many seconds the broker takes to answer. Live subscriptions have their cursors moved on the way.

        Where there is no connection, that is until after the next one has been made.
        """
        began = anyio.current_time()
        await self._answer(self._supervisor.ledger.ping())
        return anyio.current_time() - began

    async def authenticate(self, token: str) -> None:
        """Say who we are; `connect` has done it, and doing it again renews the token. Raises `Refused`.

        Where `connect` was given a token, this one takes its place when another connection is made.
        """
        longest = self._supervisor.conversation.limits.get("message_size")
        check_text("token", token, None if longest is None else longest - AUTH)
        await self._supervisor.authenticate(token)

    async def _publish(
        self, requests: Iterable[tuple[int, str, Raw]], batch: Batch, *, ephemeral: bool, echo: bool
    ) -> None:
        supervisor, ledger = self._supervisor, self._supervisor.ledger
        bell = Bell()
        batch.wake = bell.ring
        try:
            for place, channel, payload in requests:
                if supervisor.congested:
                    await supervisor.wait_for_room()
                supervisor.check()
                ledger.publish(channel, payload, batch, place, ephemeral=ephemeral, echo=echo)
            supervisor.lobby.requested()
            while batch.missing:
                supervisor.check()
                await bell.wait()
        finally:
            if batch.missing:
                ledger.forget(batch)
                supervisor.lobby.room.ring()

    async def _answer(self, answer: Answer[T]) -> T:
        bell = Bell()
        answer.wake = bell.ring
        self._supervisor.lobby.requested()
        try:
            while answer.value is None:
                self._supervisor.check()
                await bell.wait()
        finally:
            self._supervisor.ledger.withdraw(answer)
        if isinstance(answer.value, Refused):
            raise answer.value
        return answer.value
