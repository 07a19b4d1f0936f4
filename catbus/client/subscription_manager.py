"""The subscriptions of one client, which outlive its connections. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..error_codes import RETRYABLE, ErrorCode
from ..errors import Refused
from ..protocol import wire_messages as wire
from .in_flight_requests import RequestSender
from .message_queue import MessageQueue, QueuePhase
from .presence_queue import PresenceQueue
from .retained_queue import RetainedQueue
from .server_messages import Message, SnapshotPage
from .shared_subscription import IncomingStream, SharedSubscription

MAX_EXCESS_BYTES = 8 * 1024 * 1024
"""Bytes that may be added to a full queue while a task waits for what the broker sends after them."""

MESSAGE_OVERHEAD = 256
"""Approximate memory of a message beside its payload, in bytes."""


def _do_nothing() -> None:
    pass


class SubscriptionManager:
    """The subscriptions of one client. `next_id` returns the id of the next request.

    All queues of a pattern share one `SharedSubscription`. Replies come on several streams and so in any order; ids
    match them to requests. A subscription receives from one connection at a time: the last one that accepted its
    `subscribe`, which named its cursor. So nothing is missing between two connections, and seqs show what comes twice.
    `on_retry` is called when something waits for `retry` on the present connection.
    """

    def __init__(self, next_id: Callable[[], int], on_retry: Callable[[], None] = _do_nothing) -> None:
        self.full_queues: dict[MessageQueue, None] = {}
        self._connection: RequestSender | None = None
        """The connection for new requests."""
        self._next_id = next_id
        self._on_retry = on_retry
        self._by_pattern: dict[str, SharedSubscription] = {}
        self._requests: dict[int, SharedSubscription | None] = {}
        """Requests without a reply: the `subscribe` of a subscription, or (None) an `unsubscribe`."""
        self._to_retry: dict[SharedSubscription, None] = {}

    @property
    def retry_pending(self) -> bool:
        """Whether a subscription waits for `retry`."""
        return bool(self._to_retry)

    @property
    def awaiting_reply(self) -> bool:
        """Whether a request has no reply."""
        return bool(self._requests)

    def subscribe(
        self,
        pattern: str,
        since: int | None,
        epoch: str | None,
        limit: int,
        *,
        present: str = "",
        stream: bool = False,
        datagrams: bool = False,
        wake: Callable[[], None] = _do_nothing,
    ) -> MessageQueue:
        """Add a queue of `limit` messages for a pattern. Without an `epoch` its cursor is of the `present` one.

        The queue has `started` or is ENDED now, or when the broker replies.
        """
        subscription = self._by_pattern.setdefault(pattern, SharedSubscription(pattern))
        more = (stream and not subscription.stream) or (datagrams and not subscription.datagrams)
        subscription.stream = subscription.stream or stream
        subscription.datagrams = subscription.datagrams or datagrams
        named = epoch is not None or since is None
        queue = MessageQueue(pattern, since, epoch or present, limit, sends_epoch=named, wake=wake)
        subscription.queues[queue] = None
        connection, incoming = self._connection, subscription.incoming
        if since is not None or more or connection is None or (subscription.since or 0) > connection.head:
            self._send_subscribe(subscription)
        elif subscription.request_id is not None:
            subscription.covered += (queue,)
        elif incoming is not None and incoming.connection is connection and pattern in incoming.routes:
            # New messages arrive already.
            arrived = subscription.received_seq
            queue.start(
                max(arrived, connection.head) if incoming.epoch == connection.epoch else arrived, incoming.epoch
            )
            subscription.receivers += (queue,)
        else:
            self._send_subscribe(subscription)
        return queue

    def add(self, queue: MessageQueue) -> None:
        """Add the queue of a live map. Some time after the reply of the broker its state is `ready`, or it is ENDED."""
        subscription = self._by_pattern.setdefault(queue.pattern, SharedSubscription(queue.pattern))
        subscription.queues[queue] = None
        self._send_subscribe(subscription)

    def find_for_datagram(self, pattern: str | None, connection: RequestSender) -> SharedSubscription | None:
        """Find the subscription of a datagram, which belongs to no stream, if this connection sends for it."""
        subscription = self._by_pattern.get(pattern) if pattern is not None else None
        if subscription is None or subscription.incoming is None or subscription.incoming.connection is not connection:
            return None
        return subscription

    def unsubscribe(self, queue: MessageQueue) -> None:
        """End a queue for the application. The subscription ends with its last queue."""
        if queue.phase is QueuePhase.ENDED:
            return
        subscription = self._by_pattern[queue.pattern]
        self._close(queue, None)
        if queue.wants_presence and subscription.has_room:
            # Without presence, unless another queue wants it.
            self._send_subscribe(subscription)

    def queue_full(self, queue: MessageQueue, message: Message) -> None:
        """Account for a message that was added to a full queue."""
        queue.notify_half_empty = True
        queue.excess_bytes += len(message.raw) + MESSAGE_OVERHEAD
        self.full_queues[queue] = None
        if queue.excess_bytes > MAX_EXCESS_BYTES:
            self.pause_queue(queue)

    def pause_queue(self, queue: MessageQueue) -> None:
        """Add nothing more to a full queue. `queue_drained` resumes it at its cursor."""
        self.full_queues.pop(queue, None)
        subscription = self._by_pattern.get(queue.pattern)
        if subscription is None or queue not in subscription.queues:
            return
        subscription.receivers = tuple(each for each in subscription.receivers if each is not queue)
        # A queue that is already requested again resumes with the reply.
        if queue.phase is QueuePhase.ACTIVE:
            queue.phase = QueuePhase.PAUSED
            if not subscription.has_room:
                self._send_unsubscribe(subscription)

    def queue_drained(self, queue: MessageQueue) -> None:
        """Resume a queue: the application has taken enough of its messages."""
        queue.notify_half_empty = False
        queue.excess_bytes = 0
        self.full_queues.pop(queue, None)
        if queue.phase is QueuePhase.PAUSED:
            queue.phase = QueuePhase.REQUESTED
            self._send_subscribe(self._by_pattern[queue.pattern])

    # Changes of the connection

    def resume(self, connection: RequestSender) -> None:
        """Resume every subscription at its cursor over a new connection.

        An older connection that is still open delivers to each of them until the new one has replied.
        """
        self._connection = connection
        self._forget_requests()
        for subscription in self._by_pattern.values():
            if subscription.has_room:
                self._send_subscribe(subscription)

    def connection_lost(self, connection: RequestSender, streams: Iterable[IncomingStream]) -> None:
        """Detach the subscriptions from the streams of a lost connection. They wait for the next one."""
        for incoming in streams:
            for subscription in incoming.subscriptions:
                for queue in subscription.receivers:
                    self.full_queues.pop(queue, None)
                self._detach(subscription)
        if self._connection is connection:
            self._connection = None
            self._forget_requests()
            for subscription in self._by_pattern.values():
                for queue in subscription.queues:
                    if queue.phase is QueuePhase.ACTIVE:
                        queue.phase = QueuePhase.REQUESTED

    def wake_all(self) -> None:
        """Wake all waiting tasks, because there will be no further connection. They find that out themselves."""
        for subscription in self._by_pattern.values():
            for queue in subscription.queues:
                queue.wake()

    # Messages of the broker

    def handle_subscribed(self, reply: wire.Subscribed, incoming: IncomingStream) -> None:
        if reply.epoch is not None:
            incoming.epoch = reply.epoch
        subscription = self._take_request(reply.id)
        if subscription is None:
            return
        # What was requested before is replaced.
        subscription.held_ids.intersection_update((reply.id,))
        self._detach(subscription)
        subscription.incoming = incoming
        begins = subscription.since is None
        subscription.is_live = begins and not subscription.has_snapshot
        (incoming.routes if begins else incoming.not_started)[subscription.pattern] = subscription
        subscription.received_seq = reply.seq if subscription.since is None else subscription.since
        # With a cursor of another epoch, a gap may follow, so it is not known where a new queue would begin.
        crossing = subscription.since is not None and subscription.epoch != incoming.epoch
        subscription.receivers = tuple(
            queue
            for queue in subscription.covered
            if queue.phase is QueuePhase.REQUESTED
            and (queue.has_cursor or not crossing)
            and (subscription.has_snapshot or not queue.needs_snapshot)
        )
        for queue in subscription.receivers:
            # A lagging replica delivers from `since` on, not from its own position.
            queue.start(max(reply.seq, subscription.received_seq), incoming.epoch)

    def handle_unsubscribed(self, reply: wire.Unsubscribed, connection: RequestSender) -> None:
        """Handle the end of a subscription: requested, or because its own stream was not read for too long.

        In the second case the subscription resumes at its cursor.
        """
        if reply.id is not None:
            self._take_request(reply.id)
            return
        subscription = self._by_pattern.get(reply.pattern)
        if subscription is None or connection is not self._connection:
            return
        subscription.held_ids.intersection_update(self._requests)
        if not subscription.has_room or subscription.request_id is not None:
            return
        if subscription.incoming is None or subscription.incoming.connection is connection:
            self._detach(subscription)
            self._send_subscribe(subscription)

    def stream_reset(self, incoming: IncomingStream) -> None:
        """Detach the subscription of a stream that the broker has reset. `unsubscribed` or a reply decides the rest."""
        for subscription in incoming.subscriptions:
            self._detach(subscription)

    def stream_ended(self, incoming: IncomingStream) -> bool:
        """Detach the subscription of a stream that has ended. Returns True if it had neither ended nor moved."""
        left = incoming.subscriptions
        self.stream_reset(incoming)
        return any(subscription.request_id is None for subscription in left)

    def handle_subscribe_error(self, reply: wire.SubscribeError) -> bool:
        """Handle the rejection of a request. Returns False if no request without a reply has this id."""
        known = reply.id in self._requests
        if reply.id is not None and (requested := self._requests.get(reply.id)) is not None:
            requested.held_ids.discard(reply.id)
        subscription = self._take_request(reply.id)
        if subscription is None:
            return known
        # A rejected `subscribe` leaves the subscription in place that it was to replace.
        incoming = subscription.incoming
        if incoming is not None and incoming.connection is self._connection:
            for queue in subscription.receivers:
                queue.phase = QueuePhase.ACTIVE
        for queue in [queue for queue in subscription.queues if queue.phase is QueuePhase.REQUESTED]:
            if queue.started and reply.code in RETRYABLE:
                self._to_retry[subscription] = None
            else:
                self._close(queue, Refused(reply.code, reply.message))
        if subscription in self._to_retry:
            self._on_retry()
        return True

    def retry(self) -> None:
        """Send again the `subscribe` requests that the broker could not serve."""
        again, self._to_retry = self._to_retry, {}
        for subscription in again:
            if subscription.request_id is None and self._has_requested(subscription):
                self._send_subscribe(subscription)

    def handle_revoked(self, reply: wire.Revoked, incoming: IncomingStream) -> None:
        subscription = incoming.confirm(reply.pattern)
        if subscription is not None:
            if subscription.request_id is None:
                # The broker has already ended it.
                subscription.forget_requests()
                self._detach(subscription)
            for queue in list(subscription.queues):
                self._close(queue, Refused(ErrorCode.REVOKED, "the permission was withdrawn"))

    def handle_live(self, event: wire.Live, incoming: IncomingStream) -> None:
        subscription = incoming.confirm(event.pattern)
        if subscription is None:
            return
        subscription.is_live = True
        subscription.received_seq = max(subscription.received_seq, event.seq)
        for queue in subscription.receivers:
            queue.update_cursor(event, event.seq, incoming.epoch)
        idle = subscription.request_id is None and subscription not in self._to_retry
        if incoming.connection is self._connection and idle and self._has_requested(subscription):
            # The other queues are of another epoch.
            self._send_subscribe(subscription)

    def handle_gap(self, event: wire.Gap, incoming: IncomingStream) -> None:
        subscription = incoming.confirm(event.pattern)
        if subscription is not None:
            subscription.received_seq = event.last
            for queue in subscription.receivers:
                queue.add_gap(event)

    def handle_snapshot_page(self, page: SnapshotPage, incoming: IncomingStream) -> None:
        for queue in self._receivers(page.pattern, incoming):
            if isinstance(queue, RetainedQueue):
                queue.add_page(page)

    def handle_members(self, page: wire.MemberList, incoming: IncomingStream) -> None:
        for queue in self._receivers(page.pattern, incoming):
            if isinstance(queue, PresenceQueue):
                queue.add_page(page)

    def handle_presence(self, change: wire.PresenceChange, incoming: IncomingStream) -> None:
        for queue in self._receivers(change.pattern, incoming):
            if isinstance(queue, PresenceQueue):
                queue.add_change(change)

    def handle_head(self, event: wire.Head, incoming: IncomingStream) -> None:
        for subscription in incoming.routes.values():
            if subscription.is_live:
                for queue in subscription.receivers:
                    queue.update_cursor(event, event.seq, event.epoch)

    # Helpers

    def _receivers(self, pattern: str | None, incoming: IncomingStream) -> tuple[MessageQueue, ...]:
        subscription = incoming.find(pattern)
        return () if subscription is None else subscription.receivers

    def _has_requested(self, subscription: SharedSubscription) -> bool:
        return any(queue.phase is QueuePhase.REQUESTED for queue in subscription.queues)

    def _send_subscribe(self, subscription: SharedSubscription) -> None:
        connection = self._connection
        if connection is not None:
            number = self._next_id()
            subscription.held_ids.add(number)
            connection.send_request(subscription.make_subscribe(number, connection.head, connection.epoch))
            self._requests[number] = subscription

    def _send_unsubscribe(self, subscription: SharedSubscription) -> None:
        """End the subscription at the broker, if the broker may hold it."""
        connection = self._connection
        if connection is not None and subscription.held_ids:
            number = self._next_id()
            connection.send_request(wire.Unsubscribe(subscription.pattern, number))
            self._requests[number] = None
        subscription.forget_requests()
        self._detach(subscription)

    def _take_request(self, number: int | None) -> SharedSubscription | None:
        """Take the subscription to which a reply belongs, if it is the reply to its newest `subscribe`."""
        subscription = self._requests.pop(number, None) if number is not None else None
        if subscription is None or subscription.request_id != number:
            return None
        subscription.request_id = None
        return subscription

    def _forget_requests(self) -> None:
        """Forget the requests of a connection that has a successor: their replies do not count."""
        self._requests.clear()
        self._to_retry.clear()
        for subscription in self._by_pattern.values():
            subscription.forget_requests()

    def _close(self, queue: MessageQueue, error: Refused | None) -> None:
        self.full_queues.pop(queue, None)
        subscription = self._by_pattern[queue.pattern]
        had_room = subscription.has_room
        del subscription.queues[queue]
        subscription.receivers = tuple(each for each in subscription.receivers if each is not queue)
        if had_room and not subscription.has_room:
            self._send_unsubscribe(subscription)
        if not subscription.queues:
            del self._by_pattern[queue.pattern]
            self._to_retry.pop(subscription, None)
        queue.end(error)

    def _detach(self, subscription: SharedSubscription) -> None:
        incoming, subscription.incoming = subscription.incoming, None
        subscription.receivers = ()
        if incoming is not None:
            for routes in (incoming.routes, incoming.not_started):
                if routes.get(subscription.pattern) is subscription:
                    del routes[subscription.pattern]
