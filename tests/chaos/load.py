"""Who publishes and subscribes during a chaos run: clients of every kind, each of which takes down what it sees."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import msgspec
import trio

from catbus.client import (
    Backoff,
    Bus,
    Disconnected,
    Gap,
    Head,
    Live,
    Message,
    Messages,
    Reconnected,
    Reconnecting,
    Refused,
    Transport,
    open_bus,
)
from catbus.client.transport import MAIN, Driven
from catbus.errors import Code
from catbus.postgres.access.asyncpg_bridge import OUTAGE
from catbus.protocol.json_splitter import Framer
from tests.postgres.processes import token
from tests.postgres.sql import open_sql

from .database import Database
from .history import (
    Answered,
    Began,
    Complete,
    Gapped,
    History,
    Linked,
    Lost,
    Published,
    Received,
    Revoked,
    now,
)
from .replicas import Post

TRANSPORTS = ("websocket", "webtransport")

STALE = 0.2
"""How often a balancer sends somebody to a replica that is not there any more."""

CHANNELS = ("orders.new", "orders.paid", "stock.a", "stock.b", "chat")
PATTERNS = ("*", "orders.*", "orders.paid", "stock.a", "chat")


@dataclass
class Ground:
    """What all clients stand on."""

    history: History
    posts: Sequence[Post]
    database: Database
    chance: random.Random
    over: trio.Event = field(default_factory=trio.Event)
    """Publishers end with this."""
    positions: dict[tuple[str, str], Messages | Bare] = field(default_factory=dict)
    """Who subscribes to what, and how far each has got."""
    buses: dict[str, Bus] = field(default_factory=dict)
    published: int = 0
    answered: int = 0
    received: int = 0

    @property
    def flying(self) -> int:
        """Publishes that have no answer yet."""
        return self.published - self.answered


class Client:
    """One that is sent to some replica by a balancer, whenever it connects."""

    def __init__(self, ground: Ground, name: str, transports: Sequence[str], bearer: str | None = None) -> None:
        self.ground = ground
        self.name = name
        self.bearer = bearer or token(name)
        self._transports = transports
        self._dials = count(ground.chance.randrange(2))
        self._dialled: tuple[str, str] | None = None
        self._linked = ""

    async def dial(self) -> Transport:
        ground, chance = self.ground, self.ground.chance
        ready = [post for post in ground.posts if post.ready]
        post = chance.choice(ready if ready and chance.random() > STALE else list(ground.posts))
        transport = self._transports[next(self._dials) % len(self._transports)]
        connection = await post.dial(transport)
        self._dialled = post.name, transport
        return connection

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Bus]:
        async with open_bus(
            self.dial,
            token=self.bearer,
            persist=True,
            reconnect=Backoff(0.1, 1.0),
            keepalive=0.5,
            timeout=2.0,
            on_event=self._note,
        ) as bus:
            self.link()
            self.ground.buses[self.name] = bus
            try:
                yield bus
            finally:
                self._linked = ""

    def link(self) -> None:
        if self._dialled is not None:
            self._linked, transport = self._dialled
            self.ground.history.add(Linked(at=now(), client=self.name, replica=self._linked, transport=transport))

    def lose(self) -> None:
        if self._linked:
            self.ground.history.add(Lost(at=now(), client=self.name, replica=self._linked))
            self._linked = ""

    def _note(self, event: object) -> None:
        if isinstance(event, Reconnected):
            self.link()
        elif isinstance(event, Reconnecting):
            self.lose()


# Publishing


async def publish(client: Client, channels: Sequence[str], pause: float) -> None:
    """Publish a few messages at a time, in order, through whatever connections there are, until it is over."""
    ground = client.ground
    history, chance = ground.history, ground.chance
    numbers = count(1)
    async with client.connect() as bus:
        while not ground.over.is_set():
            batch = [(chance.choice(channels), next(numbers)) for _ in range(chance.randint(1, 5))]
            for channel, number in batch:
                history.add(Published(at=now(), publisher=client.name, number=number, channel=channel))
            ground.published += len(batch)
            messages = [(channel, [client.name, number, padding(chance)]) for channel, number in batch]
            for (_, number), outcome in zip(batch, await bus.publish_many(messages), strict=True):
                refusal = outcome.code if isinstance(outcome, Refused) else ""
                seq = outcome if isinstance(outcome, int) else 0
                history.add(Answered(at=now(), publisher=client.name, number=number, seq=seq, refusal=refusal))
            ground.answered += len(batch)
            await trio.sleep(pause * chance.uniform(0.5, 1.5))


def padding(chance: random.Random) -> str:
    """Messages of many sizes: some fit into a notification, some do not."""
    return "x" * int(chance.expovariate(1 / 200))


async def publish_ephemeral(client: Client, pause: float) -> None:
    """Ephemeral messages, which nobody promises to arrive: but not twice."""
    ground = client.ground
    numbers = count(1)
    async with client.connect() as bus:
        while not ground.over.is_set():
            number = next(numbers)
            with suppress(Refused):
                await bus.publish("cursors.x", [client.name, number], ephemeral=True)
            await trio.sleep(pause * ground.chance.uniform(0.5, 1.5))


async def publish_sql(ground: Ground, name: str, pause: float) -> None:
    """Publish in transactions of the database. A publisher whose connection is lost comes back under another name."""
    history, chance = ground.history, ground.chance
    for life in count(1):
        publisher = f"{name}-{life}"
        numbers = count(1)
        with suppress(*OUTAGE):
            async with open_sql(ground.database.url) as sql:
                while not ground.over.is_set():
                    batch = [(chance.choice(CHANNELS), next(numbers)) for _ in range(chance.randint(1, 3))]
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
                    await trio.sleep(pause * chance.uniform(0.5, 1.5))
        if ground.over.is_set():
            return
        await trio.sleep(0.2)


# Subscribing


async def subscribe(
    client: Client, *patterns: str, stream: bool = False, pause: float = 0.0, buffer: int = 1000
) -> None:
    """Subscribe to each pattern, with a cursor of its own, for as long as there is a connection to be had."""
    async with client.connect() as bus, trio.open_nursery() as nursery:
        for pattern in patterns:
            nursery.start_soon(_follow, client, bus, pattern, None, stream, pause, buffer)


async def wander(client: Client, pattern: str) -> None:
    """Leave after a while and come back, over the other transport, from where one was: again and again."""
    where: list[tuple[int, str] | None] = [None]
    while True:
        with trio.move_on_after(client.ground.chance.uniform(3, 10)):
            async with client.connect() as bus:
                await _follow(client, bus, pattern, where)
        await trio.sleep(client.ground.chance.uniform(0, 0.5))


async def _follow(
    client: Client,
    bus: Bus,
    pattern: str,
    where: list[tuple[int, str] | None] | None = None,
    stream: bool = False,
    pause: float = 0.0,
    buffer: int = 1000,
) -> None:
    ground, history, name = client.ground, client.ground.history, client.name
    place = where if where is not None else [None]

    def note(event: Gap | Live | Head) -> None:
        if isinstance(event, Gap):
            history.add(
                Gapped(
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
            history.add(Complete(at=now(), subscriber=name, pattern=pattern, epoch=messages.epoch, seq=messages.cursor))

    while True:
        since, epoch = place[0] if place[0] is not None else (None, None)
        try:
            async with bus.subscribe(
                pattern, since=since, epoch=epoch, stream=stream, buffer=buffer, on_event=note
            ) as messages:
                history.add(
                    Began(at=now(), subscriber=name, pattern=pattern, cursor=messages.cursor, epoch=messages.epoch)
                )
                ground.positions[name, pattern] = messages
                try:
                    async for message in messages:
                        _take(ground, name, pattern, messages.epoch, message)
                        if pause:
                            await trio.sleep(pause)
                finally:
                    place[0] = messages.cursor, messages.epoch
        except Refused as refusal:
            if refusal.code == Code.REVOKED:
                history.add(Revoked(at=now(), subscriber=name, pattern=pattern))
            elif refusal.code != Code.UNAUTHORIZED:
                raise
            await trio.sleep(0.1)


def _take(ground: Ground, name: str, pattern: str, epoch: str, message: Message, session: int = 0) -> None:
    ground.received += 1
    publisher, number = message.payload[:2]
    ground.history.add(
        Received(
            at=now(),
            subscriber=name,
            pattern=pattern,
            epoch=epoch,
            seq=message.seq or 0,
            channel=message.channel,
            message=(publisher, number),
            sent=(message.at or 0) / 1000,
            session=session,
        )
    )


class Bare(Client):
    """A client without the client library: it keeps a cursor for its one pattern, and believes what it is told."""

    cursor = 0
    epoch = ""

    def __init__(self, ground: Ground, name: str, transport: str, pattern: str) -> None:
        super().__init__(ground, name, [transport])
        self._pattern = pattern
        self._begun = self._held = False
        self._session = 0
        self._present = ""

    async def run(self) -> None:
        """Come and go, so that there is something to catch up with all the time."""
        chance = self.ground.chance
        while True:
            with trio.move_on_after(chance.uniform(1, 5)):
                await self._visit()
            self._linked = ""
            await trio.sleep(chance.uniform(0.1, 1.0))

    async def _visit(self) -> None:
        while True:
            try:
                transport = await self.dial()
                async with trio.open_nursery() as nursery:
                    if isinstance(transport, Driven):
                        nursery.start_soon(transport.run)
                    try:
                        await self._converse(transport)
                    finally:
                        with trio.move_on_after(0.5, shield=True):
                            await transport.aclose()
                        nursery.cancel_scope.cancel()
            except* Disconnected:
                pass
            self.lose()
            await trio.sleep(self.ground.chance.uniform(0.05, 0.3))

    async def _converse(self, transport: Transport) -> None:
        self._session += 1
        objects: Framer[dict[str, Any]] = Framer(msgspec.json.decode, 1 << 20)
        await transport.send(_line({"type": "auth", "token": self.bearer, "protocol": 1}))
        silent = 0
        while True:
            with trio.move_on_after(0.5) as limit:
                chunk = await transport.receive()
                silent = 0
                for message in objects.feed(chunk.data) if chunk.stream == MAIN else [msgspec.json.decode(chunk.data)]:
                    request = self._hear(message)
                    if request is not None:
                        await transport.send(_line(request))
                if transport.pending:
                    await transport.send(b"")
            if limit.cancelled_caught:
                silent += 1
                if silent > 4:
                    return
                await transport.send(_line({"type": "ping", "seq": silent}))

    def _hear(self, message: dict[str, Any]) -> dict[str, Any] | None:
        history, name, pattern = self.ground.history, self.name, self._pattern
        kind = message["type"]
        if kind == "auth_ok":
            self.link()
            self._held = False
            self._present = message["epoch"]
            request: dict[str, Any] = {"type": "subscribe", "pattern": pattern, "id": 1}
            if self._begun:
                request |= {"since": self.cursor, "epoch": self.epoch}
            return request
        if kind == "message":
            seq = message.get("seq", 0)
            if seq:
                self.cursor, self.epoch = seq, self._present
            payload = msgspec.Raw(msgspec.json.encode(message["payload"]))
            whole = Message(message["channel"], payload, pattern, seq, message.get("at"))
            _take(self.ground, name, pattern, self._present, whole, self._session)
        elif kind == "subscribed":
            self._held = True
            self._present = message["epoch"]
            if self._begun:
                return None
            self._begun = True
            self.cursor, self.epoch = message["seq"], self._present
            self.ground.positions[name, pattern] = self
            history.add(Began(at=now(), subscriber=name, pattern=pattern, cursor=self.cursor, epoch=self.epoch))
        elif kind == "gap":
            self._present = message["epoch"]
            self.cursor, self.epoch = message["to"], self._present
            history.add(
                Gapped(
                    at=now(),
                    subscriber=name,
                    pattern=pattern,
                    epoch=self.epoch,
                    first=message["from"],
                    last=message["to"],
                    reason=message["reason"],
                )
            )
        elif kind in ("live", "head") and self._held:
            self._present = message.get("epoch", self._present)
            self.cursor, self.epoch = message["seq"], self._present
            history.add(Complete(at=now(), subscriber=name, pattern=pattern, epoch=self.epoch, seq=self.cursor))
        return None


def _line(message: dict[str, Any]) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def start(ground: Ground, roles: dict[str, str], subscribers: trio.Nursery, publishers: trio.Nursery) -> None:
    """Start everybody. `roles`: tokens by the names of the roles that change."""
    ws, wt = ["websocket"], ["webtransport"]

    def client(name: str, transports: Sequence[str], bearer: str | None = None) -> Client:
        return Client(ground, name, transports, bearer)

    for transport in TRANSPORTS:
        for pattern in PATTERNS:
            subscribers.start_soon(subscribe, client(f"{transport}-{pattern}", [transport]), pattern)
        subscribers.start_soon(subscribe, client(f"{transport}-overlapping", [transport]), *PATTERNS[:3])
        subscribers.start_soon(Bare(ground, f"{transport}-bare", transport, "*").run)
        subscribers.start_soon(Bare(ground, f"{transport}-bare-orders", transport, "orders.*").run)
        subscribers.start_soon(Bare(ground, f"{transport}-bare-cursors", transport, "cursors.*").run)
        publishers.start_soon(publish_ephemeral, client(f"{transport}-ephemeral", [transport]), 0.2)
        for number in range(4):
            publishers.start_soon(publish, client(f"{transport}-publisher-{number}", [transport]), CHANNELS, 0.8)
    slow = client("slow", ws)
    subscribers.start_soon(lambda: subscribe(slow, "orders.*", pause=0.03, buffer=20))
    for number in range(2):
        streams = client(f"streams-{number}", wt)
        subscribers.start_soon(lambda streams=streams: subscribe(streams, "*", "orders.*", "chat", stream=True))
        subscribers.start_soon(wander, client(f"wanderer-{number}", TRANSPORTS), "*")
        subscribers.start_soon(subscribe, client(f"either-{number}", TRANSPORTS), "*")
        publishers.start_soon(publish_sql, ground, f"sql-{number}", 0.5)
    for role, bearer in roles.items():
        for transport in TRANSPORTS:
            subscribers.start_soon(subscribe, client(f"{role}/{transport}", [transport], bearer), f"{role}.*")
        subscribers.start_soon(subscribe, client(f"{role}-all", wt), f"{role}.*")
        publishers.start_soon(publish, client(f"{role}/publisher", ws, bearer), [f"{role}.x"], 0.3)
        publishers.start_soon(publish, client(f"{role}-publisher", wt), [f"{role}.x", f"{role}.y"], 0.3)


async def catch_up(ground: Ground, epoch: str, head: int) -> list[str]:
    """Have everybody asked where they are; wait until all have the whole log. Returns who never got there."""
    behind: list[str] = []
    with trio.move_on_after(45):
        while True:
            for bus in list(ground.buses.values()):
                with suppress(Disconnected), trio.move_on_after(3):
                    await bus.ping()
            behind = [
                f"{name} to {pattern}, at {at.cursor} of {at.epoch}"
                for (name, pattern), at in ground.positions.items()
                if at.epoch != epoch or at.cursor < head
            ]
            if not behind:
                break
            await trio.sleep(0.2)
    return behind
