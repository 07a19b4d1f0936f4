"""`catbus channels`: show the busiest channels of a replica, and its subscriptions by pattern."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from ...protocol.wire_messages import to_json
from ..connection_options import ConnectionOptions, connection_options
from ..http_requests import call_api
from ..text_tables import format_table


@click.command("channels", short_help="Show the busiest channels of a replica.")
@connection_options
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="The most to show of each.")
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON, for scripts.")
def command(broker: ConnectionOptions, limit: int, as_json: bool) -> None:
    """Show the channels with the most messages in the last minute, and the patterns with the most subscriptions.

    It needs the admin key, or a token with read and write grants for `*`. The messages are those of all replicas, the
    subscriptions those of the replica at --url.

    \b
    Examples:
      catbus channels
      catbus channels --limit 1000 --json | jq -r '.channels[] | [.messages, .channel] | @tsv'
    """
    found = call_api(broker, "/api/channels", {"limit": limit})
    click.echo(to_json(found).decode() if as_json else "\n".join(_format(found)))


def _format(found: dict[str, Any]) -> Iterator[str]:
    seconds = found["seconds"]
    rate = f", {found['messages'] / seconds:,.1f} per second" if seconds else ""
    yield f"{found['replica']} had {found['messages']:,} messages in {seconds:.0f} s{rate}"
    if found["channels"]:
        busiest = [(c["channel"], f"{c['messages']:,}", f"{c['subscriptions']:,}") for c in found["channels"]]
        yield from format_table(("CHANNEL", "MESSAGES", "SUBSCRIPTIONS"), busiest)
    if found["missed"]:
        yield f"  There are too many channels to count all: each number may be too low by {found['missed']:,}."
    if found["patterns"]:
        patterns = [(p["pattern"], f"{p['subscriptions']:,}", f"{p['lagging']:,}") for p in found["patterns"]]
        yield from format_table(("PATTERN", "SUBSCRIPTIONS", "LAGGING"), patterns)
