"""`catbus init`: prepare a database."""

from __future__ import annotations

import os
from pathlib import Path

import click
import trio

from ...config import Config, load, redact_url
from ...errors import ConfigError
from ...postgres.access.migrations import begin_epoch, init
from ..database_access import database_options, open_database


@click.command("init", short_help="Prepare a database.")
@database_options
@click.option(
    "--new-epoch",
    is_flag=True,
    help="The database was restored from a backup: say so to all who knew more of the log than it has now.",
)
def command(config: Path | None, database: str | None, state: str | None, new_epoch: bool) -> None:
    """Bring the schema `catbus` of a database to this version, or make it. Harmless where that has been done.

    A broker does the same when it starts; this is for where it may not, and for finding out beforehand.

    With --new-epoch it is the last step of a restore by hand, before a broker is started again: subscribers who knew of
    messages that are gone are told so, and nobody takes others under the same numbers for them.

    \b
    Examples:
      catbus init --database postgres://owner@db/catbus
      DATABASE_URL=postgres://owner@db/catbus catbus init
    """
    settings = load(config, os.environ, {"database.url": database, "state": state})
    if settings.database.url == "memory":
        raise ConfigError("there is no database to prepare: set DATABASE_URL or give --database")
    applied, epoch = trio.run(_prepare, settings, new_epoch)
    place = redact_url(settings.database.url)
    if applied:
        click.echo(f"{place}: applied {', '.join(applied)}")
    elif epoch is None:
        click.echo(f"{place}: nothing to do, it is up to date")
    if epoch is not None:
        click.echo(f"{place}: epoch {epoch[0]} begins after message {epoch[1]}")


async def _prepare(config: Config, new_epoch: bool) -> tuple[list[str], tuple[str, int] | None]:
    async with open_database(config) as database:
        return await init(database), await begin_epoch(database) if new_epoch else None
