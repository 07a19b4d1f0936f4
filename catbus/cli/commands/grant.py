"""`catbus grant`: make a token, or add grants to a role."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import click

from ...auth.tokens import sign
from ...config import load, parse_duration, parse_size
from ..database_access import database_options, load_database, show_role, with_roles
from ..development_credentials import read_secret
from ..shared_options import grants_of, patterns_argument, permissions_option

_MAX_LIFETIME = 10 * 365 * 86_400


@click.command("grant", short_help="Make a token, or add grants to a role.")
@patterns_argument(required=True)
@permissions_option("What the holder of the token may do", required=True)
@click.option("--client-id", metavar="NAME", help="The client_id of the token, which is the `sender` of its messages.")
@click.option("--expires", metavar="DURATION", help="Lifetime, like 30s, 5m, 1h or 7d. [unlimited]")
@click.option("--publish-rate", type=click.IntRange(1, 2**53), help="Messages per second. [the broker's limit]")
@click.option("--publish-bytes", metavar="SIZE", help="Bytes per second, like 512KiB or 1GiB. [the broker's limit]")
@click.option("--secret", help="Sign with this secret. CATBUS_SECRET keeps it off the command line.")
@click.option(
    "--to", "role", metavar="ROLE", help="Add grants to this role (its token or handle) instead of making a token."
)
@database_options
def command(
    patterns: tuple[str, ...],
    permissions: tuple[str, ...],
    client_id: str | None,
    expires: str | None,
    publish_rate: int | None,
    publish_bytes: str | None,
    secret: str | None,
    role: str | None,
    config: Path | None,
    database: str | None,
    state: str | None,
) -> None:
    """Make a token that allows NAME to read or write the channels that match any PATTERN.

    The token is the only text on stdout. It is signed with --secret, else with CATBUS_SECRET or the secret in the file
    of --config, else with the development secret of this user.

    With --to, grants are added to a role of `catbus role create`, and the role is shown. They apply immediately, also
    to connected sessions. The database of the role is that of --database, else DATABASE_URL, else that of the file of
    --config, else the embedded database of the broker on this machine.

    \b
    Examples:
      catbus grant -p read -p write 'project.*' --client-id alice
      catbus grant -p read 'orders.*' 'invoices.*' --client-id report --expires 12h
      TOKEN=$(catbus grant -p all '*' --client-id admin 2>/dev/null)
      catbus grant -p write 'metrics.*' --client-id collector --publish-rate 200000 --publish-bytes 256MiB
      catbus grant -p read 'orders.*' --to 0123456789ab
    """
    grants = grants_of(permissions, patterns)
    if role is not None:
        of_tokens = {
            "--client-id": client_id,
            "--expires": expires,
            "--publish-rate": publish_rate,
            "--publish-bytes": publish_bytes,
            "--secret": secret,
        }
        for option, value in of_tokens.items():
            if value is not None:
                raise click.UsageError(f"{option} has no effect with --to: a role already has its token")
        settings = load_database(config, database, state)
        show_role(with_roles(settings, lambda roles: roles.grant(role, grants)))
        return
    if database is not None:
        raise click.UsageError("--database has no effect without --to")
    if client_id is None:
        raise click.MissingParameter(param_hint="'--client-id'", param_type="option")
    if not client_id.strip():
        raise click.UsageError("--client-id is empty")
    until = None if expires is None else time.time() + _parse_expiry(expires)
    signer, origin = _signing_secret(secret, config, state)
    size = None if publish_bytes is None else _parse_byte_rate(publish_bytes)
    rates = {"publish_rate": publish_rate, "publish_bytes": size}
    click.echo(sign(signer, client_id=client_id, grants=grants, expires=until, issued_at=time.time(), **rates))
    end = (
        "and does not expire" if until is None else f"until {datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M:%S} UTC"
    )
    click.echo(f"{client_id} may {grants}, {end}; signed with {origin}", err=True)


def _parse_expiry(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= _MAX_LIFETIME:
        raise click.UsageError(
            f'--expires: expected a duration like "30s", "5m", "1h" or "7d", at most ten years, found "{text[:40]}"'
        )
    return seconds


def _parse_byte_rate(text: str) -> int:
    try:
        size = int(text) if text.isascii() and text.isdigit() else parse_size(text)
    except ValueError:
        size = 0
    if not 0 < size <= 2**53:
        raise click.UsageError(f'--publish-bytes: expected a size like "512KiB" or "1GiB", found "{text[:40]}"')
    return size


def _signing_secret(given: str | None, path: Path | None, state: str | None) -> tuple[str, str]:
    if given:
        return given, "the secret of --secret"
    config = load(path, os.environ, {"state": state})
    if config.auth.secrets:
        named = "CATBUS_SECRET" if os.environ.get("CATBUS_SECRET", "").strip() else str(path)
        return config.auth.secrets[0], f"the secret of {named}"
    if kept := read_secret(config.state_directory):
        return kept, f"the development secret in {config.state_directory}"
    raise click.UsageError("there is no secret to sign with: set CATBUS_SECRET to the broker's secret")
