"""`catbus repair`: have subscriptions go on where messages were deleted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import trio

from ...postgres.maintenance.repair import DeletedRange, repair
from ...protocol.wire_messages import to_json
from ..database_access import database_options, describe_database, load_database, open_database

MAX_GAPS_SHOWN = 20
"""Holes that are shown to people."""


@click.command("repair", short_help="Find messages that were deleted by hand, and go on behind them.")
@database_options
@click.option("--apply", is_flag=True, help="Do it; without this, only say what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, on one line, for scripts.")
def command(config: Path | None, database: str | None, state: str | None, apply: bool, as_json: bool) -> None:
    """Look through the whole log for messages that are missing in it, and say which.

    The log has no holes by itself: retention takes away its oldest part only. Rows that somebody has deleted from the
    tables are missed by every subscription that has to read them. It stops before them, because nobody knows whether
    they come back, for example from a backup; brokers say so in their logs, at /ready, in `catbus status` and as a
    metric.

    When they do not come back, --apply says so to all: each such subscription is told of a `gap` with the reason
    `repair` and goes on behind it. Nothing is deleted or changed but that. What is in the memory of a replica goes too,
    so that all of them deliver the same. A publish that is sent again although its message was among those that are
    missing is answered `unknown`.

    Brokers may run meanwhile, and go on by themselves within seconds. It may be broken off and run again at any time.
    Without --apply it exits with 1 where something is missing.

    \b
    Examples:
      catbus repair                                        what is missing?
      catbus repair --apply                                go on without it
      kubectl exec deploy/catbus -- catbus repair --apply  the same in a cluster
    """
    settings = load_database(config, database, state)
    shown = not as_json and sys.stderr.isatty()

    def tell(seq: int, last: int) -> None:
        if shown:
            click.echo(f"\r{seq:,} of {last:,}", err=True, nl=False)

    async def go() -> tuple[DeletedRange, list[DeletedRange]]:
        async with open_database(settings) as reached:
            return await repair(reached, tell, apply=apply)

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
    looked = f"looked through messages {first:,} to {last:,}" if last >= first else "the log is empty"
    click.echo(f"{place}: {looked}")
    if not holes:
        click.echo("nothing is missing")
        return
    for start, end in holes[:MAX_GAPS_SHOWN]:
        click.echo(f"  {start:,} to {end:,} ({end - start + 1:,})" if end > start else f"  {start:,}")
    if len(holes) > MAX_GAPS_SHOWN:
        click.echo(f"  and {len(holes) - MAX_GAPS_SHOWN:,} places more (--json shows all)")
    places = f"in {len(holes):,} places" if len(holes) > 1 else "in one place"
    click.echo(f"{missing:,} messages are missing, {places}")
    click.echo(
        "subscriptions go on behind them, and are told of a gap"
        if apply
        else "subscriptions stop before them: `catbus repair --apply` has them go on, with a gap"
    )
