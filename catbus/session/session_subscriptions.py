"""The subscriptions of one session: in the state machine, in delivery, and on streams of their own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import trio

from ..delivery.send_queue import SendQueue
from ..delivery.subscription import Subscription
from ..errors import PeerError
from ..protocol.wire_messages import ProtocolVersion, Subscribe, Unsubscribe
from .services import SessionServices
from .session_presence import SessionPresence
from .state_machine import Session
from .transport_streams import Streams


class SessionSubscriptions:
    """Begins and ends the subscriptions of a session. `streams`: the streams of its transport, if that has several."""

    __slots__ = ("_presence", "_services", "_session", "_streams")

    def __init__(
        self, session: Session, services: SessionServices, presence: SessionPresence, streams: Streams | None
    ) -> None:
        self._session = session
        self._services = services
        self._presence = presence
        self._streams = streams

    def subscribe(self, request: Subscribe) -> None:
        """Begin a subscription, or begin it again. Its reply is the first line in its send queue."""
        delivery, session, streams = self._services.delivery, self._session, self._streams
        pattern, cursor = request.pattern, delivery.position
        known = session.subscriptions.get(pattern)
        if known is not None and known.lagging and request.retained and request.since is None:
            # What it has not got yet follows the snapshot. Its cursor may be above all that this replica has.
            cursor = min(cursor, known.cursor)
        replaced = self._remove(pattern)
        if replaced is not None:
            self._end_stream(replaced)
        else:
            try:
                self._services.client_usages.check_subscriptions(session.usage)
            except PeerError as error:
                session.reject_request(request, error)
                return
        subscription = None
        if session.protocol is ProtocolVersion.FIRST:
            subscription = next(iter(session.subscriptions.values()), None)
        if subscription is None:
            own_stream, send_datagram = None, None
            if streams is not None and request.stream:
                own_stream = streams.open_stream(partial(self._handle_stopped, pattern))
            if streams is not None and request.datagrams:
                send_datagram = streams.send_datagram
            send_queue = session.send_queue if own_stream is None else own_stream
            subscription = Subscription(
                send_queue, session.producer, send_datagram, retained=request.retained, client=session.usage.client
            )
        session.subscribed(request, subscription, cursor, self._services.log.epoch)
        self._services.client_usages.add_subscriptions(session.usage, 1)
        if request.retained and request.since is None:
            delivery.subscribe_from_snapshot(subscription, (pattern,), cursor)
        else:
            delivery.subscribe(subscription, pattern, request.since, request.epoch)
        if request.presence:
            self._presence.watch(pattern, subscription.send_queue)

    def subscribe_event_stream(
        self,
        patterns: Collection[str],
        since: int | None,
        epoch: str | None,
        *,
        retained: bool = False,
        presence: bool = False,
    ) -> None:
        """Begin one subscription to all patterns, with one cursor. Raises `PeerError`."""
        services, session = self._services, self._session
        session.check_subscribe(patterns)
        services.client_usages.check_subscriptions(session.usage, len(patterns))
        # A stream has no producer: what it filtered would come after it was resumed.
        subscription = Subscription(session.send_queue, retained=retained, client=session.usage.client)
        session.subscriptions.update(dict.fromkeys(patterns, subscription))
        services.client_usages.add_subscriptions(session.usage, len(patterns))
        services.delivery.subscribe_all(subscription, patterns, since, epoch)
        for pattern in patterns if presence else ():
            self._presence.watch(pattern, session.send_queue)

    def unsubscribe(self, request: Unsubscribe) -> None:
        """End a subscription, and acknowledge it after its last message."""
        subscription = self._remove(request.pattern)
        send_queue = None if subscription is None else subscription.send_queue
        self._session.unsubscribed(request, self._services.delivery.position, send_queue)
        if subscription is not None:
            self._end_stream(subscription)

    def revoke(self, patterns: Sequence[str]) -> bool:
        """End these subscriptions with `revoked`, and drop their messages. Return whether there were any."""
        ended = self.withdraw(patterns)
        for pattern, subscription in ended.items():
            self._session.revoked(pattern, self._services.delivery.position, subscription.send_queue)
            self._end_stream(subscription)
        return bool(ended)

    def withdraw(self, patterns: Sequence[str]) -> dict[str, Subscription]:
        """End these subscriptions without a reply, drop their messages, and return them by pattern."""
        ended = {p: subscription for p in patterns if (subscription := self._remove(p)) is not None}
        revoked: dict[SendQueue, set[str]] = {}
        for pattern, subscription in ended.items():
            revoked.setdefault(subscription.send_queue, set()).add(pattern)
        for subscription in dict.fromkeys(ended.values()):
            if (dropped := revoked.pop(subscription.send_queue, None)) is not None:
                subscription.send_queue.revoke(dropped, subscription.patterns)
        return ended

    async def wait_until_read(self, pattern: str) -> None:
        """Wait while send queues hold too many messages that cannot be read from the log again.

        A reply about `pattern` makes those before it in its send queue such messages.
        """
        own, subscription = self._session.send_queue, self._session.subscriptions.get(pattern)
        for send_queue in (own,) if subscription is None else (own, subscription.send_queue):
            while send_queue.to_be_emptied:
                emptied = trio.Event()
                send_queue.when_emptied(emptied.set)
                await emptied.wait()

    def close(self) -> None:
        """End all subscriptions, because the connection has ended."""
        for pattern in list(self._session.subscriptions):
            subscription = self._remove(pattern)
            assert subscription is not None
            subscription.send_queue.close()

    def _handle_stopped(self, pattern: str, send_queue: SendQueue) -> None:
        """End a subscription whose own stream was stopped by the peer, or was not read for too long."""
        subscription = self._session.subscriptions.get(pattern)
        if subscription is not None and subscription.send_queue is send_queue:
            self._remove(pattern)
            self._session.unsubscribed(Unsubscribe(pattern), self._services.delivery.position)

    def _remove(self, pattern: str) -> Subscription | None:
        """Deliver nothing more for a pattern. Return its subscription, or None without one."""
        subscription = self._session.remove_subscription(pattern)
        self._presence.unwatch(pattern)
        if subscription is not None:
            self._services.delivery.unsubscribe(subscription, pattern)
            self._services.client_usages.add_subscriptions(self._session.usage, -1)
        return subscription

    def _end_stream(self, subscription: Subscription) -> None:
        if subscription.send_queue is not self._session.send_queue and self._streams is not None:
            self._streams.end_stream(subscription.send_queue)
