"""`catbus sub`: subscribe."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from math import inf
from typing import Any

import click
import trio
from msgspec import Raw

from ...client import Bus, Gap
from ...errors import PeerError
from ...protocol.channels import check_pattern
from ...protocol.wire_messages import to_json
from ..connection_options import ConnectionOptions, connection_options
from ..line_writer import write_line, write_stdout

_MAX_QUEUED_LINES = 1000
"""How many lines may wait for whoever reads the output, beside those that wait in the subscriptions."""


@click.command("sub", short_help="Print the messages that match patterns.")
@click.argument("patterns", metavar="PATTERN...", nargs=-1, required=True)
@click.option("--since", type=click.IntRange(min=0), metavar="SEQ", help="Everything after this number first.")
@click.option("--epoch", metavar="EPOCH", help="The epoch that --since is from.")
@click.option("--stream", is_flag=True, help="Over WebTransport: each PATTERN on a stream of its own.")
@click.option("--datagrams", is_flag=True, help="Over WebTransport: ephemeral messages as datagrams.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Leave after so many messages.")
@click.option("-v", "--verbose", is_flag=True, help="Say on stderr when a subscription has begun.")
@connection_options
def command(
    patterns: tuple[str, ...],
    since: int | None,
    epoch: str | None,
    stream: bool,
    datagrams: bool,
    count: int | None,
    verbose: bool,
    broker: ConnectionOptions,
) -> None:
    """Print the messages that match any PATTERN, each as one line of JSON, until Ctrl-C.

    When the connection is lost, it is made again, and goes on from there; stderr says so. What may be missing, because
    it is no longer kept, is said there too.

    \b
    Examples:
      catbus sub 'demo.*'
      catbus sub 'orders.*' 'invoices.*' | jq .payload
      catbus sub '*' --since 0 --count 10
    """
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except PeerError as error:
            raise click.UsageError(str(error)) from None
    if epoch is not None and since is None:
        raise click.UsageError("--epoch means nothing without --since")
    broker.require_token()
    options = {"since": since, "epoch": epoch, "stream": stream, "datagrams": datagrams}
    listening = _MessagePrinter(options, inf if count is None else count, verbose)
    try:
        trio.run(_print_until_signalled, listening, broker, dict.fromkeys(patterns))
    except* BrokenPipeError:
        pass  # whoever reads the output has had enough


async def _print_until_signalled(
    listening: _MessagePrinter, broker: ConnectionOptions, patterns: dict[str, None]
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def obey() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(obey)
            async with broker.connect() as bus, trio.open_nursery() as subscriptions:
                for pattern in patterns:
                    subscriptions.start_soon(listening.follow, bus, pattern)
                await listening.print()
                subscriptions.cancel_scope.cancel()
            nursery.cancel_scope.cancel()


class _MessagePrinter:
    """The subscriptions of one command, and the one output that they share."""

    def __init__(self, options: dict[str, Any], count: float, verbose: bool) -> None:
        self._options = options
        self._count = count
        self._verbose = verbose
        self._put, self._take = trio.open_memory_channel[bytes](_MAX_QUEUED_LINES)

    async def follow(self, bus: Bus, pattern: str) -> None:
        async with bus.subscribe(pattern, on_event=_report_gap, **self._options) as messages:
            if self._verbose:
                write_line(f"catbus: subscribed to {pattern} in epoch {bus.epoch}", sys.stderr)
            async for message in messages:
                line = to_json(
                    {
                        "channel": message.channel,
                        "payload": Raw(message.data),
                        "seq": message.seq,
                        "at": message.at,
                        "sender": message.sender,
                        "pattern": pattern,
                    }
                )
                await self._put.send(line + b"\n")

    async def print(self) -> None:
        """Print what comes, all that has come at once, until it has been enough."""
        left = self._count
        async for line in self._take:
            lines = [line]
            with suppress(trio.WouldBlock):
                while len(lines) < left:
                    lines.append(self._take.receive_nowait())
            await write_stdout(b"".join(lines))
            left -= len(lines)
            if not left:
                break


def _report_gap(event: object) -> None:
    if isinstance(event, Gap):
        if event.first <= event.last:
            what = f"messages {event.first} to {event.last} may be missing"
        else:
            what = f"messages after {event.last} are of a log that is no more; those of the new one follow"
        write_line(f"catbus: {event.pattern}: {what} ({event.reason}; the epoch is {event.epoch})", sys.stderr)
