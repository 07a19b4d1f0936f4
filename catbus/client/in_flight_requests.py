"""The table of requests without a reply, which outlives connections. Pure.

A publish is sent in order and kept until it is acknowledged. If the connection is lost first, or the broker does not
know the outcome, the outcome is uncertain. The publish is then sent again under its id, so that the broker recognises a
duplicate: on the next connection by `resume`, on the same connection by `retry`. Unsent publishes wait until no outcome
is uncertain, and follow in the order in which the application made them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from msgspec import Raw, structs

from ..error_codes import ErrorCode
from ..errors import Refused
from ..protocol import wire_messages as wire
from .server_messages import Page

MAX_TRIES = 6
"""How often one connection sends a publish whose outcome stays uncertain."""

MAX_LOST_CONNECTIONS = 8
"""How many connections in a row may be lost while one publish is the oldest without a reply.

Newer publishes wait for it, so a publish that ends every connection would block all that follow.
"""

PUBLISH_OVERHEAD = 200
"""Approximate memory of an unsent publish beside its payload, in bytes."""

TRANSIENT_CODES = frozenset({ErrorCode.UNKNOWN, ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED, ErrorCode.RATE_LIMITED})
"""Errors after which the same connection may be able to tell the outcome of a publish."""

T = TypeVar("T")

Result = int | Refused | None


def _do_nothing() -> None:
    pass


class PendingReply(Generic[T]):
    """The reply to a request, once it arrives. `wake` is called then, and when there will be no reply."""

    __slots__ = ("value", "wake", "wanted")

    def __init__(self, wake: Callable[[], None] = _do_nothing) -> None:
        self.value: T | Refused | None = None
        self.wanted = True
        """False once the task that waited was cancelled."""
        self.wake = wake

    def settle(self, value: T | Refused) -> None:
        self.value = value
        self.wake()


class PublishBatch:
    """The results of publishes that one task waits for: a seq, None for an ephemeral message, or an error.

    `wake` is called when no result is missing, and when there will be no further result.
    """

    __slots__ = ("missing", "results", "wake")

    def __init__(self, size: int, wake: Callable[[], None] = _do_nothing) -> None:
        self.results: list[Result] = [None] * size
        self.missing = size
        self.wake = wake

    def settle(self, place: int, result: Result) -> None:
        self.results[place] = result
        self.missing -= 1
        if not self.missing:
            self.wake()


class PendingPublish:
    """A publish without a reply, its place in a batch, and the head and epoch when it was first sent."""

    __slots__ = ("after", "batch", "epoch", "losses", "place", "publish", "tries")

    def __init__(self, publish: wire.Publish, batch: PublishBatch, place: int) -> None:
        self.publish = publish
        self.batch = batch
        self.place = place
        self.after = 0
        self.epoch = ""
        self.tries = 0
        """How often the present connection has sent it."""
        self.losses = 0
        """How many connections were lost while it was the oldest publish without a reply."""

    def settle(self, result: Result) -> None:
        self.batch.settle(self.place, result)


class RequestSender(Protocol):
    """The connection to which requests are sent."""

    epoch: str
    head: int
    floor: int | None
    limits: dict[str, int]
    producer: str

    def send_request(self, request: wire.Request) -> None:
        """Encode and send a request."""

    def send_line(self, line: bytes) -> None:
        """Send an encoded request."""


class InFlightRequests:
    """The requests of one client that have no reply, and the ids of all its requests.

    With a connection, requests are sent at once; without one they wait for `resume`. `reconnects` says whether another
    connection may follow. `on_retry` is called when something waits for `retry` on the present connection.
    """

    def __init__(self, *, reconnects: bool = False, on_retry: Callable[[], None] = _do_nothing) -> None:
        self.producer = ""
        """The producer id under which the sent publishes have their ids."""
        self.unsent_bytes = 0
        self._reconnects = reconnects
        self._on_retry = on_retry
        self._connection: RequestSender | None = None
        self._paused = False
        self._next_id = 1
        self._highest_logged_id = 0
        """The highest id whose publish is in the log."""
        self._unsent: deque[PendingPublish] = deque()
        self._sent: dict[int, PendingPublish] = {}
        """By id, in the order of the ids."""
        self._uncertain: set[int] = set()
        """Ids of which an earlier try may have been published: an error for a later try does not rule that out.
        Nothing newer is sent before these have a reply."""
        self._to_retry: set[int] = set()
        """The uncertain ids that wait for `retry`."""
        self._rejected_by_drain: list[PendingPublish] = []
        """Publishes that a draining replica has rejected, for the next replica."""
        self._requests: dict[int, tuple[wire.Request, PendingReply[Any]]] = {}
        """History requests and pings by id, in the order of the ids."""

    @property
    def publishes_in_flight(self) -> int:
        """The number of publishes without a reply, sent or not."""
        return len(self._sent) + len(self._unsent) + len(self._rejected_by_drain)

    @property
    def awaiting_acknowledgement(self) -> bool:
        """Whether the present connection may still bring the reply to a publish."""
        return len(self._sent) > len(self._to_retry)

    @property
    def retry_pending(self) -> bool:
        """Whether a publish waits for `retry`."""
        return bool(self._to_retry)

    @property
    def awaiting_reply(self) -> bool:
        """Whether a sent request has no reply."""
        return bool(self._sent or self._requests)

    def next_id(self) -> int:
        """Take the id of the next request. Ids increase over all connections, so a reply belongs to one request."""
        number = self._next_id
        self._next_id += 1
        return number

    # Requests of the application

    def publish(
        self,
        channel: str,
        payload: Raw,
        batch: PublishBatch,
        place: int,
        *,
        ephemeral: bool,
        echo: bool,
        retain: bool = False,
        expect: int | None = None,
    ) -> None:
        """Send a publish, or queue it. Its result goes to `place` in the batch."""
        request = wire.Publish(channel, payload, ephemeral=ephemeral, echo=echo, retain=retain, expect=expect)
        pending = PendingPublish(request, batch, place)
        if self._connection is not None and not self._paused and not self._uncertain:
            self._send(pending, self._connection)
        else:
            self._unsent.append(pending)
            self.unsent_bytes += len(payload) + PUBLISH_OVERHEAD

    def history(
        self, pattern: str, limit: int, before: int | None, wake: Callable[[], None] = _do_nothing
    ) -> PendingReply[Page]:
        number = self.next_id()
        return self._request(number, wire.History(pattern, limit, before, number), wake)

    def members(
        self, pattern: str, limit: int, after: str | None, wake: Callable[[], None] = _do_nothing
    ) -> PendingReply[wire.MemberList]:
        number = self.next_id()
        return self._request(number, wire.ListMembers(pattern, limit, after, number), wake)

    def ping(self, wake: Callable[[], None] = _do_nothing) -> PendingReply[wire.Pong]:
        number = self.next_id()
        return self._request(number, wire.Ping(number), wake)

    def cancel_batch(self, batch: PublishBatch) -> None:
        """Drop the unsent and the rejected publishes of a batch for which no task waits any more."""
        self._rejected_by_drain = [pending for pending in self._rejected_by_drain if pending.batch is not batch]
        self._set_unsent(pending for pending in self._unsent if pending.batch is not batch)

    def cancel_request(self, reply: PendingReply[Any]) -> None:
        """Drop a request for which no task waits any more. Once sent it stays, because replies come in order."""
        reply.wanted = False
        if self._connection is None:
            self._drop_cancelled()

    def retry(self) -> None:
        """Send the uncertain publishes again that wait for a retry on this connection."""
        connection = self._connection
        if connection is None or self._paused:
            return
        again, self._to_retry = self._to_retry & self._sent.keys(), set()
        for number in sorted(again):
            self._retry_publish(number, connection)
        self._send_unsent()

    # Changes of the connection

    def pause(self) -> None:
        """Keep further requests for the next connection."""
        self._paused = True

    def connection_lost(self, connection: RequestSender) -> None:
        """Handle the loss of a connection: no reply comes from it any more."""
        if self._connection is not connection:
            return
        self._connection = None
        self._uncertain.clear()
        self._to_retry.clear()
        self._drop_cancelled()
        for number in [number for number, pending in self._sent.items() if pending.publish.ephemeral]:
            self._settle_unknown(
                number, "the connection was lost before the reply, and an ephemeral message is sent only once"
            )
        oldest = next(iter(self._sent), None)
        if oldest is not None:
            self._sent[oldest].losses += 1
            if self._sent[oldest].losses >= MAX_LOST_CONNECTIONS:
                self._settle_unknown(oldest, f"{MAX_LOST_CONNECTIONS} connections were lost before the reply")
        # A rejected publish that is sent again would follow newer ones that may be in the log. The application decides.
        newest = max(self._highest_logged_id, next(reversed(self._sent), 0))
        again = []
        for pending in self._rejected_by_drain:
            assert pending.publish.id is not None
            if pending.publish.id < newest:
                pending.settle(
                    Refused(ErrorCode.SHUTTING_DOWN, "the replica is shutting down, and the log has a newer message")
                )
            else:
                again.append(pending)
        self._rejected_by_drain.clear()
        self._set_unsent([*again, *self._unsent])

    def resume(self, connection: RequestSender) -> None:
        """Send all requests without a reply over an authenticated connection, oldest first.

        Unsent publishes follow once no outcome is uncertain.
        """
        known = connection.producer == self.producer != ""
        self.producer = connection.producer
        for number in list(self._sent):
            if known:
                self._sent[number].tries = 0
                self._retry_publish(number, connection)
            else:
                self._settle_unknown(number, "the broker has forgotten the producer id of this publish")
        for request, _ in self._requests.values():
            connection.send_request(request)
        self._connection, self._paused = connection, False
        self._send_unsent()

    def wake_all(self) -> None:
        """Wake all waiting tasks, because there will be no further connection. They find that out themselves."""
        publishes = [*self._sent.values(), *self._rejected_by_drain, *self._unsent]
        waiters: list[PendingReply[Any] | PublishBatch] = [reply for _, reply in self._requests.values()]
        waiters += dict.fromkeys(pending.batch for pending in publishes)
        for waiter in waiters:
            waiter.wake()

    # Replies of the broker

    def handle_published(self, number: int | None, seq: int | None) -> None:
        pending = self._sent.pop(number, None)  # type: ignore[arg-type]  # no id is None
        if pending is not None:
            if seq is not None:
                self._highest_logged_id = max(self._highest_logged_id, number or 0)
            pending.settle(seq)
            if number in self._uncertain:
                self._uncertain.discard(number)
                self._send_unsent()

    def handle_publish_error(self, number: int | None, reason: Refused) -> bool:
        """Handle the rejection of a publish. Returns False if no publish without a reply has this id."""
        pending = self._sent.get(number)  # type: ignore[arg-type]
        if pending is None or number is None:
            return False
        uncertain = number in self._uncertain or reason.code is ErrorCode.UNKNOWN
        # The broker looks for an earlier try first. None can succeed later: a seq that is not there never comes again.
        # No retained message (0) may come again.
        decided = reason.code is ErrorCode.CONFLICT and pending.publish.expect
        if uncertain and not pending.publish.ephemeral and not decided:
            self._keep_uncertain(number, pending, reason)
            self._send_unsent()
            return True
        del self._sent[number]
        self._uncertain.discard(number)
        if reason.code is ErrorCode.SHUTTING_DOWN and self._reconnects and not pending.publish.ephemeral:
            # The message is certainly not published, and the next replica can publish it.
            self._rejected_by_drain.append(pending)
            self.pause()
        else:
            pending.settle(reason)
            self._send_unsent()
        return True

    def handle_reply(self, number: int | None, value: Any) -> bool:
        """Handle the reply to a history request or a ping, or its rejection. Returns False if none has this id."""
        request = self._requests.pop(number, None)  # type: ignore[arg-type]
        if request is not None:
            request[1].settle(value)
        return request is not None

    def oldest_history_id(self) -> int | None:
        """The id of the history request that the broker answers next."""
        return next((n for n, (request, _) in self._requests.items() if isinstance(request, wire.History)), None)

    # Helpers

    def _keep_uncertain(self, number: int, pending: PendingPublish, reason: Refused) -> None:
        """Handle an error that leaves the outcome uncertain: try again, unless the error is permanent."""
        self._uncertain.add(number)
        if reason.code is ErrorCode.SHUTTING_DOWN and self._reconnects:
            # The next replica can tell.
            self.pause()
        elif reason.code in TRANSIENT_CODES and pending.tries < MAX_TRIES:
            self._to_retry.add(number)
            self._on_retry()
        else:
            self._settle_unknown(number, f"it may have been published, and every retry failed: {reason}")

    def _retry_publish(self, number: int, connection: RequestSender) -> None:
        """Send an uncertain publish again under its id, unless the broker cannot know its outcome any more."""
        pending = self._sent[number]
        self._uncertain.add(number)
        if pending.epoch != connection.epoch or pending.after < (connection.floor or 0) - 1:
            self._settle_unknown(number, "the log has changed too much to tell whether it has this message")
            return
        again = structs.replace(pending.publish, retry=True, after=pending.after, epoch=pending.epoch)
        line = wire.to_json(again) + b"\n"
        if len(line) > connection.limits.get("message_size", len(line)) + 1:
            self._settle_unknown(number, "with the fields of a retry it is larger than the broker accepts")
            return
        pending.tries += 1
        connection.send_line(line)

    def _send_unsent(self) -> None:
        """Send the unsent publishes, unless requests are paused or an outcome is uncertain."""
        if self._connection is None or self._paused or self._uncertain:
            return
        unsent, self._unsent, self.unsent_bytes = self._unsent, deque(), 0
        for pending in unsent:
            self._send(pending, self._connection)

    def _settle_unknown(self, number: int, reason: str) -> None:
        """End a publish whose outcome cannot be found out."""
        self._uncertain.discard(number)
        self._sent.pop(number).settle(Refused(ErrorCode.UNKNOWN, reason))

    def _drop_cancelled(self) -> None:
        self._requests = {number: entry for number, entry in self._requests.items() if entry[1].wanted}

    def _send(self, pending: PendingPublish, connection: RequestSender) -> None:
        publish = pending.publish
        # A publish that was rejected and is sent again gets a new id: the old one stays rejected.
        number = publish.id = self._next_id
        line = wire.to_json(publish) + b"\n"
        limit = connection.limits.get("message_size", len(line))
        if len(line) > limit + 1:
            pending.settle(Refused(ErrorCode.TOO_LARGE, f"larger than {limit} bytes"))
            return
        if line.count(b"[") + line.count(b"{") > wire.MAX_DEPTH and wire.depth(line) > wire.MAX_DEPTH:
            pending.settle(Refused(ErrorCode.BAD_MESSAGE, f"nested deeper than {wire.MAX_DEPTH}"))
            return
        connection.send_line(line)
        self._next_id += 1
        pending.after, pending.epoch, pending.tries = connection.head, connection.epoch, 1
        self._sent[number] = pending

    def _request(self, number: int, request: wire.Request, wake: Callable[[], None]) -> PendingReply[Any]:
        reply: PendingReply[Any] = PendingReply(wake)
        self._requests[number] = request, reply
        if self._connection is not None and not self._paused:
            self._connection.send_request(request)
        return reply

    def _set_unsent(self, publishes: Any) -> None:
        self._unsent = deque(publishes)
        self.unsent_bytes = sum(len(pending.publish.payload) + PUBLISH_OVERHEAD for pending in self._unsent)
