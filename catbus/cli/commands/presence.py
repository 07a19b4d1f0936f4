"""`catbus presence`: print the members of channels."""

from __future__ import annotations

from math import inf
from typing import Any

import click
import trio

from ...client import LiveMap, MemberKey, PresentMember
from ...errors import PeerError
from ...protocol.channels import check_pattern
from ...protocol.wire_messages import to_json
from ..connection_options import ConnectionOptions, connection_options, timeout_option
from ..interruption import cancelled_by_signal
from ..line_writer import write_stdout


@click.command("presence", short_help="Print who is in channels.")
@click.argument("pattern")
@click.option("--follow", is_flag=True, help="Go on with each change, until Ctrl-C.")
@timeout_option("Time to wait for the members, reconnects included.")
@connection_options
def command(pattern: str, follow: bool, timeout: float, broker: ConnectionOptions) -> None:
    """Print the members of the channels that match PATTERN, as one line of JSON each.

    A client becomes a member of a channel with `join`. A line has its `channel`, its `client_id` (or for a client
    without one its `session`), the number of its `sessions` there, and the `info` that it has given.

    With --follow each line also has an `action`: `present` for the members at the beginning, then `join`, `update` and
    `leave`. A client that loses its connection leaves when the grace of the broker has passed. After a lost connection
    of the command itself, it prints what has changed meanwhile.

    \b
    Examples:
      catbus presence room.42
      catbus presence 'room.*' | jq -r '[.channel, .client_id] | @tsv'
      catbus presence 'room.*' --follow
    """
    try:
        check_pattern(pattern)
    except PeerError as error:
        raise click.UsageError(str(error)) from None
    broker.require_token()
    try:
        trio.run(_follow if follow else _print, broker, pattern, timeout)
    except* BrokenPipeError:
        pass  # The reader of the output has closed it.


async def _print(broker: ConnectionOptions, pattern: str, timeout: float) -> None:
    with trio.move_on_after(timeout) as limit:
        async with broker.connect() as bus:
            members = await bus.members(pattern)
    if limit.cancelled_caught:
        raise _too_late(timeout)
    await write_stdout(b"".join(map(_format, members)))


async def _follow(broker: ConnectionOptions, pattern: str, timeout: float) -> None:
    with trio.move_on_after(timeout) as limit:
        async with cancelled_by_signal(), broker.connect() as bus, bus.presence(pattern) as members:
            limit.deadline = inf
            await _write_changes(members)
    if limit.cancelled_caught:
        raise _too_late(timeout)


async def _write_changes(members: LiveMap[MemberKey, PresentMember]) -> None:
    changes = members.changes()
    await write_stdout(b"".join(_format(member, action="present") for member in members.values()))
    async for change in changes:
        if change.value is None:
            gone = PresentMember(change.key.channel, 0, change.key.client_id, change.key.session)
            line = _format(gone, action="leave")
        else:
            line = _format(change.value, action="join" if change.previous is None else "update")
        await write_stdout(line)


def _too_late(timeout: float) -> click.ClickException:
    return click.ClickException(f"the broker has not sent all members within {timeout:g} s")


def _format(member: PresentMember, **more: Any) -> bytes:
    fields = {
        **more,
        "channel": member.channel,
        "client_id": member.client_id,
        "session": member.session,
        "sessions": member.sessions,
        "info": member.info,
    }
    return to_json({name: value for name, value in fields.items() if value is not None}) + b"\n"
