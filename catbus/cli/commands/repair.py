"""`catbus repair`: let subscriptions continue after messages that were deleted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import trio

from ...postgres.maintenance.repair import DeletedRange, repair
from ...protocol.wire_messages import to_json
from ..database_access import database_options, describe_database, load_database, open_database

MAX_GAPS_SHOWN = 20
"""Deleted ranges in the text output."""


@click.command("repair", short_help="Find messages that were deleted by hand, and continue after them.")
@database_options
@click.option("--apply", is_flag=True, help="Apply the repair. Without this option, only report.")
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON, for scripts.")
def command(config: Path | None, database: str | None, state: str | None, apply: bool, as_json: bool) -> None:
    """Search the whole log for deleted messages, and report them.

    Retention deletes only the oldest part of the log. If rows are deleted from the tables by hand, a subscription that
    must read them stops before them, because they may return, for example from a backup. Brokers report this in their
    logs, at /ready, in `catbus status` and as a metric.

    If the messages do not return, use --apply: each such subscription receives a `gap` with the reason `repair`, and
    continues after it. Nothing else is changed or deleted. Replicas also drop these messages from memory, so that all
    replicas deliver the same. A publish that is retried, and whose message was deleted, gets the reply `unknown`.

    Brokers may run meanwhile. They continue automatically within seconds. The command can be interrupted and repeated
    at any time. Without --apply it exits with 1 if messages are missing.

    \b
    Examples:
      catbus repair                                        report missing messages
      catbus repair --apply                                continue without them
      kubectl exec deploy/catbus -- catbus repair --apply  the same in a cluster
    """
    settings = load_database(config, database, state)
    shown = not as_json and sys.stderr.isatty()

    def show_progress(seq: int, last: int) -> None:
        if shown:
            click.echo(f"\r{seq:,} of {last:,}", err=True, nl=False)

    async def go() -> tuple[DeletedRange, list[DeletedRange]]:
        async with open_database(settings) as database_settings:
            return await repair(database_settings, show_progress, apply=apply)

    bounds, holes = trio.run(go)
    if shown:
        click.echo("\r\033[K", err=True, nl=False)
    missing = sum(last - first + 1 for first, last in holes)
    if as_json:
        report = {"floor": bounds[0], "head": bounds[1], "missing": missing, "holes": holes, "repaired": apply}
        click.echo(to_json(report).decode())
    else:
        _show_report(describe_database(settings), bounds, holes, missing, apply)
    if holes and not apply:
        raise click.exceptions.Exit(1)


def _show_report(place: str, bounds: DeletedRange, holes: list[DeletedRange], missing: int, apply: bool) -> None:
    first, last = bounds
    searched = f"searched messages {first:,} to {last:,}" if last >= first else "the log is empty"
    click.echo(f"{place}: {searched}")
    if not holes:
        click.echo("no messages are missing")
        return
    for start, end in holes[:MAX_GAPS_SHOWN]:
        click.echo(f"  {start:,} to {end:,} ({end - start + 1:,})" if end > start else f"  {start:,}")
    if len(holes) > MAX_GAPS_SHOWN:
        click.echo(f"  and {len(holes) - MAX_GAPS_SHOWN:,} more ranges (--json shows all)")
    ranges = f"in {len(holes):,} ranges" if len(holes) > 1 else "in one range"
    click.echo(f"{missing:,} messages are missing, {ranges}")
    click.echo(
        "subscriptions continue after them, and receive a gap"
        if apply
        else "subscriptions stop before them; `catbus repair --apply` lets them continue with a gap"
    )
