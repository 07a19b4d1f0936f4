"""`catbus grant`: make a token."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import click

from ..auth import Grants, sign
from ..config import load, parse_duration
from ..errors import PeerError
from ..topics import check_pattern
from .development import read_secret
from .options import config_option

_LONGEST = 10 * 365 * 86_400


@click.command("grant", short_help="Make a token.")
@click.argument("patterns", metavar="PATTERN...", nargs=-1, required=True)
@click.option(
    "-p",
    "--permission",
    "permissions",
    type=click.Choice(["read", "write", "all"]),
    multiple=True,
    required=True,
    help="What the bearer may do; several may be given.",
)
@click.option("--client-id", required=True, metavar="NAME", help="Who the bearer is: the `sender` of its messages.")
@click.option("--expires", metavar="DURATION", help="How long it is good for, like 30s, 5m, 1h or 7d. [for ever]")
@click.option("--secret", help="Sign with this secret. CATBUS_SECRET keeps it off the command line.")
@config_option
def command(
    patterns: tuple[str, ...],
    permissions: tuple[str, ...],
    client_id: str,
    expires: str | None,
    secret: str | None,
    config: Path | None,
) -> None:
    """Make a token that allows NAME to read or write the channels that match any PATTERN.

    The token stands alone on the first line of the output. It is signed with --secret, else with CATBUS_SECRET or the
    secret in the file that --config names, else with the development secret of this user.

    \b
    Examples:
      catbus grant -p read -p write 'project.*' --client-id alice
      catbus grant -p read 'orders.*' 'invoices.*' --client-id report --expires 12h
      TOKEN=$(catbus grant -p all '*' --client-id admin 2>/dev/null)
    """
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except PeerError as error:
            raise click.UsageError(f"{error}") from None
    if not client_id.strip():
        raise click.UsageError("--client-id is empty")
    until = None if expires is None else time.time() + _duration(expires)
    signer, origin = _secret(secret, config)
    read = patterns if {"read", "all"} & set(permissions) else ()
    write = patterns if {"write", "all"} & set(permissions) else ()
    click.echo(sign(signer, client_id=client_id, grants=Grants(read=read, write=write), expires=until))
    may = " and ".join(name for name, given in (("read", read), ("write", write)) if given)
    end = (
        "and does not expire" if until is None else f"until {datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M:%S} UTC"
    )
    click.echo(f"{client_id} may {may} {', '.join(patterns)}, {end}; signed with {origin}", err=True)


def _duration(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= _LONGEST:
        raise click.UsageError(
            f'--expires: expected a duration like "30s", "5m", "1h" or "7d", of ten years at most, found "{text[:40]}"'
        )
    return seconds


def _secret(given: str | None, path: Path | None) -> tuple[str, str]:
    if given:
        return given, "the secret of --secret"
    config = load(path, os.environ)
    if config.auth.secrets:
        named = "CATBUS_SECRET" if os.environ.get("CATBUS_SECRET", "").strip() else str(path)
        return config.auth.secrets[0], f"the secret of {named}"
    if kept := read_secret(config.state_directory):
        return kept, f"the development secret in {config.state_directory}"
    raise click.UsageError("there is no secret to sign with: set CATBUS_SECRET to the one that the broker has")
