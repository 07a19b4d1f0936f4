"""The options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..auth.grants import Grants
from ..errors import PeerError
from ..protocol.channels import check_pattern

config_option = click.option(
    "-c", "--config", type=click.Path(path_type=Path), metavar="FILE", help="Read settings from this file."
)
database_option = click.option(
    "--database", metavar="URL", help='The database of the log: "embedded", "memory" or postgres://...'
)
state_option = click.option("--state", metavar="DIR", help="The directory of the broker's own files.")


def _check_patterns(_: click.Context, __: click.Parameter, patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except PeerError as error:
            raise click.UsageError(f"{error}") from None
    return patterns


def patterns_argument(*, required: bool) -> Callable[..., Any]:
    metavar = "PATTERN..." if required else "[PATTERN...]"
    return click.argument("patterns", metavar=metavar, nargs=-1, required=required, callback=_check_patterns)


def permissions_option(what: str, *, required: bool) -> Callable[..., Any]:
    return click.option(
        "-p",
        "--permission",
        "permissions",
        type=click.Choice(["read", "write", "all"]),
        multiple=True,
        required=required,
        help=f"{what}; may be repeated.",
    )


def grants_of(permissions: tuple[str, ...], patterns: tuple[str, ...]) -> Grants:
    """Return the grants for all combinations of permissions and patterns, without duplicates."""
    patterns = tuple(dict.fromkeys(patterns))
    return Grants(
        read=patterns if {"read", "all"} & set(permissions) else (),
        write=patterns if {"write", "all"} & set(permissions) else (),
    )
