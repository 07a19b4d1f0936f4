"""`catbus init`: create or migrate the schema in a database."""

from __future__ import annotations

import os
from pathlib import Path

import click
import trio

from ...config import Config, load, redact_url
from ...errors import ConfigError
from ...postgres.access.migrations import begin_epoch, init
from ..database_access import database_options, open_database


@click.command("init", short_help="Create or migrate the schema in a database.")
@database_options
@click.option(
    "--new-epoch",
    is_flag=True,
    help="Begin a new epoch after a restore from a backup, so that subscribers learn which messages were lost.",
)
def command(config: Path | None, database: str | None, state: str | None, new_epoch: bool) -> None:
    """Create the schema `catbus` in a database, or migrate it to this version. Idempotent.

    A broker does the same when it starts. Use this command if its user may not create the schema, or to do it before.

    With --new-epoch it is the last step of a manual restore, before a broker starts again: subscribers are told that
    messages were lost, and new messages with the same seqs are not mistaken for the lost ones.

    \b
    Examples:
      catbus init --database postgres://owner@db/catbus
      DATABASE_URL=postgres://owner@db/catbus catbus init
    """
    settings = load(config, os.environ, {"database.url": database, "state": state})
    if settings.database.url == "memory":
        raise ConfigError("there is no database: set DATABASE_URL or give --database")
    applied, epoch = trio.run(_prepare, settings, new_epoch)
    place = redact_url(settings.database.url)
    if applied:
        click.echo(f"{place}: applied {', '.join(applied)}")
    elif epoch is None:
        click.echo(f"{place}: the schema is up to date")
    if epoch is not None:
        click.echo(f"{place}: epoch {epoch[0]} begins after message {epoch[1]}")


async def _prepare(config: Config, new_epoch: bool) -> tuple[list[str], tuple[str, int] | None]:
    async with open_database(config) as database:
        return await init(database), await begin_epoch(database) if new_epoch else None
