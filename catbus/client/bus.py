"""The objects that an application uses: the `Bus`, and the `Messages` of a subscription."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal, TypeVar, overload

import anyio
from anyio.lowlevel import checkpoint
from msgspec import Raw
from msgspec.structs import force_setattr

from ..errors import Refused
from ..protocol.channels import check_channel, check_pattern
from .argument_checks import (
    MAX_LAST,
    check_flags,
    check_function,
    check_integer,
    check_name,
    check_position,
    check_text,
    encode_cursor,
)
from .connection_supervisor import ConnectionSupervisor
from .in_flight_requests import PendingReply, PublishBatch
from .message_queue import CursorUpdate, Event, InitialHistory, MessageQueue, QueuePhase
from .reconnect_policy import State
from .server_messages import Gap, Message, Page, encode_payload
from .signals import Signal

MESSAGES_PER_CHECKPOINT = 100
"""Messages that an iteration returns before it lets other tasks run."""

AUTH_OVERHEAD = 200
"""The largest size of an `auth` without its token, in bytes."""

T = TypeVar("T")


class Messages(AsyncIterator[Message]):
    """The messages of one subscription, in the order of their seqs.

    The iteration continues after the loss of a connection: no message is missing, and none is repeated. It raises
    `Refused` with the code `revoked` if the permission is withdrawn, or with another code if the broker rejects the
    subscription on the next connection. It raises `Disconnected` if there will be no further connection, after the
    messages that have already arrived. Cancelling it loses no message.
    """

    def __init__(
        self,
        queue: MessageQueue,
        supervisor: ConnectionSupervisor,
        signal: Signal,
        on_event: Callable[[Event], None] | None,
    ) -> None:
        self.gaps: list[Gap] = []
        """The messages that may be missing, oldest first."""
        self._queue = queue
        self._supervisor = supervisor
        self._signal = signal
        self._on_event = on_event
        self._low = queue.limit // 2
        self._since_checkpoint = 0

    @property
    def pattern(self) -> str:
        return self._queue.pattern

    @property
    def cursor(self) -> int:
        """The seq up to which the subscription is complete. Resume there, with `epoch`.

        It includes the last message that the iteration returned. Store it after that message has been processed.
        """
        return self._queue.cursor

    @property
    def epoch(self) -> str:
        """The epoch of the log to which `cursor` belongs."""
        return self._queue.epoch

    @property
    def resume_from(self) -> str:
        """`cursor` and `epoch` as opaque text for `since`."""
        return encode_cursor(self._queue.cursor, self._queue.epoch)

    async def __anext__(self) -> Message:
        queue = self._queue
        items = queue.items
        if self._since_checkpoint >= MESSAGES_PER_CHECKPOINT:
            await checkpoint()
            self._since_checkpoint = 0
        while True:
            if items:
                item = items.popleft()
                if queue.notify_half_empty and len(items) <= self._low:
                    self._supervisor.subscriptions.queue_drained(queue)
                    self._supervisor.signals.notify_request()
                if type(item) is Message:
                    if item.seq is not None:
                        queue.cursor = item.seq
                        force_setattr(item, "epoch", queue.epoch)
                    self._since_checkpoint += 1
                    return item
                self._apply(item)  # type: ignore[arg-type]
            elif queue.error is not None:
                raise Refused(queue.error.code, queue.error.message)
            elif queue.phase is QueuePhase.ENDED:
                raise StopAsyncIteration
            else:
                self._supervisor.check_not_closed()
                self._since_checkpoint = 0
                await self._supervisor.signals.wait_for_message(self._signal)

    def _apply(self, update: CursorUpdate) -> None:
        self._queue.cursor, self._queue.epoch = update.cursor, update.epoch
        if isinstance(update.event, Gap):
            self.gaps.append(update.event)
        if self._on_event is not None and update.event is not None:
            self._on_event(update.event)


class Bus:
    """An authenticated client, made by `connect`. Any number of tasks may use it.

    It outlives its connections: without a connection, requests wait for the next one. If there will be no further one,
    every method and every iteration raises `Disconnected`. Every method is safe to cancel; a request that was already
    sent may still take effect.
    """

    def __init__(self, supervisor: ConnectionSupervisor) -> None:
        self._supervisor = supervisor

    @property
    def state(self) -> State:
        """The state of the connection: connected, reconnecting, or closed."""
        return self._supervisor.state

    async def wait_connected(self) -> None:
        """Wait until there is a connection. Raises `Disconnected` if there will be none. Safe to cancel."""
        await self._supervisor.wait_connected()

    @property
    def transport(self) -> str:
        """The transport of the present connection, or of the last one: "websocket" or "webtransport"."""
        return self._supervisor.transport

    @property
    def client_id(self) -> str | None:
        """The client_id of the token. Others receive it as `sender`."""
        return self._supervisor.protocol.client_id

    @property
    def producer(self) -> str:
        """The producer id, by which the broker recognises retries of this client."""
        return self._supervisor.protocol.producer

    @property
    def epoch(self) -> str:
        """The epoch of the log, as the broker last reported it."""
        return self._supervisor.protocol.epoch

    @property
    def head(self) -> int:
        """The newest seq that the broker has reported in a reply or a `head`."""
        return self._supervisor.protocol.head

    @property
    def floor(self) -> int | None:
        """The oldest seq in the log when the client authenticated, or None."""
        return self._supervisor.protocol.floor

    @property
    def limits(self) -> dict[str, int]:
        """The limits of the broker by name: `message_size` (bytes), `subscriptions`, `pending_publishes`."""
        return dict(self._supervisor.protocol.limits)

    @overload
    async def publish(
        self, channel: str, payload: Any, *, ephemeral: Literal[False] = False, echo: bool = True
    ) -> int: ...

    @overload
    async def publish(self, channel: str, payload: Any, *, ephemeral: bool, echo: bool = True) -> int | None: ...

    async def publish(self, channel: str, payload: Any, *, ephemeral: bool = False, echo: bool = True) -> int | None:
        """Publish a JSON value and return its seq once it is committed.

        An ephemeral message is delivered to the present subscribers only, and has no seq (None). With `echo=False` the
        subscriptions of this client do not receive it. A payload may be any value that msgspec encodes (NaN and
        infinities become null), or a `msgspec.Raw` that holds JSON.

        If the connection is lost before the reply, or the broker does not know the outcome, the message is sent again,
        and is in the log once; later publishes wait for that. An ephemeral message is not sent again, and ends as
        `unknown`. Without a connection the call waits; set a limit with `anyio.fail_after`. At most 256 KiB and as many
        publishes as the broker allows may wait for their replies; further calls wait for room. A publish that a
        draining replica rejects goes to the next replica, unless a later one is already published.

        Raises `TypeError` for a payload that has no JSON form, before anything is sent. After `Refused` the message is
        not published and never will be, unless the code is `unknown`: then the outcome could not be found out, for
        example because the log has another epoch. The outcome is also unknown after `Disconnected`, which means that
        there will be no further connection, and after a cancellation of a publish that was sent.
        """
        signal = Signal()
        batch = PublishBatch(1, signal.notify)
        check_name("channel", channel, check_channel)
        check_flags(ephemeral=ephemeral, echo=echo)
        await self._publish([(0, channel, encode_payload(payload))], batch, signal, ephemeral=ephemeral, echo=echo)
        [result] = batch.results
        if isinstance(result, Refused):
            raise result
        return result

    async def publish_many(
        self, messages: Iterable[tuple[str, Any]], *, ephemeral: bool = False, echo: bool = True
    ) -> list[int | Refused | None]:
        """Publish pairs of a channel and a payload, in order, in as few frames as possible.

        Returns for each its seq (None for an ephemeral message) or a `Refused`. Otherwise as `publish`: after
        `Disconnected` each of them may be committed.
        """
        check_flags(ephemeral=ephemeral, echo=echo)
        requests = []
        rejected = []
        for place, message in enumerate(messages):
            if not isinstance(message, tuple | list) or len(message) != 2:
                raise TypeError(f"messages[{place}]: a pair of a channel and a payload")
            channel, payload = message
            try:
                check_name(f"channel of messages[{place}]", channel, check_channel)
            except Refused as error:
                rejected.append((place, error))
            else:
                requests.append((place, channel, encode_payload(payload)))
        signal = Signal()
        batch = PublishBatch(len(requests) + len(rejected), signal.notify)
        for place, reason in rejected:
            batch.settle(place, reason)
        await self._publish(requests, batch, signal, ephemeral=ephemeral, echo=echo)
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
        """Subscribe to the channels that match `pattern`. Leaving the block does not wait for the broker.

        | Start | begins with |
        |---|---|
        | (none) | new messages |
        | `since` | every message after a position: a `cursor`, a `resume_from`, or a seq with its `epoch` |
        | `last` | the newest `last` messages of the log, then new ones, without a gap or a repeat |

        `on_event` is called by the iteration, in order with the messages, with each `Gap` (messages may be missing),
        `Live` (the subscription has caught up) and `Head` (it is complete up to there).

        Over WebTransport, `stream` requests a stream of its own, if the connection has one to give: a lost packet of
        one subscription then delays no other. `datagrams` requests small ephemeral messages as datagrams. Other
        transports ignore both.

        Up to `buffer` messages wait for the application. When the buffer is full the client stops reading from the
        connection, and the broker keeps the rest in its log. The client reads on while a task waits for a reply or for
        a message of another subscription; up to 8 MiB more are kept then. Beyond that, or after reading was paused for
        10 s, the subscription is paused at the broker, and resumed at its cursor when `buffer` is half empty. After
        that, and after the loss of a connection, no message is missing or repeated, except ephemeral ones.

        Any number of tasks may subscribe to one pattern, each with its own start and buffer. They share one
        subscription at the broker, which ends with the last of them, and uses `stream` and `datagrams` once one of them
        requests it. When one begins at an older position, the others wait until the broker has caught up. An iteration
        that is always much slower than the others needs a bus of its own.

        Raises `Refused`; `TypeError` and `ValueError`, which name it, for a wrong argument.
        """
        check_name("pattern", pattern, check_pattern)
        seq, epoch = check_position("since", since, epoch)
        if last is not None:
            check_integer("last", last, 1, MAX_LAST)
            if seq is not None:
                raise ValueError("since and last: one of them")
        check_integer("buffer", buffer, 1)
        check_flags(stream=stream, datagrams=datagrams)
        check_function("on_event", on_event)
        supervisor = self._supervisor
        supervisor.check_not_closed()
        subscriptions, present = supervisor.subscriptions, supervisor.protocol.epoch
        signal = Signal()
        queue = subscriptions.subscribe(
            pattern,
            seq,
            epoch,
            buffer,
            present=present,
            stream=stream,
            datagrams=datagrams,
            wake=signal.notify,
        )
        try:
            supervisor.signals.notify_request()
            while not queue.started:
                if queue.error is not None:
                    raise queue.error
                supervisor.check_not_closed()
                await signal.wait()
            if last is not None:
                history = InitialHistory(queue, last)
                while (wanted := history.next_request) is not None:
                    request = partial(supervisor.in_flight.history, pattern, *wanted)
                    history.add_page(await self._wait_for_reply(request))
            yield Messages(queue, supervisor, signal, on_event)
        finally:
            subscriptions.unsubscribe(queue)
            supervisor.signals.notify_request()

    async def history(self, pattern: str, *, limit: int = 100, before: int | str | None = None) -> Page:
        """Return the newest messages that match, below `before`, oldest first. `Page.more`: there are older ones.

        `before` is a seq, or the cursor of a message. The broker may return fewer than `limit` at a time. Raises
        `Refused`; `TypeError` and `ValueError`, which name it, for a wrong argument.
        """
        check_name("pattern", pattern, check_pattern)
        check_integer("limit", limit, 1)
        seq, _ = check_position("before", before)
        head = self._supervisor.protocol.head
        page = await self._wait_for_reply(partial(self._supervisor.in_flight.history, pattern, limit, seq))
        epoch = self._supervisor.protocol.epoch
        for message in page.messages:
            force_setattr(message, "epoch", epoch)
        # An empty page is complete up to the head before the request.
        upto = page.messages[-1].seq if page.messages else head if seq is None else min(head, max(seq - 1, 0))
        page.cursor = encode_cursor(upto or 0, epoch)
        return page

    async def ping(self) -> float:
        """Return the round-trip time in seconds. The broker also updates the cursors of live subscriptions.

        Without a connection it includes the time until the next one.
        """
        began = anyio.current_time()
        await self._wait_for_reply(self._supervisor.in_flight.ping)
        return anyio.current_time() - began

    async def authenticate(self, token: str) -> None:
        """Renew the token on the present connection. Raises `Refused`.

        If `connect` was given a token, not a function, later connections use the new one.
        """
        limit = self._supervisor.protocol.limits.get("message_size")
        check_text("token", token, None if limit is None else limit - AUTH_OVERHEAD)
        await self._supervisor.authenticate(token)

    async def _publish(
        self,
        requests: Iterable[tuple[int, str, Raw]],
        batch: PublishBatch,
        signal: Signal,
        *,
        ephemeral: bool,
        echo: bool,
    ) -> None:
        supervisor, in_flight = self._supervisor, self._supervisor.in_flight
        try:
            for place, channel, payload in requests:
                if supervisor.congested:
                    await supervisor.wait_for_room()
                supervisor.check_not_closed()
                in_flight.publish(channel, payload, batch, place, ephemeral=ephemeral, echo=echo)
            supervisor.signals.notify_request()
            while batch.missing:
                supervisor.check_not_closed()
                await signal.wait()
        finally:
            if batch.missing:
                in_flight.cancel_batch(batch)
                supervisor.signals.progress.notify()

    async def _wait_for_reply(self, request: Callable[[Callable[[], None]], PendingReply[T]]) -> T:
        """Make a request, whose argument is the function to wake this task, and wait for its reply."""
        signal = Signal()
        reply = request(signal.notify)
        self._supervisor.signals.notify_request()
        try:
            while reply.value is None:
                self._supervisor.check_not_closed()
                await signal.wait()
        finally:
            self._supervisor.in_flight.cancel_request(reply)
        if isinstance(reply.value, Refused):
            raise reply.value
        return reply.value
