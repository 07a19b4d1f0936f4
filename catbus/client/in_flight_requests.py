"""What has been asked of the broker and has no answer yet, whichever connection will bring it. Pure.

A publish is sent in its turn, and kept until it is answered. When the connection is lost first, or the broker does not
know, it is in doubt. Then it is sent again under its old id, so that the broker can tell: on the next connection by
`resume`, on this one by `retry`. What has not been sent waits, and goes out after that, in the order in which it was
asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from msgspec import Raw, structs

from ..errors import ErrorCode, Refused
from ..protocol import wire_messages as wire
from .server_messages import Page

TRIES = 6
"""How often a publish is sent at most on one connection, while nobody can say what became of it."""

LOSSES = 8
"""How many connections in a row may be lost with the same publish as the oldest one without an answer.

What is newer waits for it, so a publish that ends every connection would hold back all that follows.
"""

ENTRY = 200
"""What a publish that waits takes beside its payload, roughly, in bytes."""

PASSING = frozenset({ErrorCode.UNKNOWN, ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED, ErrorCode.RATE_LIMITED})
"""Why a publish could not be looked up just now."""

T = TypeVar("T")

Result = int | Refused | None


def _nobody() -> None:
    pass


class Answer(Generic[T]):
    """Where the answer to a request will be."""

    __slots__ = ("value", "wake", "wanted")

    def __init__(self) -> None:
        self.value: T | Refused | None = None
        self.wanted = True
        """Whether anybody still waits for it."""
        self.wake: Callable[[], None] = _nobody

    def settle(self, value: T | Refused) -> None:
        self.value = value
        self.wake()


class Batch:
    """Publishes that somebody waits for together: a result each, a seq (None for an ephemeral one) or the refusal."""

    __slots__ = ("missing", "results", "wake")

    def __init__(self, size: int) -> None:
        self.results: list[Result] = [None] * size
        self.missing = size
        self.wake: Callable[[], None] = _nobody

    def settle(self, place: int, result: Result) -> None:
        self.results[place] = result
        self.missing -= 1
        if not self.missing:
            self.wake()


class Pending:
    """A publish without an answer, who waits for it, and what was known when it was first sent."""

    __slots__ = ("after", "batch", "epoch", "losses", "place", "publish", "tries")

    def __init__(self, publish: wire.Publish, batch: Batch, place: int) -> None:
        self.publish = publish
        self.batch = batch
        self.place = place
        self.after = 0
        self.epoch = ""
        self.tries = 0
        """How often it was sent on the present connection."""
        self.losses = 0
        """How many connections were lost while it was the oldest without an answer."""

    def settle(self, result: Result) -> None:
        self.batch.settle(self.place, result)


class Desk(Protocol):
    """The connection that requests go to."""

    epoch: str
    head: int
    floor: int | None
    limits: dict[str, int]
    producer: str

    def say(self, request: wire.Request) -> None:
        """Send a request."""

    def put(self, line: bytes) -> None:
        """Send a line that has been made already."""


class Ledger:
    """The unanswered requests of one client, and the numbers that they go by.

    While there is a `desk`, what is asked for is sent at once; otherwise it waits for `resume`. `keeps_on` says that
    there will be another connection after this one.
    """

    def __init__(self, *, keeps_on: bool = False) -> None:
        self.producer = ""
        """Whose ids the publishes have that were sent."""
        self.unsent_bytes = 0
        self.doubted: Callable[[], None] = _nobody
        """Called when something is to be sent again on this connection: after a pause, by `retry`."""
        self._keeps_on = keeps_on
        self._desk: Desk | None = None
        self._held = False
        self._next_id = 1
        self._taken = 0
        """The highest id that the log has taken."""
        self._unsent: deque[Pending] = deque()
        self._sent: dict[int, Pending] = {}
        """In the order of their ids."""
        self._doubts: set[int] = set()
        """The ids of those that an earlier try may have published: no refusal of a later one says that it has not.
        Nothing newer is sent before they are answered."""
        self._again: set[int] = set()
        """The ids of those among them that wait for `retry`."""
        self._returned: list[Pending] = []
        """Those that a replica which stops has given back."""
        self._requests: dict[int, tuple[wire.Request, Answer[Any]]] = {}
        """Histories and pings, in the order of their ids."""

    @property
    def unanswered(self) -> int:
        """How many publishes have no answer yet."""
        return len(self._sent) + len(self._unsent) + len(self._returned)

    @property
    def in_doubt(self) -> bool:
        """Whether the answer to a publish may still come on this connection."""
        return len(self._sent) > len(self._again)

    @property
    def retrying(self) -> bool:
        """Whether something waits for `retry`."""
        return bool(self._again)

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(self._sent or self._requests)

    def number(self) -> int:
        """The next request's id; they increase over all connections, so an answer can be to one request only."""
        number = self._next_id
        self._next_id += 1
        return number

    # What is asked for

    def publish(self, channel: str, payload: Raw, batch: Batch, place: int, *, ephemeral: bool, echo: bool) -> None:
        """Ask for a publish whose result goes to its place in the batch."""
        pending = Pending(wire.Publish(channel, payload, ephemeral=ephemeral, echo=echo), batch, place)
        if self._desk is not None and not self._held and not self._doubts:
            self._send(pending, self._desk)
        else:
            self._unsent.append(pending)
            self.unsent_bytes += len(payload) + ENTRY

    def history(self, pattern: str, limit: int, before: int | None) -> Answer[Page]:
        number = self.number()
        return self._request(number, wire.History(pattern, limit, before, number))

    def ping(self) -> Answer[wire.Pong]:
        number = self.number()
        return self._request(number, wire.Ping(number))

    def forget(self, batch: Batch) -> None:
        """Nobody waits for a batch any more: what has not been sent of it, or came back, never is."""
        self._returned = [pending for pending in self._returned if pending.batch is not batch]
        self._set_unsent(pending for pending in self._unsent if pending.batch is not batch)

    def withdraw(self, answer: Answer[Any]) -> None:
        """Nobody waits for an answer any more. Where it is on its way, it still has its place among the others."""
        answer.wanted = False
        if self._desk is None:
            self._drop_unwanted()

    def retry(self) -> None:
        """Ask again on this connection what became of those that are in doubt."""
        desk = self._desk
        if desk is None or self._held:
            return
        again, self._again = self._again & self._sent.keys(), set()
        for number in sorted(again):
            self._send_again(number, desk)
        self._go_on()

    # Between connections

    def hold(self) -> None:
        """Keep what is asked for from now on, for the next connection."""
        self._held = True

    def lose(self, desk: Desk) -> None:
        """A connection is gone: what has no answer has none to come from there."""
        if self._desk is not desk:
            return
        self._desk = None
        self._doubts.clear()
        self._again.clear()
        self._drop_unwanted()
        for number in [number for number, pending in self._sent.items() if pending.publish.ephemeral]:
            self._doubt(number, "the connection was lost before the answer, and an ephemeral message goes out once")
        oldest = next(iter(self._sent), None)
        if oldest is not None:
            self._sent[oldest].losses += 1
            if self._sent[oldest].losses >= LOSSES:
                self._doubt(oldest, f"{LOSSES} connections were lost before the answer")
        # Given back and sent again it comes behind what may have been taken meanwhile: that is for its owner to decide.
        newest = max(self._taken, next(reversed(self._sent), 0))
        again = []
        for pending in self._returned:
            assert pending.publish.id is not None
            if pending.publish.id < newest:
                pending.settle(
                    Refused(ErrorCode.SHUTTING_DOWN, "the replica stops, and the log has what came after this")
                )
            else:
                again.append(pending)
        self._returned.clear()
        self._set_unsent([*again, *self._unsent])

    def resume(self, desk: Desk) -> None:
        """Another connection is there, and authenticated: send what has no answer, oldest first.

        What waited comes behind that, once all that is in doubt has been answered.
        """
        known = desk.producer == self.producer != ""
        self.producer = desk.producer
        for number in list(self._sent):
            if known:
                self._sent[number].tries = 0
                self._send_again(number, desk)
            else:
                self._doubt(number, "the broker does not know any more who published this")
        for request, _ in self._requests.values():
            desk.say(request)
        self._desk, self._held = desk, False
        self._go_on()

    def wake(self) -> None:
        """There will be no further connection, and so say those who are woken."""
        publishes = [*self._sent.values(), *self._returned, *self._unsent]
        orphans: list[Answer[Any] | Batch] = [answer for _, answer in self._requests.values()]
        orphans += dict.fromkeys(pending.batch for pending in publishes)
        for orphan in orphans:
            orphan.wake()

    # What the broker says

    def published(self, number: int | None, seq: int | None) -> None:
        pending = self._sent.pop(number, None)  # type: ignore[arg-type]  # no id is None
        if pending is not None:
            if seq is not None:
                self._taken = max(self._taken, number or 0)
            pending.settle(seq)
            if number in self._doubts:
                self._doubts.discard(number)
                self._go_on()

    def refused(self, number: int | None, reason: Refused) -> bool:
        """A publish was refused; false when none is without an answer under this number."""
        pending = self._sent.get(number)  # type: ignore[arg-type]
        if pending is None or number is None:
            return False
        if not pending.publish.ephemeral and (number in self._doubts or reason.code is ErrorCode.UNKNOWN):
            self._still_in_doubt(number, pending, reason)
            self._go_on()
            return True
        del self._sent[number]
        if reason.code is ErrorCode.SHUTTING_DOWN and self._keeps_on and not pending.publish.ephemeral:
            # It is certain that it is not published, and the next replica can.
            self._returned.append(pending)
            self.hold()
        else:
            pending.settle(reason)
        return True

    def answered(self, number: int | None, value: Any) -> bool:
        """An answer to a history or a ping, or its refusal; false when nobody waits for one under this number."""
        request = self._requests.pop(number, None)  # type: ignore[arg-type]
        if request is not None:
            request[1].settle(value)
        return request is not None

    def oldest_history(self) -> int | None:
        """The number of the history that the broker answers next."""
        return next((n for n, (request, _) in self._requests.items() if isinstance(request, wire.History)), None)

    # Helpers

    def _still_in_doubt(self, number: int, pending: Pending, reason: Refused) -> None:
        """A try has brought no certainty: only another one can, unless the reason will not pass."""
        self._doubts.add(number)
        if reason.code is ErrorCode.SHUTTING_DOWN and self._keeps_on:
            # The next replica will know.
            self.hold()
        elif reason.code in PASSING and pending.tries < TRIES:
            self._again.add(number)
            self.doubted()
        else:
            self._doubt(number, f"it may have been published, and asking again brought only: {reason}")

    def _send_again(self, number: int, desk: Desk) -> None:
        """Send under its old id what is in doubt, unless nobody could know any more what became of it."""
        pending = self._sent[number]
        self._doubts.add(number)
        if pending.epoch != desk.epoch or pending.after < (desk.floor or 0) - 1:
            self._doubt(number, "too much has happened to the log to tell whether it has this")
            return
        again = structs.replace(pending.publish, retry=True, after=pending.after, epoch=pending.epoch)
        line = wire.to_json(again) + b"\n"
        if len(line) > desk.limits.get("message_size", len(line)) + 1:
            self._doubt(number, "it is too large for the broker to be asked whether it has this")
            return
        pending.tries += 1
        desk.put(line)

    def _go_on(self) -> None:
        """Send what has waited, unless something is still in its way."""
        if self._desk is None or self._held or self._doubts:
            return
        unsent, self._unsent, self.unsent_bytes = self._unsent, deque(), 0
        for pending in unsent:
            self._send(pending, self._desk)

    def _doubt(self, number: int, why: str) -> None:
        """Nobody will ever know what became of it."""
        self._doubts.discard(number)
        self._sent.pop(number).settle(Refused(ErrorCode.UNKNOWN, why))

    def _drop_unwanted(self) -> None:
        self._requests = {number: entry for number, entry in self._requests.items() if entry[1].wanted}

    def _send(self, pending: Pending, desk: Desk) -> None:
        publish = pending.publish
        # A new id each time, should it have been given back: the old one stays refused.
        number = publish.id = self._next_id
        line = wire.to_json(publish) + b"\n"
        limit = desk.limits.get("message_size", len(line))
        if len(line) > limit + 1:
            pending.settle(Refused(ErrorCode.TOO_LARGE, f"larger than {limit} bytes"))
            return
        if line.count(b"[") + line.count(b"{") > wire.MAX_DEPTH and wire.depth(line) > wire.MAX_DEPTH:
            pending.settle(Refused(ErrorCode.BAD_MESSAGE, f"nested deeper than {wire.MAX_DEPTH}"))
            return
        desk.put(line)
        self._next_id += 1
        pending.after, pending.epoch, pending.tries = desk.head, desk.epoch, 1
        self._sent[number] = pending

    def _request(self, number: int, request: wire.Request) -> Answer[Any]:
        answer: Answer[Any] = Answer()
        self._requests[number] = request, answer
        if self._desk is not None and not self._held:
            self._desk.say(request)
        return answer

    def _set_unsent(self, publishes: Any) -> None:
        self._unsent = deque(publishes)
        self.unsent_bytes = sum(len(pending.publish.payload) + ENTRY for pending in self._unsent)
