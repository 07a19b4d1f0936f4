"""One subscription at the broker, the queues that share it, and the stream on which it arrives. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import PeerError
from ..protocol import wire_messages as wire
from .message_queue import MessageQueue, QueuePhase
from .server_messages import ServerMessage

Decode = Callable[[bytes], Iterator[ServerMessage | PeerError | None]]


class IncomingStream:
    """One stream of the broker, and the subscriptions whose messages arrive on it.

    `decode` splits its bytes into objects. `connection` is the connection that has the stream.
    """

    __slots__ = ("connection", "decode", "epoch", "not_started", "routes")

    def __init__(self, decode: Decode, connection: object, epoch: str) -> None:
        self.decode = decode
        self.connection = connection
        self.epoch = epoch
        """The epoch of the log that arrives here. Two streams may be in different epochs for a while."""
        self.routes: dict[str, SharedSubscription] = {}
        """The subscription of each pattern. A message for another pattern is of a subscription that has ended."""
        self.not_started: dict[str, SharedSubscription] = {}
        """Subscriptions about which the stream has said nothing since `subscribed`: they may be in an older epoch."""

    @property
    def subscriptions(self) -> list[SharedSubscription]:
        return [*self.routes.values(), *self.not_started.values()]

    def find(self, pattern: str | None) -> SharedSubscription | None:
        """Find the subscription of a pattern, whether the stream has named it since `subscribed` or not."""
        return self.routes.get(pattern) or self.not_started.get(pattern)  # type: ignore[arg-type]  # no pattern is None

    def confirm(self, pattern: str) -> SharedSubscription | None:
        """Find the subscription of a pattern that a message on this stream names."""
        subscription = self.not_started.pop(pattern, None)
        if subscription is not None:
            self.routes[pattern] = subscription
        return self.routes.get(pattern)

    def start_route(self, pattern: str | None) -> SharedSubscription | None:
        """Find the subscription of a message that has no route yet: the message may be its first."""
        if pattern not in self.not_started:
            return None
        subscription = self.confirm(pattern)
        if subscription is not None:
            for queue in subscription.receivers:
                queue.confirm_epoch(self.epoch)
        return subscription


class SharedSubscription:
    """One subscription at the broker, and the queues that share it.

    A `subscribe` names the lowest cursor of its queues, and each queue drops what it already has. Only the reply to the
    newest `subscribe` counts. One `subscribe` covers queues of one epoch, because the broker finds what is missing by
    the epoch of a cursor, or only queues without a cursor, if one of them needs a snapshot. The other queues are
    requested once this one has caught up.
    """

    __slots__ = ("covered", "datagrams", "epoch", "has_snapshot", "held_ids", "incoming", "is_live", "pattern",
                 "queues", "received_seq", "receivers", "request_id", "since", "stream")  # fmt: skip

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.stream = self.datagrams = False
        """Whether to request a stream of its own, and ephemeral messages as datagrams."""
        self.queues: dict[MessageQueue, None] = {}
        """All queues that have not ended."""
        self.receivers: tuple[MessageQueue, ...] = ()
        """The queues that receive what arrives."""
        self.incoming: IncomingStream | None = None
        """The stream on which the broker sends it."""
        self.request_id: int | None = None
        """The id of the newest `subscribe` while it has no reply."""
        self.held_ids: set[int] = set()
        """The ids of each `subscribe` for which the broker may hold it: accepted, or without a reply."""
        self.covered: tuple[MessageQueue, ...] = ()
        """The queues that the newest `subscribe` covers."""
        self.since: int | None = None
        self.epoch = ""
        """The cursor of the newest `subscribe`."""
        self.has_snapshot = False
        """Whether the newest `subscribe` is to begin with the retained messages."""
        self.received_seq = 0
        """The newest seq that arrived."""
        self.is_live = False
        """Whether it has caught up, so that a `head` applies to it."""

    def forget_requests(self) -> None:
        """Forget what was requested of the broker, and what it holds."""
        self.request_id = None
        self.held_ids.clear()

    @property
    def has_room(self) -> bool:
        """Whether a queue is not paused."""
        return any(queue.phase is not QueuePhase.PAUSED for queue in self.queues)

    def make_subscribe(self, number: int, head: int, epoch: str) -> wire.Subscribe:
        """Make the `subscribe` that covers as many queues as possible, for a log of this epoch and head.

        It does not request again what waits in the queues.
        """
        present = [queue for queue in self.queues if queue.phase is not QueuePhase.PAUSED]
        self.has_snapshot = any(queue.needs_snapshot for queue in present)
        if self.has_snapshot:
            # What still arrives for it belongs to another snapshot.
            self.receivers = tuple(queue for queue in self.receivers if not queue.needs_snapshot)
        resumed = [] if self.has_snapshot else [queue for queue in present if queue.has_cursor]
        # A queue of another epoch comes first: the reply of the broker moves it into the present one.
        first = min(resumed, key=lambda queue: (queue in self.receivers, queue.received_epoch == epoch), default=None)
        self.since, named_epoch = None, None
        together: list[MessageQueue] = []
        if first is not None:
            self.epoch = first.received_epoch
            together = [queue for queue in resumed if queue.received_epoch == first.received_epoch]
            self.since = min(queue.received_seq for queue in together)
            if len(resumed) < len(present) and first.received_epoch == epoch:
                # A new queue begins at the head, and the cursor of another queue may be above that.
                self.since = min(self.since, head)
            if any(queue.sends_epoch for queue in together):
                named_epoch = first.received_epoch or None
        self.covered = tuple(queue for queue in present if queue in together or not queue.has_cursor)
        for queue in together:
            queue.sends_epoch = True
        for queue in present:
            queue.phase = QueuePhase.REQUESTED
        self.request_id = number
        return wire.Subscribe(
            self.pattern,
            self.since,
            named_epoch,
            self.stream,
            self.datagrams,
            retained=any(queue.wants_retained for queue in self.queues),
            presence=any(queue.wants_presence for queue in self.queues),
            id=number,
        )
