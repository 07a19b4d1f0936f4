"""Delivery compared with a model: in any order of events, each subscription gets its messages once and in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

import msgspec
import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import catbus.delivery.fan_out as delivery_module
from catbus.delivery import snapshots
from catbus.delivery.encoded_messages import EncodedMessages, QueueItem
from catbus.delivery.fan_out import Delivery
from catbus.delivery.reply_lines import HeadLine, HistoryLine, SubscriptionLine
from catbus.delivery.send_queue import LIST_SLOT_BYTES, REPLY_BYTES, SUBSCRIPTION_LINE_BYTES, Budget, SendQueue
from catbus.delivery.snapshot_page import SnapshotPage
from catbus.delivery.snapshots import SnapshotRequest
from catbus.delivery.subscription import PAGE_ROWS, Subscription
from catbus.delivery.subscription_trees import MEASURED_PER_CHECKPOINT
from catbus.delivery.topic_tree import TopicTree
from catbus.log import Entry, LogPage, RecentMessages, Resumption, RetainedPage, erased
from catbus.log.recent_messages import ENTRY_OVERHEAD
from catbus.protocol import wire_messages as wire
from catbus.protocol.channels import matches
from catbus.protocol.server_sent_events import encode_reply
from catbus.protocol.wire_messages import ProtocolVersion
from tests.server_sent_events import EventParser

CHANNELS = ["a", "a.b", "a.b.c", "b", "b.c"]
PATTERNS = ["*", "a", "a.*", "a.b", "a.b.*", "b.*", "b.c"]
PRODUCERS = [b"one", b"two"]
LIMITS = [
    (150, 100_000),
    (400, 100_000),
    (5000, 100_000),
    (400, 2_000),
    (400, 4_000),
    (5000, 2_000),
    (5000, 4_000),
    (5000, 8_000),
]
"""Limits in bytes of one send queue and of all. A message has about 100 bytes, and takes about 500 in memory."""


class ListLog:
    """The part of a log that delivery uses, with all its entries in a list."""

    epoch = "e"
    memory_floor = 1

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.kept: dict[str, Entry] = {}
        """The retained message of each channel that has one."""
        self.floor = 1
        self.holes: set[int] = set()
        """Seqs that were deleted, and that a repair has recorded as deleted."""

    def is_gone(self, seq: int) -> bool:
        return seq < self.floor or seq in self.holes

    def resume(self, since: int, epoch: str | None) -> Resumption:
        return Resumption(since)

    def page(self, after: int, rows: int) -> LogPage:
        after, lost = max(after, self.floor - 1), "retention"
        while after + 1 in self.holes:
            after, lost = after + 1, "repair"
        entries = self.entries[after : after + rows]
        entries = entries[: next((i for i, e in enumerate(entries) if e.seq in self.holes), rows)]
        return LogPage(after, entries[-1].seq if entries else after, entries, lost)

    def append(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.entries.append(entry)
            if entry.retain:
                self.kept.pop(entry.channel, None)
                if entry.payload != b"null":
                    self.kept[entry.channel] = entry

    def retained_page(self, request: SnapshotRequest, rows: int) -> RetainedPage:
        pattern, after = request.position.patterns[0], request.position.after
        found = sorted(c for c in self.kept if matches(pattern, c) and (after is None or c > after))
        entries: list[Entry] = []
        for channel in found[:rows]:
            entry = self.kept[channel]
            if entry.seq <= request.until:
                if entries and sum(e.size for e in entries) + entry.size > request.size:
                    return RetainedPage(entries, after, False, len(self.entries))
                entries.append(entry)
            after = channel
        return RetainedPage(entries, after, len(found) <= rows, len(self.entries))


def exhaust(steps: Iterator[None]) -> None:
    deque(steps, maxlen=0)


def charge(items: Iterable[QueueItem]) -> int:
    """The bytes that messages take of the budget: each `EncodedMessages` once, and each of its list slots."""
    messages = [item for item in items if isinstance(item, EncodedMessages)]
    return sum({id(message): message.charge for message in messages}.values()) + len(messages) * LIST_SLOT_BYTES


class TransportWriter:
    def flush(self) -> None:
        """Do nothing: the tests take the items themselves."""


@dataclass
class ClientState:
    """A client's map of the retained messages: the seq of each channel's, as the specification says."""

    seqs: dict[str, int] = field(default_factory=dict)
    collected: dict[str, int] | None = None
    """The messages of a snapshot that is not complete yet."""

    def take(self, line: wire.ServerMessage) -> None:
        match line:
            case wire.Retained(messages=messages, complete=complete):
                assert self.collected is not None, "a snapshot that nothing announced"
                self.collected.update((m.channel, m.seq or 0) for m in messages)
                assert all(message.retain for message in messages)
                if complete:
                    self.seqs, self.collected = self.collected, None
            case wire.ChannelMessage(channel=channel, seq=seq, retain=True, payload=payload):
                for seqs in (self.seqs, self.collected):
                    if seqs is not None:
                        seqs.pop(channel, None)
                        if bytes(payload) != b"null":
                            seqs[channel] = seq or 0
            case wire.Gap():
                self.collected = {}

    def keep(self, patterns: Collection[str]) -> None:
        for seqs in (self.seqs, self.collected or {}):
            for channel in [c for c in seqs if not any(matches(pattern, c) for pattern in patterns)]:
                del seqs[channel]

    def copy(self) -> ClientState:
        return ClientState(dict(self.seqs), None if self.collected is None else dict(self.collected))


@dataclass(eq=False)
class Client:
    """A client that records what it receives, and what it is owed."""

    protocol: ProtocolVersion
    producer: bytes
    send_queue: SendQueue
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    """Each subscribed pattern, and the seq after which its messages are owed."""
    lines: dict[str, list[wire.ServerMessage]] = field(default_factory=dict)
    stream: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    """The patterns of an event stream, which `wanted` and `lines` have together as ""."""
    parser: EventParser = field(default_factory=EventParser)
    states: dict[str, ClientState] = field(default_factory=dict)
    """What the client knew of the retained messages before its `lines`, for each subscription that wants them."""
    pongs_sent: int = 0
    pongs: int = 0
    """The number of pongs received. Pongs are numbered."""

    def collect(self, most: float = inf) -> None:
        for item in self.send_queue.take(most):
            if self.protocol is ProtocolVersion.EVENTS:
                self.collect_events(item if isinstance(item, bytes) else item.events)
            elif isinstance(item, bytes | SnapshotPage):
                for line in (item if isinstance(item, bytes) else item.lines).splitlines():
                    self.collect_line(wire.decode_server(line))
            elif self.protocol is ProtocolVersion.FIRST:
                lines = [wire.decode_server(line) for line in item.first_version_lines]
                payloads = [bytes(line.payload).decode() for line in lines if isinstance(line, wire.ChannelMessage)]
                self.stream += [payload for payload in payloads if payload not in ("0", "null")]
            else:
                for line in item.lines.splitlines():
                    message = msgspec.json.decode(line)
                    assert message["pattern"] == item.pattern
                    if "seq" not in message:
                        continue  # Ephemeral messages are owed to no client.
                    self.lines.setdefault(item.pattern, []).append(wire.decode_server(line))

    def collect_line(self, decoded: wire.ServerMessage) -> None:
        match decoded:
            case wire.Pong(seq=number):
                self.pongs += 1
                assert number == self.pongs
            case wire.Head():
                for pattern in self.subscriptions:
                    self.lines.setdefault(pattern, []).append(decoded)
            case wire.Live(pattern=pattern) | wire.Gap(pattern=pattern) | wire.Retained(pattern=pattern):
                self.lines.setdefault(pattern, []).append(decoded)
            case _:
                raise AssertionError(decoded)

    def collect_events(self, data: bytes) -> None:
        before = self.parser.last_id
        lines = self.lines.setdefault("", [])
        for event in self.parser.feed(data):
            seq, _, epoch = event.last_id.partition(".")
            assert epoch == ("e" if seq else ""), "an ephemeral message changes no id"
            match event.type:
                case "message" if "seq" in event.data:
                    assert event.data["seq"] == int(seq)
                    payload = msgspec.Raw(b"null" if event.data["payload"] is None else b"0")
                    retain = event.data.get("retain", False)
                    lines.append(wire.ChannelMessage(event.data["channel"], payload, seq=int(seq), retain=retain))
                case "retained":
                    assert event.last_id == before, "a client that reconnects begins again"
                    messages = [
                        wire.ChannelMessage(m["channel"], msgspec.Raw(b"0"), seq=m["seq"], retain=m["retain"])
                        for m in event.data["messages"]
                    ]
                    lines.append(wire.Retained("", messages, event.data["complete"]))
                case "gap" if self.states:
                    assert event.last_id == before, "a client that reconnects gets the gap again"
                    gap = event.data
                    lines.append(wire.Gap("", gap["from"], gap["to"], gap["epoch"], gap["reason"]))
                case "message":
                    assert event.last_id == before
                case "gap":
                    assert event.data.pop("to") == int(seq)
                    lines.append(wire.Gap("", event.data["from"], int(seq), epoch, event.data["reason"]))
                case "live":
                    lines.append(wire.Live("", int(seq)))
                case other:
                    raise AssertionError(other)
            before = event.last_id
        if self.parser.last_id != before:
            lines.append(wire.Head(int(self.parser.last_id.partition(".")[0]), "e", 0))


def entry(seq: int, channel: str, origin: bytes | None = None) -> Entry:
    return Entry(seq, 1000 + seq, channel, b"%d" % seq, None, origin)


def retained_entry(seq: int, channel: str, *, remove: bool = False) -> Entry:
    return Entry(seq, 1000 + seq, channel, b"null" if remove else b"%d" % seq, retain=True)


class DeliveryMachine(RuleBasedStateMachine):
    """Publishing, subscribing, snapshots, lagging, catching up, retention, deletion and erasure, in any order.

    A `catbus.v1` client subscribes to any patterns at any cursors. A first-version client always subscribes at the
    head. An event stream subscribes once, to several patterns at one cursor. At any time a client has received a prefix
    of what it is owed, and all of it once everything is idle. Whenever a subscription to the retained messages is live,
    its client knows exactly those of that seq. The send queues together stay within the budget, except for messages
    that cannot be read again.
    """

    @initialize(limits=st.sampled_from(LIMITS))
    def start(self, limits: tuple[int, int]) -> None:
        limit, total = limits
        self.log = ListLog()
        self.delivery = Delivery(self.log, Budget(total))  # type: ignore[arg-type]
        self.limit = limit
        self.max_pinned = 0
        """The largest size so far, in bytes, of messages that could not be read again."""
        self.clients: list[Client] = []
        self.page: tuple[int, LogPage] | None = None
        self.serving: Iterator[None] = iter(())
        self.snapshot_page: tuple[SnapshotRequest, RetainedPage] | None = None
        self.serving_snapshot: Iterator[None] = iter(())
        self.history: list[dict[str, int]] = [{}]
        """After each seq, the seqs of the retained messages."""
        self.erased: set[int] = set()
        for pattern, retained in (("*", False), ("a.*", True)):
            self.connect(ProtocolVersion.V1, PRODUCERS[0])
            self.subscribe_one(self.clients[-1], pattern, None, retained=retained)

    @rule(protocol=st.sampled_from([ProtocolVersion.FIRST, ProtocolVersion.V1]), producer=st.sampled_from(PRODUCERS))
    def connect(self, protocol: ProtocolVersion, producer: bytes) -> None:
        if len(self.clients) < 4:
            send_queue = SendQueue(TransportWriter(), lambda _: None, self.limit, self.delivery.budget)
            send_queue.protocol = protocol
            self.clients.append(Client(protocol, producer, send_queue))

    @rule(
        batches=st.lists(
            st.lists(
                st.tuples(st.sampled_from(CHANNELS), st.sampled_from([None, *PRODUCERS, b"1", b"1", b"null"])),
                min_size=1,
                max_size=6,
            ),
            min_size=1,
            max_size=4,
        ),
        with_replies=st.booleans(),
    )
    def publish(self, batches: list[list[tuple[str, bytes | None]]], with_replies: bool) -> None:
        for posts in batches:
            head = len(self.log.entries)
            # A producer that does not get its own messages does not know the state without applying them itself.
            entries = [
                retained_entry(head + i, channel, remove=kind == b"null")
                if kind in (b"1", b"null")
                else entry(head + i, channel, kind)
                for i, (channel, kind) in enumerate(posts, 1)
            ]
            for each in entries:
                self.log.append([each])
                self.history.append({channel: kept.seq for channel, kept in self.log.kept.items()})
            self.delivery.apply(entries)
            for client in self.clients if with_replies else ():
                self.reply(client)

    def reply(self, client: Client) -> None:
        """Send a reply, and `head` unless a subscription is lagging."""
        if client.protocol is ProtocolVersion.V1:
            client.pongs_sent += 1
            client.send_queue.put(wire.encode(wire.Pong(client.pongs_sent)) or b"")
        lagging = any(subscription.lagging for subscription in client.subscriptions.values())
        line = encode_reply(wire.Head(self.delivery.position, "e", 0), client.protocol)
        subscribed = bool(client.subscriptions) or client.protocol is ProtocolVersion.V1
        if line is not None and subscribed and not lagging:
            client.send_queue.put(HeadLine(line))

    @rule(
        patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=4, unique=True),
        since=st.none() | st.integers(0, 12),
        retained=st.booleans(),
    )
    def open_event_stream(self, patterns: list[str], since: int | None, retained: bool) -> None:
        if len(self.clients) < 4:
            self.connect(ProtocolVersion.EVENTS, b"")
            client = self.clients[-1]
            retained = retained and (since or 0) <= len(self.log.entries)
            subscription = Subscription(client.send_queue, retained=retained)
            client.patterns = list(patterns)
            if retained:
                client.states[""] = self.state_before(patterns, since)
            client.subscriptions = dict.fromkeys(patterns, subscription)
            client.wanted[""] = len(self.log.entries) if since is None else since
            self.delivery.subscribe_all(subscription, patterns, since)

    @precondition(lambda self: any(c.patterns for c in self.clients))
    @rule(data=st.data())
    def revoke_of_event_stream(self, data: st.DataObject) -> None:
        """Withdraw one pattern of a stream. Nothing that only this pattern matches comes any more."""
        client = data.draw(st.sampled_from([c for c in self.clients if c.patterns]))
        pattern = data.draw(st.sampled_from(client.patterns))
        client.collect()
        lines = client.lines.pop("", [])
        state = self.check(client, "", lines, complete=False)
        # All that it is owed up to the last line has arrived, in order.
        ends = [line.last if isinstance(line, wire.Gap) else getattr(line, "seq", 0) for line in lines]
        client.wanted[""] = max([client.wanted[""], *ends])
        client.patterns.remove(pattern)
        subscription = client.subscriptions.pop(pattern)
        self.delivery.unsubscribe(subscription, pattern)
        client.send_queue.revoke([pattern], subscription.patterns)
        if state is not None:
            client.states[""] = state
            state.keep(client.patterns)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), pattern=st.sampled_from(PATTERNS))
    def subscribe(self, data: st.DataObject, pattern: str) -> None:
        client = data.draw(st.sampled_from(self.clients))
        if client.protocol is ProtocolVersion.EVENTS:
            return
        if client.protocol is ProtocolVersion.FIRST:
            if pattern not in client.wanted:
                subscription = next(
                    iter(client.subscriptions.values()),
                    Subscription(client.send_queue, client.producer),
                )
                client.subscriptions[pattern] = subscription
                client.wanted[pattern] = len(self.log.entries)
                self.delivery.subscribe(subscription, pattern)
            return
        if pattern in client.subscriptions:
            self.unsubscribe_one(client, pattern)
        client.collect()
        client.lines.pop(pattern, None)
        since = data.draw(st.none() | st.integers(0, len(self.log.entries) + 3))
        # What a client above the head knows is not in the history yet.
        retained = data.draw(st.booleans()) and (since or 0) <= len(self.log.entries)
        self.subscribe_one(client, pattern, since, retained=retained)

    def subscribe_one(self, client: Client, pattern: str, since: int | None, *, retained: bool) -> None:
        subscription = Subscription(client.send_queue, client.producer, retained=retained)
        if retained:
            client.states[pattern] = self.state_before([pattern], since)
        client.subscriptions[pattern] = subscription
        client.wanted[pattern] = len(self.log.entries) if since is None else since
        self.delivery.subscribe(subscription, pattern, since)

    def state_before(self, patterns: Sequence[str], since: int | None) -> ClientState:
        """What a client knows that begins, or that resumes after a seq at which it was complete."""
        if since is None:
            return ClientState(collected={})
        known = ClientState(dict(self.history[min(since, len(self.history) - 1)]))
        known.keep(patterns)
        return known

    @precondition(lambda self: any(c.subscriptions for c in self.clients if c.protocol is ProtocolVersion.V1))
    @rule(data=st.data())
    def unsubscribe(self, data: st.DataObject) -> None:
        subscribed = [(c, p) for c in self.clients if c.protocol is ProtocolVersion.V1 for p in c.subscriptions]
        self.unsubscribe_one(*data.draw(st.sampled_from(subscribed)))

    def unsubscribe_one(self, client: Client, pattern: str) -> None:
        self.delivery.unsubscribe(client.subscriptions.pop(pattern), pattern)
        client.collect()
        before = list(client.lines.get(pattern, ()))
        self.check(client, pattern, before, complete=False)
        del client.wanted[pattern]
        client.states.pop(pattern, None)
        client.lines.pop(pattern, None)

    @precondition(lambda self: any(c.subscriptions for c in self.clients if c.protocol is ProtocolVersion.V1))
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        """Unsubscribe and drop the queued messages. The remaining lines must not count these as delivered."""
        subscribed = [(c, p) for c in self.clients if c.protocol is ProtocolVersion.V1 for p in c.subscriptions]
        client, pattern = data.draw(st.sampled_from(subscribed))
        client.send_queue.revoke([pattern])
        self.unsubscribe_one(client, pattern)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), most=st.sampled_from([1, 200, inf]))
    def flush(self, data: st.DataObject, most: float) -> None:
        data.draw(st.sampled_from(self.clients)).collect(most)

    @rule(channel=st.sampled_from(CHANNELS))
    def broadcast(self, channel: str) -> None:
        self.delivery.broadcast(entry(0, channel))

    @rule(rows=st.integers(1, 5))
    def read_page(self, rows: int) -> None:
        exhaust(self.serving)
        position = self.delivery.next_position()
        self.page = None if position is None else (position, self.log.page(position, rows))

    @precondition(lambda self: self.page is not None)
    @rule()
    def begin_to_serve(self) -> None:
        assert self.page is not None
        self.serving, self.page = self.delivery.serve(*self.page), None
        next(self.serving, None)

    @rule(steps=st.integers(1, 4))
    def continue_to_serve(self, steps: int) -> None:
        for _ in range(steps):
            next(self.serving, None)

    @rule(rows=st.integers(1, 3))
    def read_snapshot(self, rows: int) -> None:
        self.continue_snapshot(inf)
        request = self.delivery._snapshots.next_request()
        self.snapshot_page = None if request is None else (request, self.log.retained_page(request, rows))

    @precondition(lambda self: self.snapshot_page is not None)
    @rule()
    def begin_to_serve_snapshot(self) -> None:
        assert self.snapshot_page is not None
        self.serving_snapshot, self.snapshot_page = self.delivery._snapshots.serve(*self.snapshot_page), None
        self.continue_snapshot(1)

    @rule(steps=st.integers(1, 4))
    def continue_snapshot(self, steps: float) -> None:
        while steps > 0 and next(self.serving_snapshot, self) is not self:
            self.delivery._make_room()
            steps -= 1
        self.delivery._make_room()

    @rule(steps=st.integers(1, 10))
    def idle(self, steps: int) -> None:
        """All clients read while nothing new is published."""
        self.page = self.snapshot_page = None
        exhaust(self.serving)
        for _ in range(steps):
            for client in self.clients:
                client.collect()
            self.catch_up()

    def catch_up(self) -> None:
        position = self.delivery.next_position()
        if position is not None:
            exhaust(self.delivery.serve(position, self.log.page(position, 3)))
        self.read_snapshot(2)
        if self.snapshot_page is not None:
            self.begin_to_serve_snapshot()
            self.continue_snapshot(inf)

    @precondition(lambda self: self.page is None)
    @rule(ahead=st.integers(0, 10))
    def retain(self, ahead: int) -> None:
        """Retention deletes old messages, delivered or not, but not between the read of a page and its use."""
        self.log.floor = max(self.log.floor, min(ahead, len(self.log.entries) + 1))

    @precondition(lambda self: self.page is None)
    @rule(first=st.integers(1, 20), length=st.integers(1, 4))
    def delete(self, first: int, length: int) -> None:
        """Messages before the newest one are deleted, and a repair records the range."""
        last = min(first + length, len(self.log.entries)) - 1
        self.log.holes.update(range(max(first, self.log.floor), last + 1))

    @rule(channel=st.sampled_from(CHANNELS), steps=st.integers(0, 3))
    def erase(self, channel: str, steps: int) -> None:
        """Messages are erased, while others are delivered. What a client has received of them is owed no more."""
        seqs = {e.seq for e in self.log.entries if e.channel == channel}
        lowest = self.delivery.begin_erasure()
        held = {e.seq for c in self.clients for i in c.send_queue._items if isinstance(i, EncodedMessages)
                for e in i.entries if e.seq}  # fmt: skip
        assert lowest == min(held, default=None)
        self.page = self.snapshot_page = None
        self.serving_snapshot = iter(())
        self.erased |= seqs
        self.log.entries = [erased(e) if e.seq in seqs else e for e in self.log.entries]
        self.log.kept.pop(channel, None)
        erasing = self.delivery.erase(seqs)
        for _ in range(steps):
            next(self.serving, None)
            next(erasing, None)
        exhaust(erasing)
        for client in self.clients:
            client.stream = [payload for payload in client.stream if int(payload) not in seqs]
            for pattern, lines in client.lines.items():
                client.lines[pattern] = [
                    line for line in lines if not (isinstance(line, wire.ChannelMessage) and line.seq in seqs)
                ]

    @invariant()
    def each_client_received_a_prefix_of_what_it_is_owed(self) -> None:
        for client in getattr(self, "clients", ()):
            for pattern, lines in client.lines.items():
                self.check(client, pattern, lines, complete=False)

    @invariant()
    def the_send_queues_count_what_they_hold_and_stay_within_the_budget(self) -> None:
        if not hasattr(self, "delivery"):
            return
        budget = self.delivery.budget
        items = [item for client in self.clients for item in client.send_queue._items]
        assert budget.messages == charge(items)
        replies = [item for item in items if isinstance(item, bytes)]
        assert budget.replies == sum(
            len(item) + (SUBSCRIPTION_LINE_BYTES if isinstance(item, SubscriptionLine) else REPLY_BYTES)
            for item in replies
        )
        pinned = [item for client in self.clients for item in client.send_queue._items[: client.send_queue._pinned]]
        assert budget.pinned == sum({id(m): m.charge for m in pinned if isinstance(m, EncodedMessages)}.values())
        self.max_pinned = max(self.max_pinned, charge(pinned))
        assert budget.messages <= max(budget.for_messages, self.max_pinned + budget.for_messages // 8)

    def teardown(self) -> None:
        if not hasattr(self, "delivery"):
            return
        exhaust(self.serving)
        self.snapshot_page = None
        for _ in range(3 * len(self.log.entries) * len(self.clients) + 60):
            for client in self.clients:
                client.collect()
            self.catch_up()
        for client in self.clients:
            client.collect()
            for pattern in client.wanted if client.protocol is not ProtocolVersion.FIRST else ():
                self.check(client, pattern, client.lines.get(pattern, []), complete=True)
            if client.protocol is ProtocolVersion.FIRST:
                self.check_first_version(client)
        statistics = self.delivery.statistics()
        ahead = sum(
            len(c.patterns) if c.protocol is ProtocolVersion.EVENTS else 1
            for c in self.clients
            for s in c.wanted.values()
            if s > len(self.log.entries)
        )
        assert statistics.lagging == ahead, "all others are live when everything is idle"

    def owed(self, pattern: str, producer: bytes, after: int) -> list[int]:
        return self.owed_any([pattern], producer, after)

    def owed_any(self, patterns: Sequence[str], producer: bytes, after: int) -> list[int]:
        found = (e for e in self.log.entries[after:] if any(matches(pattern, e.channel) for pattern in patterns))
        return [e.seq for e in found if e.origin != producer]

    def check(
        self, client: Client, pattern: str, lines: Sequence[wire.ServerMessage], *, complete: bool
    ) -> ClientState | None:
        """Between two gaps no message is missing or repeated, and a gap never covers a message that was sent.

        Returns what the client knows of the retained messages.
        """
        cursor = client.wanted[pattern]
        patterns = [pattern] if pattern else client.patterns
        due = self.owed_any(patterns, client.producer, cursor)
        state = client.states.get(pattern)
        if state is not None:
            state = state.copy()
        for line in lines:
            if state is not None:
                state.take(line)
            match line:
                case wire.ChannelMessage(seq=seq):
                    assert due and seq == due[0], f"{pattern}: got {seq}, owed {due[:3]}"
                    due.pop(0)
                    cursor = seq
                case wire.Gap(first=first, last=last, reason="erasure"):
                    assert state is not None and first == last + 1 and cursor <= last
                case wire.Gap(first=first, last=last, reason=reason):
                    assert cursor < first <= last
                    assert self.log.is_gone(last)
                    assert reason == "repair" or last < self.log.floor
                    assert not due or due[0] >= first, f"{pattern}: a gap from {first} without {due[:3]}"
                    assert all(self.log.is_gone(seq) for seq in due if seq <= last), "only deleted messages are missing"
                    due = [seq for seq in due if seq > last]
                case wire.Live(seq=seq) | wire.Head(seq=seq):
                    assert not due or due[0] > seq, f"{pattern}: complete up to {seq} without {due[:3]}"
                    if state is not None and state.collected is None:
                        self.check_state(state, patterns, seq)
        if complete:
            assert not due, f"{pattern}: never got {due[:3]}"
            if state is not None and patterns and cursor <= len(self.log.entries):
                assert state.collected is None, f"{pattern}: the snapshot is not complete"
                self.check_state(state, patterns, len(self.log.entries))
        return state

    def check_state(self, state: ClientState, patterns: Sequence[str], seq: int) -> None:
        """The state is that of a map fed with the log up to a seq. What was erased may have been received before."""
        wanted = {c: s for c, s in self.history[seq].items() if any(matches(pattern, c) for pattern in patterns)}
        known, wanted = ({c: s for c, s in found.items() if s not in self.erased} for found in (state.seqs, wanted))
        assert known == wanted, f"{patterns}: knows {known} at {seq}, not {wanted}"

    def check_first_version(self, client: Client) -> None:
        got = [int(payload) for payload in client.stream]
        assert got == sorted(set(got)), "one copy of each message, in order"
        due = sorted({seq for p, start in client.wanted.items() for seq in self.owed(p, client.producer, start)})
        # It recognizes messages by their payloads.
        due = [seq for seq in due if self.log.entries[seq - 1].payload != b"null" or seq in self.erased]
        missing = set(due) - set(got)
        assert set(got) <= set(due)
        assert all(self.log.is_gone(seq) for seq in missing), "only deleted messages are missing"


@pytest.fixture(autouse=True)
def one_message_per_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "SERVED_PER_CHECKPOINT", 1)
    monkeypatch.setattr(snapshots, "SERVED_PER_CHECKPOINT", 1)
    monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 250)


DeliveryMachine.TestCase.settings = settings(max_examples=3 * settings().max_examples, stateful_step_count=40)
TestDelivery = DeliveryMachine.TestCase


class Reader:
    """A `catbus.v1` subscriber of one pattern."""

    def __init__(self, delivery: Delivery, pattern: str, since: int | None = None, limit: int = 10_000) -> None:
        self.send_queue = SendQueue(TransportWriter(), lambda _: None, limit, delivery.budget)
        self.subscription = Subscription(self.send_queue)
        delivery.subscribe(self.subscription, pattern, since)

    def received(self) -> list[object]:
        """Take the send queue: seqs for messages, and the decoded lines between them."""
        received: list[object] = []
        for item in self.send_queue.take():
            if isinstance(item, EncodedMessages):
                received += [e.seq for e in item.entries]
            else:
                received.append(wire.decode_server(item))
        return received


@pytest.fixture
def log() -> ListLog:
    return ListLog()


@pytest.fixture
def delivery(log: ListLog) -> Delivery:
    return Delivery(log)  # type: ignore[arg-type]


def publish(log: ListLog, delivery: Delivery, *channels: str) -> None:
    entries = [entry(len(log.entries) + i, channel) for i, channel in enumerate(channels, 1)]
    log.entries += entries
    delivery.apply(entries)


def catch_up(log: ListLog, delivery: Delivery) -> None:
    position = delivery.next_position()
    if position is not None:
        exhaust(delivery.serve(position, log.page(position, 4)))


def test_batch_is_encoded_once_for_all_subscriptions_to_a_pattern(log: ListLog, delivery: Delivery) -> None:
    readers = [Reader(delivery, "a.*") for _ in range(3)]
    publish(log, delivery, "a.b", "a.c")
    [[first], [second], [third]] = [reader.send_queue.take() for reader in readers]
    assert first is second is third


def test_event_streams_with_the_same_patterns_and_other_cursors_share_a_page(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, *["a", "b", "c"] * 3)
    clients = [Client(ProtocolVersion.EVENTS, b"", SendQueue(TransportWriter(), lambda _: None)) for _ in range(2)]
    for client, since in zip(clients, (5, 0), strict=True):
        client.send_queue.protocol = ProtocolVersion.EVENTS
        delivery.subscribe_all(Subscription(client.send_queue), ["a", "b"], since)
    exhaust(delivery.serve(0, log.page(0, 100)))
    for client in clients:
        client.collect()
    received = [[line.seq for line in c.lines[""] if isinstance(line, wire.ChannelMessage)] for c in clients]
    assert received == [[7, 8], [1, 2, 4, 5, 7, 8]]


def test_overlapping_patterns_get_a_copy_each(log: ListLog, delivery: Delivery) -> None:
    send_queue = SendQueue(TransportWriter(), lambda _: None)
    for pattern in ("a.*", "*"):
        delivery.subscribe(Subscription(send_queue), pattern)
    publish(log, delivery, "a.b")
    assert {item.pattern for item in send_queue.take() if isinstance(item, EncodedMessages)} == {"a.*", "*"}


def test_page_read_before_a_batch_leaves_no_gap_before_it(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, "a", "a")
    reader = Reader(delivery, "a", since=0)
    page = log.page(0, 10)
    publish(log, delivery, "a")
    exhaust(delivery.serve(0, page))
    assert reader.received() == [1, 2]
    assert delivery.next_position() == 2
    exhaust(delivery.serve(2, log.page(2, 10)))
    assert reader.received() == [3, wire.Live("a", 3)]
    publish(log, delivery, "a")
    assert reader.received() == [4]


def test_subscription_at_the_head_is_live_at_once(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, "a")
    assert Reader(delivery, "a", since=1).received() == [wire.Live("a", 1)]


def test_subscription_ahead_of_the_head_waits_and_gets_no_repeat(log: ListLog, delivery: Delivery) -> None:
    reader = Reader(delivery, "a", since=2)
    publish(log, delivery, "a", "a")
    assert reader.received() == [wire.Live("a", 2)]
    publish(log, delivery, "a")
    assert reader.received() == [3]


def test_subscription_without_room_lags_and_the_others_do_not(log: ListLog, delivery: Delivery) -> None:
    slow, quick = Reader(delivery, "a", limit=300), Reader(delivery, "a")
    for _ in range(10):
        publish(log, delivery, "a")
    assert quick.received() == list(range(1, 11))
    assert (delivery.statistics().lagging, delivery.statistics().lags) == (1, 1)
    assert delivery.next_position() is None, "no page is read for a subscription without room"
    got = slow.received()
    for _ in range(10):
        catch_up(log, delivery)
        got += slow.received()
    assert got == [*range(1, 11), wire.Live("a", 10)]


def test_subscriptions_with_the_largest_send_queues_lag_when_the_budget_is_exceeded(log: ListLog) -> None:
    delivery = Delivery(log, Budget(4000))  # type: ignore[arg-type]
    small, large, quick = Reader(delivery, "a"), Reader(delivery, "a.*"), Reader(delivery, "b")
    publish(log, delivery, "a")
    for _ in range(40):
        publish(log, delivery, "a.b", "b")
        assert len(quick.received()) == 1
        assert delivery.statistics().held <= 3000
    statistics = delivery.statistics()
    assert (statistics.lagging, statistics.lags, statistics.withdrawals) == (1, 1, 1)
    assert small.received() == [1]
    assert delivery.next_position() is None, "no page is read for it until its send queue is empty"
    got = large.received()
    assert got == [], "all of it can be read again"
    for _ in range(40):
        catch_up(log, delivery)
        got += large.received()
    assert got == [*range(2, 82, 2), wire.Live("a.*", 81)]


def test_cost_of_statistics_does_not_depend_on_the_number_of_lagging_subscriptions(
    log: ListLog, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(log, delivery, *["a"] * 100)
    readers = [Reader(delivery, f"x.n{number}", since=50) for number in range(2 * MEASURED_PER_CHECKPOINT)]
    Reader(delivery, "x.n0")
    slowest = Reader(delivery, "y", since=10)
    deque(delivery.measure_lag(), maxlen=0)
    with monkeypatch.context() as patch:
        patch.delattr(TopicTree, "groups")
        figures = delivery.statistics()
    number = 2 * MEASURED_PER_CHECKPOINT + 1
    assert (figures.lagging, figures.lag, figures.patterns) == (number, 90, number)
    for reader in (*readers, slowest):
        delivery.unsubscribe(reader.subscription, next(iter(reader.subscription.patterns)))
    figures = delivery.statistics()
    assert (figures.lagging, figures.lag, figures.patterns) == (0, 0, 1)


def test_messages_that_many_subscriptions_share_count_once(log: ListLog) -> None:
    delivery = Delivery(log, Budget(20_000))  # type: ignore[arg-type]
    readers = [Reader(delivery, "a") for _ in range(100)]
    publish(log, delivery, *["a"] * 10)
    assert delivery.statistics().lagging == 0
    assert {tuple(reader.received()) for reader in readers} == {tuple(range(1, 11))}
    assert delivery.statistics().held == 0


def test_waiting_subscription_gets_one_gap_for_all_that_retention_dropped(log: ListLog, delivery: Delivery) -> None:
    slow = Reader(delivery, "a", limit=300)
    for _ in range(16):
        publish(log, delivery, "a")
    busy = Reader(delivery, "a", since=0)
    for log.floor in range(4, 14):
        catch_up(log, delivery)
        busy.received()
    assert slow.received() == [1, 2, 3]
    catch_up(log, delivery)
    assert slow.received() == [wire.Gap("a", 4, 12, "e", "retention")]
    catch_up(log, delivery)
    assert slow.received() == [13]


def test_messages_that_cannot_be_read_again_are_not_withdrawn(log: ListLog) -> None:
    delivery = Delivery(log, Budget(4000))  # type: ignore[arg-type]
    reader = Reader(delivery, "a")
    publish(log, delivery, "a", "a")
    log.epoch = "f"
    del log.entries[1:]
    delivery.restart(1)
    delivery.unsubscribe(reader.subscription, "a")
    again = Subscription(reader.send_queue)
    delivery.subscribe(again, "a")
    for _ in range(40):
        publish(log, delivery, "a")
    assert delivery.statistics().withdrawals > 0
    assert reader.received() == [1, 2, wire.Gap("a", 2, 1, "f", "epoch")]
    got = []
    for _ in range(20):
        catch_up(log, delivery)
        got += reader.received()
    assert got == [*range(2, 42), wire.Live("a", 41)]


def test_few_entries_are_read_for_a_send_queue_with_room_for_few(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, *["a"] * 100)
    slow = Reader(delivery, "a", since=0, limit=1000)
    got, rows = [], 0
    while 100 not in got:
        position = delivery.next_position()
        assert position is not None
        count = delivery.rows_from(position)
        page = log.page(position, count)
        rows += len(page.entries)
        exhaust(delivery.serve(position, page))
        got += slow.received()
    assert got == [*range(1, 101), wire.Live("a", 100)]
    assert rows <= 100 + 100 + 2 * 100, (
        "the first page is full; later ones have twice the entries that there is room for"
    )
    quick = Reader(delivery, "a", since=0)
    assert delivery.rows_from(0) == PAGE_ROWS
    assert quick.received() == []


def test_message_larger_than_the_send_queue_is_delivered(log: ListLog, delivery: Delivery) -> None:
    reader = Reader(delivery, "a", limit=50)
    publish(log, delivery, "a", "a")
    catch_up(log, delivery)
    assert reader.received() == [1]
    catch_up(log, delivery)
    assert reader.received() == [2, wire.Live("a", 2)]


def test_newly_lagging_subscription_does_not_starve_the_others(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, *["a"] * 6)
    Reader(delivery, "a", since=0)
    exhaust(delivery.serve(0, log.page(0, 3)))
    Reader(delivery, "b", since=0)
    assert delivery.next_position() == 3


def test_entries_in_memory_and_those_before_them_are_read_alternately(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, *["a"] * 100)
    log.memory_floor = 91
    far = [Reader(delivery, "b", since=since) for since in (0, 40)]
    near = Reader(delivery, "a", since=95)
    positions = []
    for _ in range(6):
        position = delivery.next_position()
        assert position is not None
        positions.append(position)
        exhaust(delivery.serve(position, log.page(position, 20)))
        if position == 95:
            assert near.received() == [*range(96, 101), wire.Live("a", 100)]
            near = Reader(delivery, "a", since=95)
    assert positions == [95, 0, 95, 20, 95, 40]
    assert all(reader.received() == [] for reader in far)


def test_sender_counts_in_the_size_of_an_entry() -> None:
    entries = [Entry(1, 0, "a", b"1", sender="x" * 1000)]
    recent = RecentMessages(10_000)
    recent.append(entries)
    assert recent.size == ENTRY_OVERHEAD + 1002
    assert EncodedMessages("a", entries).size >= len(EncodedMessages("a", entries).lines) - 100


def test_another_epoch_is_announced_to_every_subscription(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, "a", "a", "a")
    live, lagging, ahead = Reader(delivery, "a"), Reader(delivery, "a", since=2), Reader(delivery, "a", since=5)
    log.epoch = "f"
    delivery.restart(2)
    assert live.received() == [wire.Gap("a", 3, 2, "f", "epoch")]
    assert lagging.received() == [wire.Gap("a", 3, 2, "f", "epoch"), wire.Live("a", 2)]
    assert ahead.received() == [wire.Gap("a", 3, 2, "f", "epoch"), wire.Live("a", 2)]
    delivery.apply([entry(3, "a")])
    assert (live.received(), lagging.received(), ahead.received()) == ([3], [3], [3])


def test_lagging_subscription_resumes_at_its_cursor_if_both_epochs_have_it(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, *["a"] * 4)
    lagging, further = Reader(delivery, "a", since=1), Reader(delivery, "a", since=3)
    log.epoch = "f"
    del log.entries[2:]
    delivery.restart(2)
    assert lagging.received() == [wire.Gap("a", 2, 1, "f", "epoch")]
    assert further.received() == [wire.Gap("a", 3, 2, "f", "epoch"), wire.Live("a", 2)]
    publish(log, delivery, "a")
    catch_up(log, delivery)
    assert lagging.received() == [2, 3, wire.Live("a", 3)]
    assert further.received() == [3]


def test_subscription_ahead_of_its_replica_resumes_in_an_epoch_that_is_further(
    log: ListLog, delivery: Delivery
) -> None:
    publish(log, delivery, *["a"] * 3)
    ahead = Reader(delivery, "a", since=5)
    log.epoch = "f"
    log.entries += [entry(seq, "a") for seq in range(4, 9)]
    delivery.restart(8)
    assert ahead.received() == [wire.Gap("a", 6, 5, "f", "epoch")]
    catch_up(log, delivery)
    assert ahead.received() == [6, 7, 8, wire.Live("a", 8)]


def test_lower_seq_of_another_epoch_is_delivered(log: ListLog, delivery: Delivery) -> None:
    """The start of a subscription in another epoch does not filter the seqs of this one."""
    publish(log, delivery, *["a"] * 4)
    send_queue = SendQueue(TransportWriter(), lambda _: None)
    send_queue.protocol = ProtocolVersion.FIRST
    old = Subscription(send_queue)
    for pattern in ("*", "a"):
        delivery.subscribe(old, pattern)
    slow = Reader(delivery, "a", limit=150)
    del log.entries[1:]
    delivery.restart(1)
    slow.received()
    publish(log, delivery, "a", "a", "a")
    assert [e.seq for item in send_queue.take() if isinstance(item, EncodedMessages) for e in item.entries] == [2, 3, 4]
    got: list[object] = []
    for _ in range(5):
        got += slow.received()
        catch_up(log, delivery)
    assert [seq for seq in got if isinstance(seq, int)] == [2, 3, 4]


def test_page_of_another_epoch_is_not_delivered_any_further(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, "a", "a")
    first, second = Reader(delivery, "a", since=0), Reader(delivery, "a", since=0, limit=300)
    steps = delivery.serve(0, log.page(0, 2))
    next(steps)
    log.epoch = "f"
    log.entries.clear()
    delivery.restart(0)
    first.received(), second.received()
    publish(log, delivery, *["a"] * 4)
    assert delivery.next_position() == 0
    exhaust(steps)
    assert second.received() == [], "the messages of that page do not exist in this epoch"


async def test_page_that_was_read_before_another_epoch_is_not_delivered() -> None:
    """The log may begin another epoch between the read of a page and its use."""

    class RestoredLog(ListLog):
        """A log that is restored to its second message when its first page has been read."""

        restored = False
        follower: Delivery

        async def read(self, after: int, *, rows: int, size: int) -> LogPage:
            await trio.lowlevel.checkpoint()
            page = self.page(after, rows)
            if not self.restored:
                self.restored, self.epoch = True, "f"
                self.entries[2:] = [entry(seq, "b") for seq in range(3, 7)]
                self.follower.restart(6)
            return page

    log = RestoredLog()
    log.follower = delivery = Delivery(log)  # type: ignore[arg-type]
    publish(log, delivery, *["a"] * 6)
    reader = Reader(delivery, "a", since=0)
    received: list[object] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(delivery.run)
        with trio.fail_after(5):
            while wire.Live("a", 6) not in received:
                await trio.lowlevel.checkpoint()
                received += reader.received()
        nursery.cancel_scope.cancel()
    assert [seq for seq in received if isinstance(seq, int)] == [1, 2], "the others are of the epoch before"


def test_subscription_whose_messages_are_withdrawn_gets_nothing_more_of_the_page(
    log: ListLog, delivery: Delivery
) -> None:
    publish(log, delivery, *["a"] * 8)
    reader = Reader(delivery, "a", since=0)
    catch_up(log, delivery)
    steps = delivery.serve(4, log.page(4, 4))
    next(steps)
    delivery._withdraw(reader.send_queue)
    exhaust(steps)
    got = reader.received()
    for _ in range(3):
        catch_up(log, delivery)
        got += reader.received()
    assert got == [*range(1, 9), wire.Live("a", 8)]


def test_page_that_was_read_before_an_erasure_is_not_delivered_any_further(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, "a", "a", "a")
    readers = [Reader(delivery, "a", since=0) for _ in range(3)]
    steps = delivery.serve(0, log.page(0, 3))
    next(steps)
    delivery.begin_erasure()
    exhaust(steps)
    log.entries[1] = erased(log.entries[1])
    steps = delivery.serve(0, log.page(0, 3))
    exhaust(delivery.erase({2}))
    exhaust(steps)
    for _ in range(3):
        catch_up(log, delivery)
    for reader in readers:
        assert reader.received() == [1, 3, wire.Live("a", 3)]


async def test_page_that_arrives_after_an_erasure_is_read_again(log: ListLog, delivery: Delivery) -> None:
    """Even if the erasure comes between the end of the reading and the first delivery."""
    publish(log, delivery, "a", "a")
    reader, reads = Reader(delivery, "a", since=0), 0

    async def read(position: int, *, rows: int, size: int) -> LogPage:
        nonlocal reads
        page = log.page(position, rows)
        reads += 1
        if reads == 1:
            log.entries[0] = erased(log.entries[0])
            delivery.begin_erasure()
            exhaust(delivery.erase({1}))
        await trio.lowlevel.checkpoint()
        return page

    log.read = read  # type: ignore[attr-defined]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(delivery.run)
        with trio.fail_after(5):
            while reader.subscription.lagging:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert reader.received() == [2, wire.Live("a", 2)]


def test_erased_messages_that_a_subscription_in_this_process_has_taken_are_dropped(
    log: ListLog, delivery: Delivery
) -> None:
    taken = deque([entry(1, "a"), entry(0, "a"), entry(2, "a")])
    send_queue = SendQueue(TransportWriter(), lambda _: None)
    delivery.subscribe(Subscription(send_queue, taken=taken), "a")
    assert delivery.begin_erasure() == 1
    exhaust(delivery.erase({1}))
    assert [e.seq for e in taken] == [0, 2]


def test_pages_of_history_are_found_in_send_queues_without_subscriptions(delivery: Delivery) -> None:
    send_queue = SendQueue(TransportWriter(), lambda _: None)
    for line in (HistoryLine(b"page", [7, 9], b"error"), HistoryLine(b"other", [8], b"error")):
        send_queue.put(line)
        delivery.note_history(send_queue)
    assert delivery.begin_erasure() == 7
    exhaust(delivery.erase({9}))
    assert send_queue.take() == [b"error", b"other"]
    assert delivery.begin_erasure() is None
    assert not delivery._with_history


def test_replica_overtaken_by_retention_announces_a_gap(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, "a")
    reader = Reader(delivery, "a")
    delivery.restart(5, "retention")
    assert reader.received() == [wire.Gap("a", 2, 5, "e", "retention")]


def test_deleted_range_is_a_gap_for_subscriptions_that_reach_it(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, *["a"] * 12)
    log.holes = {7, 8}
    far, near = Reader(delivery, "a", since=0), Reader(delivery, "a", since=6)
    exhaust(delivery.serve(6, log.page(6, 10)))
    assert near.received() == [wire.Gap("a", 7, 8, "e", "repair"), *range(9, 13), wire.Live("a", 12)]
    got = []
    for _ in range(4):
        catch_up(log, delivery)
        got += far.received()
    assert got == [*range(1, 7), wire.Gap("a", 7, 8, "e", "repair"), *range(9, 13), wire.Live("a", 12)]


def test_replica_that_stopped_before_a_deleted_range_continues_with_its_lagging_subscriptions(
    log: ListLog, delivery: Delivery
) -> None:
    publish(log, delivery, *["a"] * 4)
    far, live, within = Reader(delivery, "a", since=1), Reader(delivery, "a"), Reader(delivery, "a", since=5)
    log.entries += [entry(n, "a") for n in (5, 6, 7)]
    log.holes = {5, 6}
    delivery.restart(6, "repair")
    assert live.received() == [wire.Gap("a", 5, 6, "e", "repair")]
    assert within.received() == [wire.Gap("a", 6, 6, "e", "repair"), wire.Live("a", 6)]
    delivery.apply([log.entries[6]])
    assert live.received() == within.received() == [7]
    got = []
    for _ in range(3):
        catch_up(log, delivery)
        got += far.received()
    assert got == [2, 3, 4, wire.Gap("a", 5, 6, "e", "repair"), 7, wire.Live("a", 7)]


def test_subscription_ahead_of_a_replica_overtaken_by_retention_misses_nothing(delivery: Delivery) -> None:
    there, beyond = Reader(delivery, "a", since=5), Reader(delivery, "a", since=7)
    delivery.restart(5, "retention")
    assert (there.received(), beyond.received()) == ([wire.Live("a", 5)], [])
    delivery.apply([entry(6, "a"), entry(7, "a")])
    assert (there.received(), beyond.received()) == ([6, 7], [wire.Live("a", 7)])
    delivery.apply([entry(8, "a")])
    assert (there.received(), beyond.received()) == ([8], [8])


def test_ephemeral_message_reaches_lagging_subscriptions_and_moves_no_cursor(log: ListLog, delivery: Delivery) -> None:
    publish(log, delivery, "a")
    live, lagging = Reader(delivery, "a"), Reader(delivery, "a", since=0)
    delivery.broadcast(entry(0, "a"))
    assert (live.received(), lagging.received()) == ([0], [0])
    assert delivery.next_position() == 0


def test_ephemeral_message_is_sent_as_a_datagram_if_requested_and_small_enough(delivery: Delivery) -> None:
    sent: list[bytes] = []

    def send_datagram(line: bytes) -> bool:
        if len(line) < 200:
            sent.append(line)
        return len(line) < 200

    send_queue = SendQueue(TransportWriter(), lambda _: None)
    delivery.subscribe(Subscription(send_queue, PRODUCERS[0], send_datagram), "a.*")
    delivery.broadcast(Entry(0, 1, "a.b", b'"fits"', None, None))
    delivery.broadcast(Entry(0, 1, "a.b", b'"mine"', None, PRODUCERS[0]))
    delivery.broadcast(Entry(0, 1, "a.b", b'"%b"' % (b"x" * 200), None, None))
    assert [msgspec.json.decode(line)["payload"] for line in sent] == ["fits"]
    assert [len(item.entries) for item in send_queue.take() if isinstance(item, EncodedMessages)] == [1]


def test_first_version_client_gets_an_ephemeral_message_once(delivery: Delivery) -> None:
    send_queue = SendQueue(TransportWriter(), lambda _: None)
    subscription = Subscription(send_queue)
    for pattern in ("a.*", "*", "a.b"):
        delivery.subscribe(subscription, pattern)
    delivery.broadcast(entry(0, "a.b"))
    assert len(send_queue.take()) == 1
