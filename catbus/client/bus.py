"""The `Bus`: the calls of an application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal, TypeVar, overload

import anyio
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
    check_retain,
    check_text,
    encode_cursor,
)
from .channel_memberships import MembershipHandle
from .connection_supervisor import ConnectionSupervisor
from .in_flight_requests import PendingReply, PublishBatch
from .live_map import LiveMap
from .live_state import K, V
from .membership import Membership, encode_info, send_info
from .message_queue import Event, InitialHistory
from .messages import Messages
from .presence_queue import PresenceQueue
from .reconnect_policy import State
from .retained_queue import RetainedQueue
from .server_messages import MemberKey, Message, Page, PresentMember, encode_payload
from .signals import Signal
from .state_queue import StateQueue

AUTH_OVERHEAD = 200
"""The largest size of an `auth` without its token, in bytes."""

MEMBERS_PER_PAGE = 1000
"""Members that are requested at once: the broker sends no more."""

T = TypeVar("T")


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
        """The limits of the broker by name: `message_size` (bytes), `subscriptions`, `pending_publishes`,
        `joined_channels`."""
        return dict(self._supervisor.protocol.limits)

    @overload
    async def publish(
        self,
        channel: str,
        payload: Any,
        *,
        ephemeral: Literal[False] = False,
        echo: bool = True,
        retain: bool = False,
        expect: int | None = None,
    ) -> int: ...

    @overload
    async def publish(self, channel: str, payload: Any, *, ephemeral: bool, echo: bool = True) -> int | None: ...

    async def publish(
        self,
        channel: str,
        payload: Any,
        *,
        ephemeral: bool = False,
        echo: bool = True,
        retain: bool = False,
        expect: int | None = None,
    ) -> int | None:
        """Publish a JSON value and return its seq once it is committed.

        An ephemeral message is delivered to the present subscribers only, and has no seq (None). With `echo=False` the
        subscriptions of this client do not receive it. A payload may be any value that msgspec encodes (NaN and
        infinities become null), or a `msgspec.Raw` that holds JSON.

        With `retain` it becomes the retained message of the channel, in place of the one before; a payload None removes
        that. With `expect` too it is published only if that is the seq of the channel's retained message, or if there
        is none and `expect` is 0. Otherwise `ConflictError` is raised, a `Refused` whose `seq` is the present one.

        If the connection is lost before the reply, or the broker does not know the outcome, the message is sent again,
        and is in the log once; later publishes wait for that. An ephemeral message is not sent again, and ends as
        `unknown`. Without a connection the call waits; set a limit with `anyio.fail_after`. At most 256 KiB and as many
        publishes as the broker allows may wait for their replies; further calls wait for room. A publish that a
        draining replica rejects goes to the next replica, unless a later one is already published.

        Raises `TypeError` for a payload that has no JSON form, and `ValueError` for arguments that exclude each other,
        before anything is sent. After `Refused` the message is
        not published and never will be, unless the code is `unknown`: then the outcome could not be found out, for
        example because the log has another epoch. The outcome is also unknown after `Disconnected`, which means that
        there will be no further connection, and after a cancellation of a publish that was sent.
        """
        signal = Signal()
        batch = PublishBatch(1, signal.notify)
        check_name("channel", channel, check_channel)
        check_flags(ephemeral=ephemeral, echo=echo, retain=retain)
        check_retain(expect, retain=retain, ephemeral=ephemeral, echo=echo)
        options = {"ephemeral": ephemeral, "echo": echo, "retain": retain, "expect": expect}
        await self._publish([(0, channel, encode_payload(payload))], batch, signal, options)
        [result] = batch.results
        if isinstance(result, Refused):
            raise result
        return result

    async def publish_many(
        self, messages: Iterable[tuple[str, Any]], *, ephemeral: bool = False, echo: bool = True, retain: bool = False
    ) -> list[int | Refused | None]:
        """Publish pairs of a channel and a payload, in order, in as few frames as possible.

        With `retain` each becomes the retained message of its channel; of several for one channel, the last one stays.
        Returns for each its seq (None for an ephemeral message) or a `Refused`. Otherwise as `publish`: after
        `Disconnected` each of them may be committed.
        """
        check_flags(ephemeral=ephemeral, echo=echo, retain=retain)
        check_retain(None, retain=retain, ephemeral=ephemeral, echo=echo)
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
        await self._publish(requests, batch, signal, {"ephemeral": ephemeral, "echo": echo, "retain": retain})
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

    @asynccontextmanager
    async def retained(self, pattern: str) -> AsyncIterator[LiveMap[str, Message]]:
        """Keep the retained messages of the channels that match `pattern`, in a mapping by channel.

            async with bus.retained("todo.*") as todos:
                print(todos["todo.7"].payload)
                async for change in todos.changes():
                    print(change.key, change.value)

        The block begins when the mapping is complete. After the loss of a connection it resumes, or if messages may be
        missing is replaced as a whole; the changes tell only the differences. It never goes back to an older state,
        except in another epoch of the log. An ephemeral message does not change it, nor one without `retain`.

        While it is open the client reads all that the broker sends, also for subscriptions whose buffer is full.

        Raises `Refused`; `TypeError` for a wrong argument.
        """
        check_name("pattern", pattern, check_pattern)
        signal = Signal()
        async with self._keep(RetainedQueue(pattern, signal.notify), signal) as messages:
            yield messages

    @asynccontextmanager
    async def presence(self, pattern: str) -> AsyncIterator[LiveMap[MemberKey, PresentMember]]:
        """Keep the members of the channels that match `pattern`, in a mapping by their `key`.

        A member is a client, with the number of its sessions in the channel, or a session without a client_id. The
        block begins when the mapping is complete. A member that loses its connection is a member until the grace of the
        broker has passed. A client that is slow gets the state of a member, not every step.

        Raises `Refused`; `TypeError` for a wrong argument.
        """
        check_name("pattern", pattern, check_pattern)
        signal = Signal()
        async with self._keep(PresenceQueue(pattern, signal.notify), signal) as members:
            yield members

    async def members(self, pattern: str) -> list[PresentMember]:
        """Return the present members of the channels that match `pattern`, in the order of the channels.

        They are read in pages: one that joins or leaves meanwhile may be in the list or not. Raises `Refused`;
        `TypeError` for a wrong argument.
        """
        check_name("pattern", pattern, check_pattern)
        members: list[PresentMember] = []
        after: str | None = None
        while True:
            request = partial(self._supervisor.in_flight.members, pattern, MEMBERS_PER_PAGE, after)
            page = await self._wait_for_reply(request)
            members += map(PresentMember.read, page.members)
            after = page.next
            if after is None:
                return members

    @asynccontextmanager
    async def join(self, channel: str, info: Any = None) -> AsyncIterator[Membership]:
        """Be a member of a channel during the block. `info` is a JSON value for other members, at most 1,024 bytes.

        The block begins when the broker has accepted it. Each next connection joins again, with the newest info.
        Leaving the block does not wait for the broker. Several blocks may join one channel: the newest info counts, and
        the session leaves with the last of them.

        Raises `Refused`, for example without a read grant for the channel, or with the code `limit` if the client is in
        as many channels as `limits["joined_channels"]`; `TypeError` for a wrong argument.
        """
        check_name("channel", channel, check_channel)
        data = encode_info(info)
        supervisor = self._supervisor
        supervisor.check_not_closed()
        handle = MembershipHandle(channel)
        try:
            await send_info(supervisor, handle, data)
            yield Membership(handle, supervisor)
        finally:
            supervisor.memberships.leave(handle)
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

    @asynccontextmanager
    async def _keep(self, queue: StateQueue[K, V], signal: Signal) -> AsyncIterator[LiveMap[K, V]]:
        """Keep the state of a queue up to date during the block, which begins when it is complete."""
        supervisor = self._supervisor
        supervisor.check_not_closed()
        supervisor.subscriptions.add(queue)
        try:
            supervisor.signals.notify_request()
            with supervisor.signals.reading():
                while not queue.ready:
                    if queue.error is not None:
                        raise queue.error
                    supervisor.check_not_closed()
                    await signal.wait()
                yield LiveMap(queue, supervisor, signal)
        finally:
            supervisor.subscriptions.unsubscribe(queue)
            supervisor.signals.notify_request()

    async def _publish(
        self,
        requests: Iterable[tuple[int, str, Raw]],
        batch: PublishBatch,
        signal: Signal,
        options: dict[str, Any],
    ) -> None:
        supervisor, in_flight = self._supervisor, self._supervisor.in_flight
        try:
            for place, channel, payload in requests:
                if supervisor.congested:
                    await supervisor.wait_for_room()
                supervisor.check_not_closed()
                in_flight.publish(channel, payload, batch, place, **options)
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
