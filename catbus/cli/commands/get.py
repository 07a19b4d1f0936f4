"""`catbus get`: print retained messages."""

from __future__ import annotations

import click
import trio
from msgspec import Raw

from ...client import Message
from ...errors import PeerError
from ...protocol.channels import check_pattern
from ...protocol.wire_messages import to_json
from ..connection_options import ConnectionOptions, connection_options, timeout_option
from ..line_writer import write_stdout


@click.command("get", short_help="Print the retained messages of channels.")
@click.argument("pattern")
@timeout_option("Time to wait for the messages, reconnects included.")
@connection_options
def command(pattern: str, timeout: float, broker: ConnectionOptions) -> None:
    """Print the retained message of each channel that matches PATTERN, as one line of JSON each, and exit.

    The retained message of a channel is the last one that was published with `catbus set`, or with `retain`. The broker
    keeps it however old it is. A channel without one is not printed. The lines are in the order of the channels, and
    their `seq` is what `catbus set --expect` takes.

    `catbus sub` prints what changes from now on.

    \b
    Examples:
      catbus get 'todo.*'
      catbus get settings.theme | jq .payload
      catbus get '*' | jq -r '[.seq, .channel] | @tsv'
    """
    try:
        check_pattern(pattern)
    except PeerError as error:
        raise click.UsageError(str(error)) from None
    broker.require_token()
    trio.run(_print, broker, pattern, timeout)


async def _print(broker: ConnectionOptions, pattern: str, timeout: float) -> None:
    with trio.move_on_after(timeout) as limit:
        async with broker.connect() as bus, bus.retained(pattern) as found:
            messages = [found[channel] for channel in sorted(found)]
    if limit.cancelled_caught:
        raise click.ClickException(f"the broker has not sent all retained messages within {timeout:g} s")
    await write_stdout(b"".join(map(_format, messages)))


def _format(message: Message) -> bytes:
    fields = {
        "channel": message.channel,
        "payload": Raw(message.data),
        "seq": message.seq,
        "at": message.at,
        "sender": message.sender,
    }
    return to_json(fields) + b"\n"
