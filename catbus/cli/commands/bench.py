"""`catbus bench`: put a load on a running broker, and measure it."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from contextlib import nullcontext
from secrets import token_hex

import click
import trio

from ...client import Bus
from ...errors import PeerError, Refused
from ...protocol.channels import check_channel
from ..connection_options import ConnectionOptions, connection_options
from ..line_writer import write_stdout
from ..load_report import Latencies, LoadReport, Receipts

PATIENCE = 10.0
"""Seconds for the last messages to arrive."""
MAX_WAITING = 10_000
"""Publishes of the whole run that wait for their acknowledgement. More are not begun until some have come."""
_OVERHEAD = len(b'{"n":1000000,"at":1000000.000000,"pad":""}')


@click.command("bench", short_help="Put a load on a running broker, and measure it.")
@click.option("--publishers", type=click.IntRange(1, 1000), default=1, show_default=True, help="Publishers.")
@click.option(
    "--subscribers", type=click.IntRange(0, 10_000), default=10, show_default=True, help="Subscribed clients."
)
@click.option(
    "--channels",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="Channels, over which publishes and subscribers are spread.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    default=100.0,
    show_default=True,
    help="Publishes per second of all publishers together.",
)
@click.option(
    "--size",
    type=click.IntRange(_OVERHEAD, 65_000),
    default=128,
    show_default=True,
    help="Bytes of a payload.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="How long messages are published.",
)
@click.option("--ephemeral", is_flag=True, help="Publish ephemeral messages, which may be lost.")
@click.option("--prefix", default="bench", show_default=True, help="The first part of the channels' names.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
@connection_options
def command(
    publishers: int,
    subscribers: int,
    channels: int,
    rate: float,
    size: int,
    seconds: float,
    ephemeral: bool,
    prefix: str,
    as_json: bool,
    broker: ConnectionOptions,
) -> None:
    """Publish at a constant rate to channels of their own, receive everything, and print rates and latencies.

    Publishes are sent at their scheduled times, whether the ones before them were acknowledged or not, and latencies
    count from there: a broker that stops for a second delays everything that was due in that second. All clients run
    in this process, so with thousands of deliveries per second it is the limit: watch its CPU.

    The status is 1 if a message was lost, repeated or out of order, or a publish was rejected. Ephemeral messages may
    be lost. The token needs read and write grants for PREFIX.*.

    \b
    Examples:
      catbus bench
      catbus bench --subscribers 1000 --rate 50 --seconds 30 --url wss://bus.example.com/ws
      catbus bench --publishers 50 --channels 50 --subscribers 50 --rate 2000 --json
    """
    try:
        check_channel(f"{prefix}.0")
    except PeerError as error:
        raise click.UsageError(f"--prefix: {error}") from None
    broker.require_token()
    load = Load(broker, f"{prefix}.{token_hex(4)}", publishers, subscribers, channels, rate, size, seconds, ephemeral)
    report = trio.run(load.run)
    text = json.dumps(report.to_json()) if as_json else "\n".join(report.lines())
    trio.run(write_stdout, f"{text}\n".encode())
    if not report.kept_promises:
        raise click.exceptions.Exit(1)


class Load:
    """One run: its clients, and what they have seen."""

    def __init__(
        self,
        broker: ConnectionOptions,
        prefix: str,
        publishers: int,
        subscribers: int,
        channels: int,
        rate: float,
        size: int,
        seconds: float,
        ephemeral: bool,
    ) -> None:
        self._broker = broker
        self._channels = [f"{prefix}.{number}" for number in range(channels)]
        self._publishers, self._subscribers = publishers, subscribers
        self._total = max(1, math.floor(rate * seconds))
        self._rate, self._seconds, self._ephemeral = rate, seconds, ephemeral
        self._padding = "x" * (size - _OVERHEAD)
        self._published = Counter[str]()
        """By channel: publishes that were acknowledged."""
        self._rejected = Counter[str]()
        self._receipts: list[tuple[str, Receipts]] = []
        self._acknowledged, self._delivery = Latencies(), Latencies()
        self._waiting = trio.Semaphore(MAX_WAITING)
        self._last_delivery = 0.0
        self._arrived = trio.Event()

    async def run(self) -> LoadReport:
        """Connect, publish, wait for what is on its way, and report. Raises `Refused` if a client is rejected."""
        async with trio.open_nursery() as nursery:
            for number in range(self._subscribers):
                await nursery.start(self._subscribe, self._channels[number % len(self._channels)])
            buses: list[Bus] = [await nursery.start(self._connect) for _ in range(self._publishers)]
            start = trio.current_time()
            await self._publish_all(buses, start)
            with trio.move_on_after(PATIENCE):
                while self._missing():
                    await self._arrived.wait()
                    self._arrived = trio.Event()
            end = max(self._last_delivery, start + self._total / self._rate)
            nursery.cancel_scope.cancel()
        receipts = [each for _, each in self._receipts]
        return LoadReport(
            seconds=end - start,
            published=self._published.total(),
            delivered=sum(len(each.received) for each in receipts),
            lost=self._missing(),
            repeated=sum(each.repeated for each in receipts),
            disordered=sum(each.disordered for each in receipts),
            rejected=dict(self._rejected),
            acknowledged=self._acknowledged,
            delivery=self._delivery,
            durable=not self._ephemeral,
        )

    def _missing(self) -> int:
        return sum(self._published[channel] - len(receipts.received) for channel, receipts in self._receipts)

    async def _connect(self, *, task_status: trio.TaskStatus[Bus]) -> None:
        async with self._broker.connect() as bus:
            task_status.started(bus)
            await trio.sleep_forever()

    async def _subscribe(self, channel: str, *, task_status: trio.TaskStatus[None]) -> None:
        receipts = Receipts()
        async with self._broker.connect() as bus, bus.subscribe(channel) as messages:
            self._receipts.append((channel, receipts))
            task_status.started()
            async for message in messages:
                self._last_delivery = trio.current_time()
                self._delivery.observe(self._last_delivery - message.payload["at"])
                receipts.note(message.payload["n"], message.seq)
                self._arrived.set()

    async def _publish_all(self, buses: list[Bus], start: float) -> None:
        """Publish everything at its time, and wait for the acknowledgements."""
        bar = click.progressbar(length=self._total, label="publishing", file=sys.stderr)
        async with trio.open_nursery() as nursery:
            with bar if sys.stderr.isatty() else nullcontext() as shown:
                for number in range(self._total):
                    at = start + number / self._rate
                    await trio.sleep_until(at)
                    await self._waiting.acquire()
                    channel = self._channels[number % len(self._channels)]
                    nursery.start_soon(
                        self._publish, buses[number % len(buses)], channel, number // len(self._channels), at
                    )
                    if shown is not None:
                        shown.update(1)

    async def _publish(self, bus: Bus, channel: str, number: int, at: float) -> None:
        try:
            await bus.publish(channel, {"n": number, "at": at, "pad": self._padding}, ephemeral=self._ephemeral)
        except Refused as error:
            self._rejected[error.code] += 1
        else:
            self._published[channel] += 1
            self._acknowledged.observe(trio.current_time() - at)
        finally:
            self._waiting.release()
