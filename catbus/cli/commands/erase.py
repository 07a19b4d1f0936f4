"""`catbus erase`: remove the contents of messages from the log."""

from __future__ import annotations

import sys
from datetime import datetime
from functools import partial
from math import ceil
from pathlib import Path

import click
import trio

from ...errors import PeerError
from ...postgres.maintenance.erasure import ErasureReport, Selection, erase
from ...protocol.channels import check_pattern
from ...protocol.wire_messages import to_json
from ..database_access import database_options, describe_database, load_database, open_database

LEFT = (
    "Not erased: copies in backups, standbys until they have replayed the change, the write-ahead log and its archive, "
    "free space of the files, transactions that began before, and what clients have received"
)


def _check_pattern(_: click.Context, __: click.Parameter, pattern: str) -> str:
    try:
        check_pattern(pattern)
    except PeerError as error:
        raise click.UsageError(f"{error}") from None
    return pattern


def _parse_time(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise click.UsageError(f"--before {text}: not a time with a time zone, such as 2026-11-30T12:00:00Z")
    return ceil(time.timestamp() * 1000)


@click.command("erase", short_help="Remove the contents of messages from the log.")
@click.argument("pattern", callback=_check_pattern)
@click.option("--sender", metavar="CLIENT_ID", help="Only messages of this sender.")
@click.option("--before", metavar="TIME", callback=_parse_time, help="Only messages older than this time.")
@click.option("--dry-run", is_flag=True, help="Only count the messages.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON, for scripts.")
@database_options
def command(
    pattern: str,
    sender: str | None,
    before: int | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    config: Path | None,
    database: str | None,
    state: str | None,
) -> None:
    """Erase the messages that match PATTERN, for good: their payloads, their channels and their senders.

    Within a second no replica delivers them any more, also to subscriptions that lag or return, and they are in no page
    of the history. Their seqs stay, so no cursor becomes invalid, and no subscription receives a `gap`. A publish that
    is retried stays a duplicate. Retained messages are deleted: their channels have none then. Messages that wait in
    the outbox of SQL are deleted, unless --sender or --before is given: they have no sender and no time yet.

    Then the tables are vacuumed, so that old rows leave the files. While a transaction is open that began before, that
    waits, and a running broker does it later. Standbys, backups, the write-ahead log and free space of the files keep
    copies: docs/operations.md says what to do about them.

    A PATTERN with a channel uses an index. `*` looks at all messages of the log. The command commits every 10,000
    messages, and can be interrupted and repeated. Brokers may run meanwhile.

    \b
    Examples:
      catbus erase users.42 --dry-run                  count the messages
      catbus erase 'users.42.*' --yes                  erase everything below a channel
      catbus erase '*' --sender alice                  erase what alice has published, anywhere
      catbus erase 'chat.*' --before 2026-11-01T00:00:00Z
    """
    settings = load_database(config, database, state)
    selection = Selection(pattern, sender, before)
    shown = not as_json and sys.stderr.isatty()

    def show_progress(scanned: int, found: int) -> None:
        if shown:
            click.echo(f"\r{scanned:,} messages searched, {found:,} found", err=True, nl=False)

    async def go(apply: bool) -> ErasureReport:
        async with open_database(settings) as database_settings:
            return await erase(database_settings, selection, show_progress, apply=apply)

    def run(apply: bool) -> ErasureReport:
        report = trio.run(partial(go, apply))
        if shown:
            click.echo("\r\033[K", err=True, nl=False)
        return report

    place = describe_database(settings)
    if not (dry_run or yes):
        if not sys.stdin.isatty():
            raise click.UsageError("erasing cannot be undone: give --yes, or --dry-run to count the messages")
        click.confirm(f"{place}: erase {_count(run(apply=False).found)} for good?", abort=True, err=True)
    report = run(apply=not dry_run)
    if as_json:
        shape = {"found": report.found, "erased": not dry_run, "unvacuumed": report.unvacuumed}
        click.echo(to_json(shape).decode())
        return
    click.echo(f"{place}: {_count(report.found)} {'would be' if dry_run else 'were'} erased")
    if report.unvacuumed:
        click.echo(
            f"old rows stay in {', '.join(report.unvacuumed)} until transactions from before have ended: a running "
            "broker, or this command again, removes them then"
        )
    if not dry_run:
        click.echo(LEFT)


def _count(messages: int) -> str:
    return "1 message" if messages == 1 else f"{messages:,} messages"
