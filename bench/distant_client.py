"""One client with many subscriptions, far from its broker: what is deaf, lost or repeated while it has to move."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from catbus.client import Bus, Disconnected, Reconnected, Refused, Transport, open_bus
from catbus.client.broker_address import parse_address
from catbus.client.websocket_transport import open_websocket

CHUNK = 65_536
WARM = 0.8
"""Seconds of load before the first replica of a round is restarted."""
SUBSCRIBE_EVERY = 0.006
PUBLISH_EVERY = 0.005
TOGETHER = 3
"""How many messages are published at a time."""
PATIENCE = 15.0
"""Seconds until a subscription that has not heard the last message counts as deaf."""


class Distance:
    """A way to the broker at `port`, which connections made later take, on which everything takes `delay` seconds."""

    def __init__(self, delay: float) -> None:
        self.port = 0
        self._delay = delay / 2

    async def serve(self, *, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        await trio.serve_tcp(self._meet, 0, host="127.0.0.1", task_status=task_status)

    async def _meet(self, inside: trio.SocketStream) -> None:
        with suppress(OSError):
            outside = await trio.open_tcp_stream("127.0.0.1", self.port)
            async with outside, trio.open_nursery() as nursery:
                nursery.start_soon(self._pass, inside, outside, nursery.cancel_scope)
                nursery.start_soon(self._pass, outside, inside, nursery.cancel_scope)

    async def _pass(self, source: trio.SocketStream, sink: trio.SocketStream, both: trio.CancelScope) -> None:
        """Pass on what comes, later; the end of one direction is the end of both."""
        send, receive = trio.open_memory_channel[tuple[float, bytes]](10_000)

        async def read() -> None:
            async with send:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while data := await source.receive_some(CHUNK):
                        await send.send((trio.current_time() + self._delay, bytes(data)))
                await trio.sleep(self._delay)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async for due, data in receive:
                    await trio.sleep_until(due)
                    await sink.send_all(data)
            both.cancel()


@dataclass(eq=False)
class Channel:
    """One subscription of a round, and what of its channel is known."""

    name: str
    heard: list[int] = field(default_factory=list)
    acknowledged: list[int] = field(default_factory=list)
    last: trio.Event = field(default_factory=trio.Event)


@dataclass
class Counted:
    """Of all rounds so far."""

    round: int = 0
    subscribed: int = 0
    published: int = 0
    moves: int = 0
    deaf: int = 0
    lost: int = 0
    repeated: int = 0
    failed: int = 0

    @property
    def wrong(self) -> int:
        return self.deaf + self.lost + self.repeated + self.failed

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in vars(self).items())


async def play(
    distance: Distance, token: str, rounds: int, subscriptions: int, restart: Callable[[], Awaitable[None]]
) -> Counted:
    """In each round subscribe and publish, and `restart` meanwhile. Prints what is counted, and returns it."""
    counted = Counted()

    def note(event: object) -> None:
        counted.moves += isinstance(event, Reconnected)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(distance.serve)
        address = parse_address(f"ws://127.0.0.1:{listener.socket.getsockname()[1]}/ws")

        async def dial() -> Transport:
            return await open_websocket(address)

        async with open_bus(dial, token=token, persist=True, on_event=note) as bus:
            for _ in range(rounds):
                await _play_round(bus, counted, subscriptions, restart)
                print(counted, flush=True)
        nursery.cancel_scope.cancel()
    return counted


async def _play_round(bus: Bus, counted: Counted, subscriptions: int, restart: Callable[[], Awaitable[None]]) -> None:
    counted.round += 1
    prefix = f"round-{random.getrandbits(64):x}-{counted.round}"
    channels: list[Channel] = []
    over = False

    async def subscribe(channel: Channel, *, task_status: trio.TaskStatus[None]) -> None:
        async with bus.subscribe(channel.name) as messages:
            counted.subscribed += 1
            channels.append(channel)
            task_status.started()
            async for message in messages:
                assert message.seq is not None
                channel.heard.append(message.seq)
                if message.payload == "last":
                    channel.last.set()

    async def subscribe_all(listening: trio.Nursery) -> None:
        async with trio.open_nursery() as starting:
            for number in range(subscriptions):
                starting.start_soon(listening.start, subscribe, Channel(f"{prefix}.{number}"))
                await trio.sleep(SUBSCRIBE_EVERY)

    async def publish(channel: Channel, payload: object) -> None:
        counted.published += 1
        try:
            channel.acknowledged.append(await bus.publish(channel.name, payload))
        except (Disconnected, Refused):
            counted.failed += 1

    async def publish_on(publishing: trio.Nursery) -> None:
        while not over:
            for number in range(TOGETHER if channels else 0):
                publishing.start_soon(publish, random.choice(channels), number)
            await trio.sleep(PUBLISH_EVERY)

    async with trio.open_nursery() as listening:
        async with trio.open_nursery() as publishing:
            publishing.start_soon(publish_on, publishing)
            async with trio.open_nursery() as both:
                both.start_soon(subscribe_all, listening)
                await trio.sleep(WARM)
                await restart()
            over = True
        async with trio.open_nursery() as nursery:
            for channel in channels:
                nursery.start_soon(publish, channel, "last")
        with trio.move_on_after(PATIENCE):
            for channel in channels:
                await channel.last.wait()
        listening.cancel_scope.cancel()
    counted.deaf += sum(not channel.last.is_set() for channel in channels)
    for channel in channels:
        once = set(channel.heard)
        counted.repeated += len(channel.heard) - len(once)
        counted.lost += len(set(channel.acknowledged) - once)
