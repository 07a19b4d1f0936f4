"""`catbus init`: prepare a database."""

from __future__ import annotations

import os
from pathlib import Path

import click
import trio

from ..config import Config, load, redact
from ..errors import ConfigError
from ..postgres.migrate import init
from .database import database_options, reach_database


@click.command("init", short_help="Prepare a database.")
@database_options
def command(config: Path | None, database: str | None, state: str | None) -> None:
    """Bring the schema `catbus` of a database to this version, or make it. Harmless where that has been done.

    A broker does the same when it starts; this is for where it may not, and for finding out beforehand.

    \b
    Examples:
      catbus init --database postgres://owner@db/catbus
      DATABASE_URL=postgres://owner@db/catbus catbus init
    """
    settings = load(config, os.environ, {"database.url": database, "state": state})
    if settings.database.url == "memory":
        raise ConfigError("there is no database to prepare: set DATABASE_URL or give --database")
    applied = trio.run(_prepare, settings)
    place = redact(settings.database.url)
    click.echo(f"{place}: applied {', '.join(applied)}" if applied else f"{place}: nothing to do, it is up to date")


async def _prepare(config: Config) -> list[str]:
    async with reach_database(config) as database:
        return await init(database)
