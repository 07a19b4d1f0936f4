"""One client with many subscriptions and network delay: silent subscriptions, and messages lost or repeated."""

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
WARM_UP_TIME = 0.8
"""Seconds of load before the first replica of a round is restarted."""
SUBSCRIBE_INTERVAL = 0.006
PUBLISH_INTERVAL = 0.005
BATCH_SIZE = 3
"""Messages that are published at a time."""
LAST_MESSAGE_TIMEOUT = 15.0
"""Seconds after which a subscription that has not received the last message counts as silent."""


class DelayingProxy:
    """A proxy that adds `delay` seconds to a round trip. New connections go to the broker at `port`."""

    def __init__(self, delay: float) -> None:
        self.port = 0
        self._delay = delay / 2

    async def serve(self, *, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
        await trio.serve_tcp(self._handle, 0, host="127.0.0.1", task_status=task_status)

    async def _handle(self, client: trio.SocketStream) -> None:
        with suppress(OSError):
            broker = await trio.open_tcp_stream("127.0.0.1", self.port)
            async with broker, trio.open_nursery() as nursery:
                nursery.start_soon(self._forward, client, broker, nursery.cancel_scope)
                nursery.start_soon(self._forward, broker, client, nursery.cancel_scope)

    async def _forward(self, source: trio.SocketStream, sink: trio.SocketStream, both: trio.CancelScope) -> None:
        """Forward data after the delay. The end of one direction ends both."""
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
class ObservedChannel:
    """The channel of one subscription: the seqs that the client received, and those of acknowledged publishes."""

    name: str
    received: list[int] = field(default_factory=list)
    acknowledged: list[int] = field(default_factory=list)
    last: trio.Event = field(default_factory=trio.Event)


@dataclass
class Counts:
    """Totals of all rounds."""

    round: int = 0
    subscribed: int = 0
    published: int = 0
    moves: int = 0
    silent: int = 0
    lost: int = 0
    repeated: int = 0
    failed: int = 0

    @property
    def error_count(self) -> int:
        return self.silent + self.lost + self.repeated + self.failed

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in vars(self).items())


async def run(
    proxy: DelayingProxy, token: str, rounds: int, subscriptions: int, restart: Callable[[], Awaitable[None]]
) -> Counts:
    """Subscribe and publish in each round, and call `restart` meanwhile. Prints and returns the totals."""
    counts = Counts()

    def count_move(event: object) -> None:
        counts.moves += isinstance(event, Reconnected)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(proxy.serve)
        address = parse_address(f"ws://127.0.0.1:{listener.socket.getsockname()[1]}/ws")

        async def dial() -> Transport:
            return await open_websocket(address)

        async with open_bus(dial, token=token, persist=True, on_event=count_move) as bus:
            for _ in range(rounds):
                await _run_round(bus, counts, subscriptions, restart)
                print(counts, flush=True)
        nursery.cancel_scope.cancel()
    return counts


async def _run_round(bus: Bus, counts: Counts, subscriptions: int, restart: Callable[[], Awaitable[None]]) -> None:
    counts.round += 1
    prefix = f"round-{random.getrandbits(64):x}-{counts.round}"
    channels: list[ObservedChannel] = []
    over = False

    async def subscribe(channel: ObservedChannel, *, task_status: trio.TaskStatus[None]) -> None:
        async with bus.subscribe(channel.name) as messages:
            counts.subscribed += 1
            channels.append(channel)
            task_status.started()
            async for message in messages:
                assert message.seq is not None
                channel.received.append(message.seq)
                if message.payload == "last":
                    channel.last.set()

    async def subscribe_all(listening: trio.Nursery) -> None:
        async with trio.open_nursery() as starting:
            for number in range(subscriptions):
                starting.start_soon(listening.start, subscribe, ObservedChannel(f"{prefix}.{number}"))
                await trio.sleep(SUBSCRIBE_INTERVAL)

    async def publish(channel: ObservedChannel, payload: object) -> None:
        counts.published += 1
        try:
            channel.acknowledged.append(await bus.publish(channel.name, payload))
        except (Disconnected, Refused):
            counts.failed += 1

    async def keep_publishing(publishing: trio.Nursery) -> None:
        while not over:
            for number in range(BATCH_SIZE if channels else 0):
                publishing.start_soon(publish, random.choice(channels), number)
            await trio.sleep(PUBLISH_INTERVAL)

    async with trio.open_nursery() as listening:
        async with trio.open_nursery() as publishing:
            publishing.start_soon(keep_publishing, publishing)
            async with trio.open_nursery() as both:
                both.start_soon(subscribe_all, listening)
                await trio.sleep(WARM_UP_TIME)
                await restart()
            over = True
        async with trio.open_nursery() as nursery:
            for channel in channels:
                nursery.start_soon(publish, channel, "last")
        with trio.move_on_after(LAST_MESSAGE_TIMEOUT):
            for channel in channels:
                await channel.last.wait()
        listening.cancel_scope.cancel()
    counts.silent += sum(not channel.last.is_set() for channel in channels)
    for channel in channels:
        once = set(channel.received)
        counts.repeated += len(channel.received) - len(once)
        counts.lost += len(set(channel.acknowledged) - once)
