"""`catbus pub`: publish messages."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

import click
import trio
from msgspec import Raw

from ...client import Bus
from ...error_codes import ErrorCode
from ...errors import PeerError, Refused
from ...protocol.channels import check_channel
from ...protocol.wire_messages import check_payload, to_json
from ..connection_options import ConnectionOptions, connection_options, timeout_option
from ..line_writer import write_line, write_stdout

_BATCH_LINES = 500
_READ_SIZE = 65_536
_MAX_LINE_BYTES = 16 * 1024 * 1024


@click.command("pub", short_help="Publish JSON to a channel.")
@click.argument("channel")
@click.argument("payload", metavar="JSON|-")
@click.option("--ephemeral", is_flag=True, help="Deliver to current subscribers only, at most once, without the log.")
@timeout_option("Time to wait for the acknowledgement, reconnects included.")
@connection_options
def command(channel: str, payload: str, ephemeral: bool, timeout: float, broker: ConnectionOptions) -> None:
    """Publish JSON to CHANNEL, and print the seq of the message in the log (null for an ephemeral message).

    With -, each line of stdin is published as a message, in order. After a lost connection the command reconnects and
    retries unacknowledged messages. Publishing is idempotent, so there are no duplicates.

    \b
    Examples:
      catbus pub demo.hello '{"n": 1}'
      catbus pub demo.note '"just text"'
      tail -f events.jsonl | catbus pub events.all -
    """
    data = check_message(channel, b"null" if payload == "-" else os.fsencode(payload))
    broker.require_token()
    if payload == "-":
        trio.run(_publish_lines, broker, channel, ephemeral, timeout)
    else:
        trio.run(_publish_one, broker, channel, Raw(data), ephemeral, timeout)


def check_message(channel: str, payload: bytes) -> bytes:
    """Return the payload as it is published. Raises `click.UsageError` if it or the channel is wrong."""
    try:
        check_channel(channel)
        return check_payload(payload)
    except PeerError as error:
        hint = " (a JSON string needs its own quotes: '\"text\"')" if error.code == ErrorCode.BAD_MESSAGE else ""
        raise click.UsageError(f"{error}{hint}") from None


async def _publish_one(broker: ConnectionOptions, channel: str, payload: Raw, ephemeral: bool, timeout: float) -> None:
    async with broker.connect() as bus:
        with time_limit(timeout, "it"):
            seq = await bus.publish(channel, payload, ephemeral=ephemeral)
        await write_stdout(_format_reply(channel, seq))


async def _publish_lines(broker: ConnectionOptions, channel: str, ephemeral: bool, timeout: float) -> None:
    before = refused = 0
    async with broker.connect() as bus, aclosing(_lines_of_stdin()) as chunks:
        async for lines in chunks:
            for some in _batches(lines):
                refused += await _publish_batch(bus, channel, before, some, ephemeral, timeout)
                before += len(some)
    if refused:
        raise click.ClickException(f"{refused} of {before} lines were rejected")


async def _publish_batch(
    bus: Bus, channel: str, before: int, lines: list[bytes], ephemeral: bool, timeout: float
) -> int:
    """Publish lines; `before` is the number of earlier lines. Return how many were rejected."""
    requests: dict[int, tuple[str, Raw]] = {}
    broken: click.ClickException | None = None
    for number, line in enumerate(lines, before + 1):
        try:
            if line.strip():
                requests[number] = (channel, Raw(check_payload(line)))
        except PeerError as error:
            # The lines before it are published.
            broken = click.ClickException(f"line {number}: {error}")
            break
    refused, output = 0, b""
    with time_limit(timeout, f"some of the lines {before + 1} to {before + len(lines)}"):
        results = await bus.publish_many(requests.values(), ephemeral=ephemeral)
    for number, result in zip(requests, results, strict=True):
        if isinstance(result, Refused):
            refused += 1
            write_line(f"catbus: line {number}: {result}", sys.stderr)
        else:
            output += _format_reply(channel, result)
    await write_stdout(output)
    if broken:
        raise broken
    return refused


@contextmanager
def time_limit(timeout: float, what: str) -> Iterator[None]:
    """Raise `click.ClickException` if the block takes longer, which publishes `what`."""
    with trio.move_on_after(timeout) as scope:
        yield
    if scope.cancelled_caught:
        raise click.ClickException(f"no acknowledgement within {timeout:g} s; {what} may have been published")


def _batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Split lines into batches, so that the seqs of one batch are printed while the next one is published."""
    for start in range(0, len(lines), _BATCH_LINES):
        yield lines[start : start + _BATCH_LINES]


async def _lines_of_stdin() -> AsyncGenerator[list[bytes], None]:
    """Yield complete lines of stdin as soon as they arrive."""
    # Not sys.stdin: an abandoned thread would hold its lock forever. Not a non-blocking descriptor: it would remain
    # non-blocking for the shell.
    rest = b""
    while chunk := await trio.to_thread.run_sync(os.read, 0, _READ_SIZE, abandon_on_cancel=True):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise click.ClickException(f"a line of the input is longer than {_MAX_LINE_BYTES} bytes")
        if lines:
            yield lines
    if rest:
        yield [rest]


def _format_reply(channel: str, seq: int | None) -> bytes:
    return to_json({"channel": channel, "seq": seq}) + b"\n"
