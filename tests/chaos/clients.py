"""The load of a chaos run: publishers and subscribers of every kind, which record what they see."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Protocol

import msgspec
import trio

from catbus.client import (
    Backoff,
    Bus,
    Disconnected,
    Gap,
    Head,
    Live,
    LiveMap,
    Message,
    Reconnected,
    Reconnecting,
    Refused,
    Transport,
    open_bus,
)
from catbus.client.transport_interface import MAIN_STREAM, DrivenTransport
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS
from catbus.protocol.json_splitter import JsonSplitter
from tests.postgres.processes import token as sign_token
from tests.postgres.sql import open_sql

from .database_pair import DatabasePair
from .history import (
    REMOVAL,
    Answered,
    CaughtUp,
    Connected,
    ConnectionLost,
    GapAnnounced,
    History,
    Published,
    Received,
    SubscriptionBegan,
    SubscriptionRevoked,
    now,
)
from .replica_slots import ReplicaSlot

_decode = msgspec.json.Decoder(dict[str, Any]).decode

TRANSPORTS = ("websocket", "webtransport")

STALE_BALANCER_SHARE = 0.2
"""How often the load balancer chooses a replica that is no longer ready."""

CHANNELS = ("orders.new", "orders.paid", "stock.a", "stock.b", "chat")
PATTERNS = ("*", "orders.*", "orders.paid", "stock.a", "chat")


class HasCursor(Protocol):
    """A subscription whose client keeps the cursor."""

    @property
    def cursor(self) -> int: ...
    @property
    def epoch(self) -> str: ...


@dataclass
class LoadState:
    """The shared state of all clients."""

    history: History
    slots: Sequence[ReplicaSlot]
    database: DatabasePair
    rng: random.Random
    load_ended: trio.Event = field(default_factory=trio.Event)
    """Set when publishers have to end."""
    cursors: dict[tuple[str, str], HasCursor] = field(default_factory=dict)
    """The cursor of each subscription, by subscriber and pattern."""
    buses: dict[str, Bus] = field(default_factory=dict)
    maps: dict[str, LiveMap[str, Message]] = field(default_factory=dict)
    """The live maps of retained messages, by watcher."""
    staying: set[str] = field(default_factory=set)
    """The members that stay."""
    published: int = 0
    answered: int = 0
    received: int = 0

    @property
    def in_flight(self) -> int:
        """Publishes without a reply."""
        return self.published - self.answered


class LoadClient:
    """A client that a load balancer sends to some replica each time it connects."""

    def __init__(self, state: LoadState, name: str, transports: Sequence[str], token: str | None = None) -> None:
        self.state = state
        self.name = name
        self.token = token or sign_token(name)
        self._transports = transports
        self._dials = count(state.rng.randrange(2))
        self._last_dialled: tuple[str, str] | None = None
        self.replica = ""

    async def dial(self) -> Transport:
        transport = self._transports[next(self._dials) % len(self._transports)]
        slot = self.choose_slot()
        connection = await slot.dial(transport)
        self._last_dialled = slot.name, transport
        return connection

    def choose_slot(self) -> ReplicaSlot:
        """Choose the replica of the next connection."""
        state, rng = self.state, self.state.rng
        ready = [slot for slot in state.slots if slot.ready]
        return rng.choice(ready if ready and rng.random() > STALE_BALANCER_SHARE else list(state.slots))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Bus]:
        async with open_bus(
            self.dial,
            token=self.token,
            persist=True,
            reconnect=Backoff(0.1, 1.0),
            keepalive=0.5,
            timeout=2.0,
            on_event=self._note,
        ) as bus:
            self.record_connected()
            self.state.buses[self.name] = bus
            try:
                yield bus
            finally:
                self.record_left()

    def record_connected(self) -> None:
        if self._last_dialled is not None:
            self.replica, transport = self._last_dialled
            self.state.history.add(Connected(at=now(), client=self.name, replica=self.replica, transport=transport))

    def record_connected_once(self) -> None:
        if not self.replica:
            self.record_connected()

    def record_left(self) -> None:
        """Record nothing when the connection ends, because that is not a loss."""
        self.replica = ""

    def record_lost(self) -> None:
        if self.replica:
            self.state.history.add(ConnectionLost(at=now(), client=self.name, replica=self.replica))
            self.replica = ""

    def _note(self, event: object) -> None:
        if isinstance(event, Reconnected):
            self.record_connected()
        elif isinstance(event, Reconnecting):
            self.record_lost()


# Publishing


async def publish(client: LoadClient, channels: Sequence[str], pause: float) -> None:
    """Publish a few messages at a time, in order, over whatever connection there is, until the load ends."""
    state = client.state
    history, rng = state.history, state.rng
    numbers = count(1)
    async with client.connect() as bus:
        while not state.load_ended.is_set():
            batch = [(rng.choice(channels), next(numbers)) for _ in range(rng.randint(1, 5))]
            for channel, number in batch:
                history.add(Published(at=now(), publisher=client.name, number=number, channel=channel))
            state.published += len(batch)
            messages = [(channel, [client.name, number, padding(rng)]) for channel, number in batch]
            for (_, number), outcome in zip(batch, await bus.publish_many(messages), strict=True):
                refusal = outcome.code if isinstance(outcome, Refused) else ""
                seq = outcome if isinstance(outcome, int) else 0
                history.add(Answered(at=now(), publisher=client.name, number=number, seq=seq, refusal=refusal))
            state.answered += len(batch)
            await trio.sleep(pause * rng.uniform(0.5, 1.5))


def padding(rng: random.Random) -> str:
    """Return padding of random length: some messages fit into a notification, some do not."""
    return "x" * int(rng.expovariate(1 / 200))


async def publish_ephemeral(client: LoadClient, pause: float) -> None:
    """Publish ephemeral messages, which may be lost but never repeated."""
    state = client.state
    numbers = count(1)
    async with client.connect() as bus:
        while not state.load_ended.is_set():
            number = next(numbers)
            with suppress(Refused):
                await bus.publish("cursors.x", [client.name, number], ephemeral=True)
            await trio.sleep(pause * state.rng.uniform(0.5, 1.5))


async def publish_sql(state: LoadState, name: str, pause: float) -> None:
    """Publish in database transactions. A publisher that loses its connection continues under another name."""
    history, rng = state.history, state.rng
    for life in count(1):
        publisher = f"{name}-{life}"
        numbers = count(1)
        with suppress(*DATABASE_ERRORS):
            async with open_sql(state.database.url) as sql:
                while not state.load_ended.is_set():
                    batch = [(rng.choice(CHANNELS), next(numbers)) for _ in range(rng.randint(1, 3))]
                    for channel, number in batch:
                        history.add(Published(at=now(), publisher=publisher, number=number, channel=channel))
                    values = [msgspec.json.encode([publisher, number]).decode() for _, number in batch]
                    await sql.fetch(
                        "SELECT catbus.publish(m.channel, m.payload) FROM unnest($1::text[], $2::text[]) "
                        "WITH ORDINALITY AS m (channel, payload, i) ORDER BY m.i",
                        [channel for channel, _ in batch],
                        values,
                    )
                    for _, number in batch:
                        history.add(Answered(at=now(), publisher=publisher, number=number))
                    await trio.sleep(pause * rng.uniform(0.5, 1.5))
        if state.load_ended.is_set():
            return
        await trio.sleep(0.2)


# Subscribing


async def subscribe(
    client: LoadClient, *patterns: str, stream: bool = False, pause: float = 0.0, buffer: int = 1000
) -> None:
    """Subscribe to each pattern with its own cursor, until cancelled."""
    async with client.connect() as bus, trio.open_nursery() as nursery:
        for pattern in patterns:
            nursery.start_soon(subscribe_once, client, bus, pattern, None, stream, pause, buffer)


async def reconnect_periodically(client: LoadClient, pattern: str) -> None:
    """Disconnect and reconnect over the other transport, resuming at the cursor, again and again."""
    where: list[tuple[int, str] | None] = [None]
    while True:
        with trio.move_on_after(client.state.rng.uniform(3, 10)):
            async with client.connect() as bus:
                await subscribe_once(client, bus, pattern, where)
        await trio.sleep(client.state.rng.uniform(0, 0.5))


async def subscribe_once(
    client: LoadClient,
    bus: Bus,
    pattern: str,
    where: list[tuple[int, str] | None] | None = None,
    stream: bool = False,
    pause: float = 0.0,
    buffer: int = 1000,
) -> None:
    state, history, name = client.state, client.state.history, client.name
    place: list[tuple[int, str] | None] = where if where is not None else [None]

    def note(event: Gap | Live | Head) -> None:
        if isinstance(event, Gap):
            history.add(
                GapAnnounced(
                    at=now(),
                    subscriber=name,
                    pattern=pattern,
                    epoch=event.epoch,
                    first=event.first,
                    last=event.last,
                    reason=event.reason,
                )
            )
        else:
            history.add(CaughtUp(at=now(), subscriber=name, pattern=pattern, epoch=messages.epoch, seq=messages.cursor))

    while True:
        since, epoch = place[0] if place[0] is not None else (None, None)
        try:
            async with bus.subscribe(
                pattern, since=since, epoch=epoch, stream=stream, buffer=buffer, on_event=note
            ) as messages:
                history.add(
                    SubscriptionBegan(
                        at=now(), subscriber=name, pattern=pattern, cursor=messages.cursor, epoch=messages.epoch
                    )
                )
                state.cursors[name, pattern] = messages
                try:
                    async for message in messages:
                        record_received(state, name, pattern, messages.epoch, message)
                        if pause:
                            await trio.sleep(pause)
                finally:
                    place[0] = messages.cursor, messages.epoch
        except Refused as refusal:
            if refusal.code == ErrorCode.REVOKED:
                history.add(SubscriptionRevoked(at=now(), subscriber=name, pattern=pattern))
            elif refusal.code != ErrorCode.UNAUTHORIZED:
                raise
            await trio.sleep(0.1)


def identify(payload: Any) -> tuple[str, int]:
    """Return what identifies a message with this payload."""
    if payload is None:
        return REMOVAL
    publisher, number = payload[:2]
    return publisher, number


def record_received(state: LoadState, name: str, pattern: str, epoch: str, message: Message, session: int = 0) -> None:
    state.received += 1
    state.history.add(
        Received(
            at=now(),
            subscriber=name,
            pattern=pattern,
            epoch=epoch,
            seq=message.seq or 0,
            channel=message.channel,
            message=identify(message.payload),
            sent=(message.at or 0) / 1000,
            session=session,
        )
    )


class RawClient(LoadClient):
    """A client without the client library. It keeps a cursor for its one pattern, and trusts the broker."""

    cursor = 0
    epoch = ""

    def __init__(self, state: LoadState, name: str, transport: str, pattern: str) -> None:
        super().__init__(state, name, [transport])
        self._pattern = pattern
        self._has_cursor = self._subscribed = False
        self._session = 0
        self._log_epoch = ""

    async def run(self) -> None:
        """Connect and disconnect, so that there is always something to catch up with."""
        rng = self.state.rng
        while True:
            with trio.move_on_after(rng.uniform(1, 5)):
                await self.stay_connected()
            self.record_left()
            await trio.sleep(rng.uniform(0.1, 1.0))

    async def stay_connected(self) -> None:
        """Connect again and again."""
        while True:
            await self.connect_once()
            await trio.sleep(self.state.rng.uniform(0.05, 0.3))

    async def connect_once(self) -> None:
        """Connect, and stay until the connection is lost."""
        try:
            transport = await self.dial()
            async with trio.open_nursery() as nursery:
                if isinstance(transport, DrivenTransport):
                    nursery.start_soon(transport.run)
                try:
                    await self._run_session(transport)
                finally:
                    with trio.move_on_after(0.5, shield=True):
                        await transport.aclose()
                    nursery.cancel_scope.cancel()
        except* Disconnected:
            pass
        self.record_lost()

    async def _run_session(self, transport: Transport) -> None:
        self._session += 1
        objects: JsonSplitter[dict[str, Any]] = JsonSplitter(_decode, 1 << 20)
        await transport.send(_line({"type": "auth", "token": self.token, "protocol": 1}))
        silent = 0
        while True:
            with trio.move_on_after(0.5) as limit:
                chunk = await transport.receive()
            if limit.cancelled_caught:
                silent += 1
                if silent > 4:
                    return
                await transport.send(_line({"type": "ping", "seq": silent}))
                continue
            silent = 0
            for message in objects.feed(chunk.data) if chunk.stream == MAIN_STREAM else [_decode(chunk.data)]:
                assert not isinstance(message, PeerError), message
                request = self._handle(message)
                if request is not None:
                    await transport.send(_line(request))
            if transport.pending:
                await transport.send(b"")

    def _handle(self, message: dict[str, Any]) -> dict[str, Any] | None:
        history, name, pattern = self.state.history, self.name, self._pattern
        kind = message["type"]
        if kind == "auth_ok":
            self.record_connected()
            self._subscribed = False
            self._log_epoch = message["epoch"]
            request: dict[str, Any] = {"type": "subscribe", "pattern": pattern, "id": 1}
            if self._has_cursor:
                request |= {"since": self.cursor, "epoch": self.epoch}
            return request
        if kind == "message":
            seq = message.get("seq", 0)
            if seq:
                self.cursor, self.epoch = seq, self._log_epoch
            payload = msgspec.Raw(msgspec.json.encode(message["payload"]))
            whole = Message(message["channel"], payload, pattern, seq, message.get("at"))
            record_received(self.state, name, pattern, self._log_epoch, whole, self._session)
        elif kind == "subscribed":
            self._subscribed = True
            self._log_epoch = message["epoch"]
            if self._has_cursor:
                return None
            self._has_cursor = True
            self.cursor, self.epoch = message["seq"], self._log_epoch
            self.state.cursors[name, pattern] = self
            history.add(
                SubscriptionBegan(at=now(), subscriber=name, pattern=pattern, cursor=self.cursor, epoch=self.epoch)
            )
        elif kind == "gap":
            self._log_epoch = message["epoch"]
            self.cursor, self.epoch = message["to"], self._log_epoch
            history.add(
                GapAnnounced(
                    at=now(),
                    subscriber=name,
                    pattern=pattern,
                    epoch=self.epoch,
                    first=message["from"],
                    last=message["to"],
                    reason=message["reason"],
                )
            )
        elif kind in ("live", "head") and self._subscribed:
            self._log_epoch = message.get("epoch", self._log_epoch)
            self.cursor, self.epoch = message["seq"], self._log_epoch
            history.add(CaughtUp(at=now(), subscriber=name, pattern=pattern, epoch=self.epoch, seq=self.cursor))
        return None


def _line(message: dict[str, Any]) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def start_clients(state: LoadState, roles: dict[str, str], subscribers: trio.Nursery, publishers: trio.Nursery) -> None:
    """Start all clients. `roles`: the tokens of the changing roles, by name."""
    ws, wt = ["websocket"], ["webtransport"]

    def client(name: str, transports: Sequence[str], token: str | None = None) -> LoadClient:
        return LoadClient(state, name, transports, token)

    for transport in TRANSPORTS:
        for pattern in PATTERNS:
            subscribers.start_soon(subscribe, client(f"{transport}-{pattern}", [transport]), pattern)
        subscribers.start_soon(subscribe, client(f"{transport}-overlapping", [transport]), *PATTERNS[:3])
        subscribers.start_soon(RawClient(state, f"{transport}-bare", transport, "*").run)
        subscribers.start_soon(RawClient(state, f"{transport}-bare-orders", transport, "orders.*").run)
        subscribers.start_soon(RawClient(state, f"{transport}-bare-cursors", transport, "cursors.*").run)
        publishers.start_soon(publish_ephemeral, client(f"{transport}-ephemeral", [transport]), 0.2)
        for number in range(4):
            publishers.start_soon(publish, client(f"{transport}-publisher-{number}", [transport]), CHANNELS, 0.8)
    slow = client("slow", ws)
    subscribers.start_soon(partial(subscribe, slow, "orders.*", pause=0.03, buffer=20))
    for number in range(2):
        streams = client(f"streams-{number}", wt)
        subscribers.start_soon(partial(subscribe, streams, "*", "orders.*", "chat", stream=True))
        subscribers.start_soon(reconnect_periodically, client(f"wanderer-{number}", TRANSPORTS), "*")
        subscribers.start_soon(subscribe, client(f"either-{number}", TRANSPORTS), "*")
        publishers.start_soon(publish_sql, state, f"sql-{number}", 0.5)
    for role, token in roles.items():
        for transport in TRANSPORTS:
            subscribers.start_soon(subscribe, client(f"{role}/{transport}", [transport], token), f"{role}.*")
        subscribers.start_soon(subscribe, client(f"{role}-all", wt), f"{role}.*")
        publishers.start_soon(publish, client(f"{role}/publisher", ws, token), [f"{role}.x"], 0.3)
        publishers.start_soon(publish, client(f"{role}-publisher", wt), [f"{role}.x", f"{role}.y"], 0.3)


async def catch_up(state: LoadState, epoch: str, head: int) -> list[str]:
    """Wait until all subscriptions have the whole log. Returns those that do not."""
    behind: list[str] = []
    with trio.move_on_after(45):
        while True:
            for bus in list(state.buses.values()):
                with suppress(Disconnected), trio.move_on_after(3):
                    await bus.ping()
            behind = [
                f"{name} to {pattern}, at {at.cursor} of {at.epoch}"
                for (name, pattern), at in state.cursors.items()
                if at.epoch != epoch or at.cursor < head
            ]
            if not behind:
                break
            await trio.sleep(0.2)
    return behind
