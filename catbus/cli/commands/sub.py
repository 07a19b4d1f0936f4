"""`catbus sub`: subscribe and print messages."""

from __future__ import annotations

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
from ..interruption import cancelled_by_signal
from ..line_writer import write_line, write_stdout

_MAX_QUEUED_LINES = 1000
"""Lines that may wait for the reader of the output, in addition to those waiting in the subscriptions."""


@click.command("sub", short_help="Print the messages that match patterns.")
@click.argument("patterns", metavar="PATTERN...", nargs=-1, required=True)
@click.option("--since", type=click.IntRange(min=0), metavar="SEQ", help="Start after this seq of the log.")
@click.option("--epoch", metavar="EPOCH", help="The epoch of --since.")
@click.option("--stream", is_flag=True, help="Over WebTransport: use one stream for each PATTERN.")
@click.option("--datagrams", is_flag=True, help="Over WebTransport: ephemeral messages as datagrams.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Exit after this number of messages.")
@click.option("-v", "--verbose", is_flag=True, help="Report on stderr when a subscription starts.")
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

    After a lost connection the command reconnects and resumes. It reports on stderr lost connections, and gaps: ranges
    of messages that may be missing because they are no longer in the log.

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
        raise click.UsageError("--epoch has no effect without --since")
    broker.require_token()
    options = {"since": since, "epoch": epoch, "stream": stream, "datagrams": datagrams}
    printer = _MessagePrinter(options, inf if count is None else count, verbose)
    try:
        trio.run(_print_until_signalled, printer, broker, dict.fromkeys(patterns))
    except* BrokenPipeError:
        pass  # The reader of the output has closed it.


async def _print_until_signalled(
    printer: _MessagePrinter, broker: ConnectionOptions, patterns: dict[str, None]
) -> None:
    async with cancelled_by_signal(), broker.connect() as bus, trio.open_nursery() as subscriptions:
        for pattern in patterns:
            subscriptions.start_soon(printer.follow, bus, pattern)
        await printer.print()
        subscriptions.cancel_scope.cancel()


class _MessagePrinter:
    """The subscriptions of one command and their common output."""

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
        """Print messages until the count is reached. Waiting lines are written together."""
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
            what = f"messages after {event.last} belong to a lost log; those of the new log follow"
        write_line(f"catbus: {event.pattern}: {what} (reason: {event.reason}; epoch {event.epoch})", sys.stderr)
