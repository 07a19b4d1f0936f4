"""`catbus pub`: publish."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

import click
import trio
from msgspec import Raw

from ...client import Bus
from ...errors import ErrorCode, PeerError, Refused
from ...protocol.channels import check_channel
from ...protocol.wire_messages import check_payload, to_json
from ..connection_options import ConnectionOptions, connection_options
from ..line_writer import write_line, write_stdout

_BATCH_LINES = 500
_READ_SIZE = 65_536
_MAX_LINE_BYTES = 16 * 1024 * 1024


@click.command("pub", short_help="Publish JSON to a channel.")
@click.argument("channel")
@click.argument("payload", metavar="JSON|-")
@click.option("--ephemeral", is_flag=True, help="To whoever is there now, at most once, past the log.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the broker's answer, and to connect again where the connection is lost.",
)
@connection_options
def command(channel: str, payload: str, ephemeral: bool, timeout: float, broker: ConnectionOptions) -> None:
    """Publish JSON to CHANNEL, and say under which number the log has it (null for an ephemeral message).

    With - every line of the input is a message of its own, in that order. When the connection is lost, it is made
    again, and what has no answer is sent again; it is published once all the same.

    \b
    Examples:
      catbus pub demo.hello '{"n": 1}'
      catbus pub demo.note '"just text"'
      tail -f events.jsonl | catbus pub events.all -
    """
    try:
        check_channel(channel)
        checked = None if payload == "-" else Raw(check_payload(os.fsencode(payload)))
    except PeerError as error:
        hint = " (text has quotes of its own: '\"text\"')" if error.code == ErrorCode.BAD_MESSAGE else ""
        raise click.UsageError(f"{error}{hint}") from None
    broker.require_token()
    if checked is None:
        trio.run(_publish_lines, broker, channel, ephemeral, timeout)
    else:
        trio.run(_publish_one, broker, channel, checked, ephemeral, timeout)


async def _publish_one(broker: ConnectionOptions, channel: str, payload: Raw, ephemeral: bool, timeout: float) -> None:
    async with broker.connect() as bus:
        with _time_limit(timeout, "it"):
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
        raise click.ClickException(f"{refused} of {before} lines were refused")


async def _publish_batch(
    bus: Bus, channel: str, before: int, lines: list[bytes], ephemeral: bool, timeout: float
) -> int:
    """Publish lines, of which so many came `before`. Returns how many were refused."""
    requests: dict[int, tuple[str, Raw]] = {}
    broken: click.ClickException | None = None
    for number, line in enumerate(lines, before + 1):
        try:
            if line.strip():
                requests[number] = (channel, Raw(check_payload(line)))
        except PeerError as error:
            # What stands before it is published all the same.
            broken = click.ClickException(f"line {number}: {error}")
            break
    refused, output = 0, b""
    with _time_limit(timeout, f"some of the lines {before + 1} to {before + len(lines)}"):
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
def _time_limit(timeout: float, what: str) -> Iterator[None]:
    with trio.move_on_after(timeout) as scope:
        yield
    if scope.cancelled_caught:
        raise click.ClickException(f"no answer within {timeout:g} s; {what} may have been published all the same")


def _batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    """So few at a time that their numbers are printed while others are under way."""
    for start in range(0, len(lines), _BATCH_LINES):
        yield lines[start : start + _BATCH_LINES]


async def _lines_of_stdin() -> AsyncGenerator[list[bytes], None]:
    """What has come in, as whole lines, as soon as there are any."""
    # Neither sys.stdin, whose lock a thread that is left behind would hold for ever, nor a non-blocking descriptor,
    # which the shell would find non-blocking afterwards.
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
