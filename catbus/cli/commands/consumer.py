"""`catbus consumer`: list, create, move and delete consumers, and look at their dead letters and deliveries."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from ...delivery.page_size import MAX_PAGE_BYTES
from ...errors import PeerError
from ...log.consumers import ConsumerPartition, ConsumerReport, DeadLetter
from ...postgres.webhooks.webhook_administration import WebhookAdministration, WebhookReport
from ...protocol.channels import check_pattern
from ...protocol.wire_messages import to_json
from ..consumer_deliveries import COMMANDS, read_secret, secret_option, webhook_as_dict, with_consumers
from ..database_access import database_options, load_database
from ..text_tables import format_duration, format_name, format_table, format_time

_COLUMNS = ("CONSUMER", "PATTERN", "OWNER", "PARTITIONS", "LAG", "MOVED", "DEAD", "NOTES")


@click.group("consumer", short_help="List, create, move and delete consumers.", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List, create, move and delete consumers: named positions in the log, for SQL transactions that process each
    message exactly once.

    A worker receives messages and has its effects in one transaction of the broker's database. The commit is the
    acknowledgement: after a crash or a rollback, another worker receives the same messages.

    \b
      BEGIN;
      SELECT seq, channel, payload FROM catbus.receive('billing', 100);
      INSERT INTO charges ...;
      COMMIT;

    docs/consumers.md has complete workers. The commands use the database of --database, else DATABASE_URL, else that of
    the file of --config, else the embedded database of the broker on this machine, which may be running.

    \b
    Examples:
      catbus consumer create billing 'orders.*' --partitions 4 --owner billing_worker
      catbus consumer list
      catbus consumer dead billing
      catbus consumer reset billing head
      catbus consumer create mails 'orders.*' --push https://example.com/hook
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command("list", short_help="Show all consumers and how far they are.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object per line, with every partition.")
@database_options
def list_(as_json: bool, config: Path | None, database: str | None, state: str | None) -> None:
    """Show all consumers: their patterns, owners, partitions, lag and dead letters.

    LAG counts the messages between the cursor of the slowest partition and the head of the log, of all channels. MOVED
    is how long ago a cursor moved last: if there is a lag, and it is more than 10 s, nothing receives. "gap" means that
    messages were removed before the consumer received them, so that receiving is an error: `catbus consumer reset NAME
    gap` goes on behind them. "push" means that replicas deliver to a URL, "failing" that the last attempt failed, and
    "paused" that there are no attempts: `catbus consumer show NAME` says why.

    \b
    Examples:
      catbus consumer list
      catbus consumer list --json | jq -r 'select(.lag > 10000) | .consumer'
    """
    reports, webhooks = with_consumers(load_database(config, database, state), _read)
    if as_json:
        for report in reports:
            click.echo(to_json(_as_dict(report, webhooks.get(report.name))).decode())
        return
    if not reports:
        click.echo("there is no consumer: catbus consumer create NAME PATTERN", err=True)
        return
    now = datetime.now(UTC)
    for line in format_table(_COLUMNS, [_as_row(report, webhooks.get(report.name), now) for report in reports]):
        click.echo(line)


@command.command("show", short_help="Show a consumer with its partitions and deliveries.")
@click.argument("name")
@database_options
def show(name: str, config: Path | None, database: str | None, state: str | None) -> None:
    """Show the consumer NAME as a JSON object: its position and, if it has a URL, the state of its deliveries.

    \b
    Examples:
      catbus consumer show mails
      catbus consumer show mails | jq .push.partitions
    """

    async def work(consumers: WebhookAdministration) -> tuple[ConsumerReport, WebhookReport | None]:
        return await consumers.report(name), await consumers.webhook(name)

    report, webhook = with_consumers(load_database(config, database, state), work)
    click.echo(to_json(_as_dict(report, webhook)).decode())


@command.command("create", short_help="Create a consumer.")
@click.argument("name")
@click.argument("pattern")
@click.option("--partitions", type=click.IntRange(1, 64), default=1, show_default=True, help="Fixed: see below.")
@click.option(
    "--start", default="head", show_default=True, metavar="head|floor|SEQ",
    help="Receive only new messages, all that exist, or those after a seq.",
)  # fmt: skip
@click.option("--hold", is_flag=True, help="Retention waits for the consumer, up to [retention] size.")
@click.option("--owner", metavar="ROLE", help="The database role that may use it. [the user of the connection]")
@click.option("--push", metavar="URL", help="Replicas deliver the messages to this URL.")
@secret_option
@database_options
def create(
    name: str,
    pattern: str,
    partitions: int,
    start: str,
    hold: bool,
    owner: str | None,
    push: str | None,
    secret_file: Path | None,
    config: Path | None,
    database: str | None,
    state: str | None,
) -> None:
    """Create the consumer NAME of the messages that match PATTERN.

    A partition gets the channels whose hash falls on it, and is processed by one transaction at a time. So the messages
    of a channel stay in order, and as many workers as partitions share the load. The number cannot be changed later.

    The owner gets the right to call the functions of consumers, and may read all messages that PATTERN matches,
    whatever the grants of tokens are. Roles that inherit from it may use the consumer, too.

    With a URL, replicas deliver the messages by HTTP POST, at least once, and nobody receives them by SQL. The output
    is the secret with which receivers verify the signatures (docs/webhooks.md).

    \b
    Examples:
      catbus consumer create billing 'orders.*' --partitions 4 --owner billing_worker
      catbus consumer create audit '*' --start floor --hold
      catbus consumer create mails 'orders.*' --push https://example.com/hook
    """
    try:
        check_pattern(pattern)
    except PeerError as error:
        raise click.UsageError(f"{error}") from None
    secret = read_secret(secret_file)

    async def work(consumers: WebhookAdministration) -> str | None:
        await consumers.create(
            name, pattern, partitions=partitions, start=start, hold=hold, owner=owner, push=push, secret=secret
        )
        return None if push is None else await consumers.webhook_secret(name)

    made = with_consumers(load_database(config, database, state), work, prepare=True)
    if made is None:
        click.echo(f"created {name}: workers call catbus.receive('{name}', 100)", err=True)
        return
    click.echo(f"created {name}: `catbus consumer test {name}` tries the receiver, which needs this secret:", err=True)
    click.echo(made)


@command.command("delete", short_help="Delete a consumer with its dead letters.")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@database_options
def delete(name: str, yes: bool, config: Path | None, database: str | None, state: str | None) -> None:
    """Delete the consumer NAME, its position and its dead letters. It waits for workers for two seconds at most.

    \b
    Examples:
      catbus consumer delete billing
      catbus consumer delete billing --yes
    """
    settings = load_database(config, database, state)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("deleting a consumer cannot be undone: give --yes")
        report = with_consumers(settings, lambda consumers: consumers.report(name))
        click.confirm(f"delete {name}, its position and {report.dead_letters:,} dead letters?", abort=True, err=True)
    with_consumers(settings, lambda consumers: consumers.drop(name))
    click.echo(f"deleted {name}", err=True)


@command.command("reset", short_help="Move a consumer to another position.")
@click.argument("name")
@click.argument("start", metavar="head|floor|SEQ|gap")
@database_options
def reset(name: str, start: str, config: Path | None, database: str | None, state: str | None) -> None:
    """Move the consumer NAME to another position. It waits for workers for two seconds at most.

    \b
      head   it receives only messages that are published from now on
      floor  it receives all messages that still exist, again
      SEQ    it receives the messages after this seq, again
      gap    it goes on behind messages that were removed before it received them

    Its dead letters stay, and it does not receive them again.

    \b
    Examples:
      catbus consumer reset billing floor
      catbus consumer reset billing gap
    """
    settings = load_database(config, database, state)
    if start != "gap":
        with_consumers(settings, lambda consumers: consumers.reset(name, start))
        click.echo(f"moved {name} to {start}", err=True)
        return
    skipped = with_consumers(settings, lambda consumers: consumers.skip_gap(name))
    for each in skipped:
        click.echo(f"partition {each.partition} of {name} never receives the messages {each.first} to {each.last}")
    if not skipped:
        click.echo(f"{name} has no gap", err=True)


@command.command("dead", short_help="Show the dead letters of a consumer, or delete some.")
@click.argument("name")
@click.option("--delete", type=int, multiple=True, metavar="SEQ", help="Delete this one; may be repeated.")
@click.option("--publish", type=int, multiple=True, metavar="SEQ", help="Publish it again, and delete it: see below.")
@database_options
def dead(
    name: str,
    delete: tuple[int, ...],
    publish: tuple[int, ...],
    config: Path | None,
    database: str | None,
    state: str | None,
) -> None:
    """Show the messages that workers of the consumer NAME have rejected, one JSON object per line.

    To process them after all, do so in SQL, in one transaction with their deletion:

    \b
      DELETE FROM catbus.dead_letters WHERE consumer = 'billing' AND seq = 42 RETURNING channel, payload;

    With --publish, they are published again: each is a new message of its channel, without a sender. Every subscriber
    and every consumer of the channel gets it, also those that have processed it before.

    \b
    Examples:
      catbus consumer dead billing | jq -c '[.seq, .reason]'
      catbus consumer dead billing --delete 42 --delete 43
      catbus consumer dead billing --publish 42
    """
    settings = load_database(config, database, state)

    async def take(consumers: WebhookAdministration) -> list[int]:
        published = await consumers.publish_dead_letters(name, publish) if publish else []
        return published + (await consumers.delete_dead_letters(name, delete) if delete else [])

    if delete or publish:
        if missing := sorted({*delete, *publish}.difference(with_consumers(settings, take))):
            raise click.ClickException(f"{name} has no dead letter {', '.join(map(str, missing))}")
        return

    async def show(consumers: WebhookAdministration) -> None:
        await consumers.report(name)
        after, more = 0, True
        while more:
            letters, more = await consumers.dead_letters(name, after=after, rows=1000, size=MAX_PAGE_BYTES)
            for letter in letters:
                click.echo(to_json(_letter_as_dict(letter)).decode())
                after = letter.seq

    with_consumers(settings, show)


async def _read(consumers: WebhookAdministration) -> tuple[list[ConsumerReport], dict[str, WebhookReport]]:
    return await consumers.reports(), {webhook.name: webhook for webhook in await consumers.webhooks()}


def _as_row(report: ConsumerReport, webhook: WebhookReport | None, now: datetime) -> tuple[str, ...]:
    moved = max(partition.moved for partition in report.partitions)
    conditions = {
        "gap": report.gap,
        "hold": report.hold,
        "push": webhook is not None,
        "paused": webhook is not None and webhook.paused is not None,
        "failing": webhook is not None and webhook.failing,
    }
    notes = [word for word, holds in conditions.items() if holds]
    return (
        report.name,
        report.pattern,
        format_name(report.owner),
        str(len(report.partitions)),
        f"{report.lag:,}",
        f"{format_duration((now - moved).total_seconds())} ago",
        f"{report.dead_letters:,}",
        " ".join(notes),
    )


def _as_dict(report: ConsumerReport, webhook: WebhookReport | None) -> dict[str, object]:
    return {
        "consumer": report.name,
        "pattern": report.pattern,
        "owner": report.owner,
        "hold": report.hold,
        "lag": report.lag,
        "lag_seconds": round(report.lag_seconds, 3),
        "gap": report.gap,
        "dead_letters": report.dead_letters,
        "partitions": [_partition_as_dict(partition) for partition in report.partitions],
        "push": None if webhook is None else webhook_as_dict(webhook),
    }


def _partition_as_dict(partition: ConsumerPartition) -> dict[str, object]:
    return {
        "partition": partition.partition,
        "cursor": partition.cursor,
        "lag": partition.lag,
        "lag_seconds": round(partition.lag_seconds, 3),
        "moved": format_time(partition.moved),
        "gap": partition.gap,
        "dead_letters": partition.dead_letters,
    }


def _letter_as_dict(letter: DeadLetter) -> dict[str, object]:
    return {
        "seq": letter.seq,
        "at": format_time(letter.at),
        "channel": letter.channel,
        "sender": letter.sender,
        "reason": letter.reason,
        "rejected": format_time(letter.rejected),
        "payload": letter.payload,
    }


for _command in COMMANDS:
    command.add_command(_command)
