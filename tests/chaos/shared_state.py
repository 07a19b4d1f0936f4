"""Counters in retained messages: writers that increment them by compare-and-set, and clients that keep a live map."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count

import trio

from catbus.client import Bus, ConflictError, LiveMap, Message, Refused
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS

from .clients import TRANSPORTS, LoadClient, LoadState, identify, subscribe_once
from .history import Answered, MapShown, Published, now

COUNTERS = "counters.*"
CHANNELS = ("counters.a", "counters.b", "counters.c")
WRITERS = 8
REMOVAL_INTERVAL = 4.0
SETTLE_TIMEOUT = 45.0


async def increment_counters(client: LoadClient, pause: float) -> None:
    """Publish the value of a counter plus one, and expect the message that was read, until the load ends."""
    state = client.state
    history, rng = state.history, state.rng
    async with client.connect() as bus, bus.retained(COUNTERS) as counters:
        for number in count(1):
            if state.load_ended.is_set():
                return
            channel = rng.choice(CHANNELS)
            present = counters.get(channel)
            value, expect, read = 1, 0, None
            if present is not None:
                value, expect, read = present.payload[2] + 1, present.seq or 0, identify(present.payload)
            history.add(
                Published(
                    at=now(),
                    publisher=client.name,
                    number=number,
                    channel=channel,
                    value=value,
                    expect=expect,
                    read=read,
                )
            )
            state.published += 1
            seq, refusal = 0, ""
            try:
                seq = await bus.publish(channel, [client.name, number, value], retain=True, expect=expect)
            except ConflictError as conflict:
                seq, refusal = conflict.seq, conflict.code
            except Refused as error:
                refusal = error.code
            history.add(Answered(at=now(), publisher=client.name, number=number, seq=seq, refusal=refusal))
            state.answered += 1
            await trio.sleep(pause * rng.uniform(0.5, 1.5))


async def remove_counters(client: LoadClient) -> None:
    """Remove a retained message now and then, so that its counter begins again."""
    state = client.state
    async with client.connect() as bus:
        while not state.load_ended.is_set():
            with suppress(Refused):
                await bus.publish(state.rng.choice(CHANNELS), None, retain=True)
            with trio.move_on_after(REMOVAL_INTERVAL * state.rng.uniform(0.5, 1.5)):
                await state.load_ended.wait()


async def keep_map(client: LoadClient) -> None:
    """Keep a live map of all counters, until cancelled.

    A subscription to the same pattern records the messages. Both share one subscription at the broker.
    """
    async with client.connect() as bus, _record_map(client, bus) as counters:
        client.state.maps[client.name] = counters
        await subscribe_once(client, bus, COUNTERS)


async def reopen_map(state: LoadState, name: str) -> None:
    """Keep a live map for some time, again and again. So there are more snapshots."""
    for life in count(1):
        client = LoadClient(state, f"{name}-{life}", TRANSPORTS)
        with trio.move_on_after(state.rng.uniform(2, 8)):
            async with client.connect() as bus, _record_map(client, bus):
                await trio.sleep_forever()


@asynccontextmanager
async def _record_map(client: LoadClient, bus: Bus) -> AsyncIterator[LiveMap[str, Message]]:
    """Open a live map, and record all that it shows."""
    async with bus.retained(COUNTERS) as counters:

        def record(_: object = None) -> None:
            client.state.history.add(
                MapShown(
                    at=now(),
                    watcher=client.name,
                    shown={channel: _place(message) for channel, message in counters.items()},
                )
            )

        record()
        counters.on_change(record)
        yield counters


def _place(message: Message) -> tuple[int, str, str, int]:
    return message.seq or 0, message.epoch, *identify(message.payload)


def start_shared_state(state: LoadState, subscribers: trio.Nursery, publishers: trio.Nursery) -> None:
    for transport in TRANSPORTS:
        for number in range(WRITERS // len(TRANSPORTS)):
            client = LoadClient(state, f"{transport}-writer-{number}", [transport])
            publishers.start_soon(increment_counters, client, 0.6)
        subscribers.start_soon(keep_map, LoadClient(state, f"{transport}-map", [transport]))
    subscribers.start_soon(keep_map, LoadClient(state, "either-map", TRANSPORTS))
    subscribers.start_soon(reopen_map, state, "map")
    publishers.start_soon(remove_counters, LoadClient(state, "remover", ["websocket"]))


async def wait_maps_settled(state: LoadState) -> None:
    """Wait until all maps show what the database has, or for a time. The history shows what they have reached."""

    def seqs(shown: LiveMap[str, Message]) -> dict[str, int | None]:
        return {channel: message.seq for channel, message in shown.items()}

    with trio.move_on_after(SETTLE_TIMEOUT):
        while True:
            with suppress(*DATABASE_ERRORS):
                rows = await state.database.fetch("SELECT channel, seq FROM catbus.retained($1)", COUNTERS)
                stored = {row[0]: row[1] for row in rows}
                if all(seqs(shown) == stored for shown in state.maps.values()):
                    return
            await trio.sleep(0.1)
