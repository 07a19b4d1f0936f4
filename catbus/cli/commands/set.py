"""`catbus set`: set the retained message of a channel."""

from __future__ import annotations

import os

import click
import trio
from msgspec import Raw

from ...errors import ConflictError
from ...protocol.wire_messages import to_json
from ..connection_options import ConnectionOptions, connection_options, timeout_option
from ..line_writer import write_stdout
from .pub import check_message, time_limit


class _Conflict(click.ClickException):
    exit_code = 3


@click.command("set", short_help="Set the retained message of a channel.")
@click.argument("channel")
@click.argument("payload", metavar="JSON")
@click.option(
    "--expect",
    type=click.IntRange(min=0, max=2**63 - 1),
    metavar="SEQ",
    help="Publish only if this is the seq of the retained message; 0: only if there is none.",
)
@timeout_option("Time to wait for the acknowledgement, reconnects included.")
@connection_options
def command(channel: str, payload: str, expect: int | None, timeout: float, broker: ConnectionOptions) -> None:
    """Publish JSON to CHANNEL as its retained message, and print the seq of the message.

    The broker keeps the retained message of a channel, in place of the one before, however old it is: `catbus get`
    prints it, and subscribers that want the state get it first. `null` removes it.

    With --expect the message is published only if nobody else has changed the channel since you have read it. Otherwise
    nothing is published, the exit status is 3, and the error names the present seq. To change a value, get it, set it
    with the seq that you got, and after a conflict begin again.

    \b
    Examples:
      catbus set settings.theme '"dark"'
      catbus set todo.7 '{"title": "Milk", "done": true}' --expect 12
      catbus set leader '{"host": "a"}' --expect 0
      catbus set todo.7 null
    """
    data = Raw(check_message(channel, os.fsencode(payload)))
    broker.require_token()
    trio.run(_set, broker, channel, data, expect, timeout)


async def _set(broker: ConnectionOptions, channel: str, payload: Raw, expect: int | None, timeout: float) -> None:
    async with broker.connect() as bus:
        try:
            with time_limit(timeout, "it"):
                seq = await bus.publish(channel, payload, retain=True, expect=expect)
        except ConflictError as error:
            present = f"has seq {error.seq}" if error.seq else "is not there (seq 0)"
            wanted = f"not {expect}" if expect else "and none was expected"
            raise _Conflict(f"conflict: the retained message of {channel} {present}, {wanted}") from None
        await write_stdout(to_json({"channel": channel, "seq": seq}) + b"\n")
