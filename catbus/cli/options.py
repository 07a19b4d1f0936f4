"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

config_option = click.option(
    "-c", "--config", type=click.Path(path_type=Path), metavar="FILE", help="Read settings from this file."
)
database_option = click.option(
    "--database", metavar="URL", help='Where the log is kept: "embedded", "memory" or postgres://...'
)
state_option = click.option("--state", metavar="DIR", help="Where the broker keeps what is its own.")
