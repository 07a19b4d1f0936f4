"""`catbus revoke`: remove grants from a role, or revoke the tokens of a client."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import click
import trio

from ...auth.grants import Grants
from ...auth.revocations import check_revocation
from ...auth.token_errors import format_time
from ...config import Config, parse_duration
from ...errors import PeerError
from ...postgres.revocations.stored_revocations import revoke_client
from ...protocol.channels import covers
from ...protocol.wire_messages import to_json
from ..database_access import database_options, load_database, open_database, show_role, with_roles
from ..shared_options import grants_of, patterns_argument, permissions_option


@click.command("revoke", short_help="Remove grants from a role, or revoke the tokens of a client.")
@patterns_argument(required=False)
@permissions_option("What to remove", required=False)
@click.option("--from", "role", metavar="ROLE", help="The role: its token or its handle.")
@click.option("--client-id", metavar="NAME", help="Revoke the tokens of this client, instead of grants of a role.")
@click.option(
    "--issued-before", metavar="TIME", help="Only tokens issued before: seconds since 1970, or like 2026-01-31T12:00Z."
)
@click.option("--max-lifetime", metavar="DURATION", help="How long its tokens live at most, like 12h. [unlimited]")
@database_options
def command(
    patterns: tuple[str, ...],
    permissions: tuple[str, ...],
    role: str | None,
    client_id: str | None,
    issued_before: str | None,
    max_lifetime: str | None,
    config: Path | None,
    database: str | None,
    state: str | None,
) -> None:
    """Remove exactly these grants from a role, and show the role. It must have all of them.

    With --client-id, revoke the tokens of a client that were issued until now, or before --issued-before: tokens of
    `catbus grant`, JWTs and role tokens. They are rejected from then on, and sessions that use them are closed. Tokens
    that are issued later are valid. A token without the claim `iat` counts as issued in 1970. It cannot be undone: give
    the client another token. The brokers keep the revocation for ever, or with --max-lifetime until no such token is
    left.

    Both apply on every replica within a second.

    \b
    Examples:
      catbus revoke -p write 'builds.*' --from 0123456789ab
      catbus revoke -p all 'builds.*' 'orders.42' --from "$TOKEN"
      catbus revoke --client-id alice
      catbus revoke --client-id alice --issued-before 2026-01-31T12:00:00Z --max-lifetime 7d
    """
    of_roles = {"PATTERN": patterns, "--permission": permissions, "--from": role}
    of_clients = {"--client-id": client_id, "--issued-before": issued_before, "--max-lifetime": max_lifetime}
    if client_id is None:
        for option, given in of_clients.items():
            if given is not None:
                raise click.UsageError(f"{option} has no effect without --client-id")
        for option, value in of_roles.items():
            if not value:
                raise click.UsageError(f"{option} is missing: which grants of which role? (or --client-id)")
        assert role is not None
        _revoke_grants(role, grants_of(permissions, patterns), load_database(config, database, state))
        return
    for option, value in of_roles.items():
        if value:
            raise click.UsageError(f"{option} has no effect with --client-id: all tokens of the client are revoked")
    settings = load_database(config, database, state)
    before = None if issued_before is None else _parse_time(issued_before)
    until = None
    if max_lifetime is not None:
        until = (time.time() if before is None else before) + _parse_lifetime(max_lifetime) + settings.auth.leeway
    try:
        check_revocation(client_id, before, until)
    except PeerError as error:
        raise click.UsageError(str(error)) from None
    in_force = trio.run(_revoke_client, settings, client_id, before, until)
    click.echo(to_json({"client_id": client_id, "issued_before": in_force}).decode())
    click.echo(f"tokens of {client_id} that were issued before {format_time(in_force)} are revoked", err=True)


async def _revoke_client(config: Config, client_id: str, before: float | None, until: float | None) -> float:
    async with open_database(config) as settings:
        return await revoke_client(settings, client_id, before, until)


def _revoke_grants(role: str, taken: Grants, config: Config) -> None:
    left = with_roles(config, lambda roles: roles.revoke(role, taken))
    show_role(left)
    for line in still_allowed(taken, left.grants):
        click.echo(f"the role {left.handle} {line}", err=True)


def _parse_time(text: str) -> float:
    """Parse seconds since 1970, or a time with its offset from UTC (RFC 3339)."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise click.UsageError(
            f'--issued-before: expected seconds since 1970, or a time like "2026-01-31T12:00:00Z", found "{text[:40]}"'
        )
    return found.timestamp()


def _parse_lifetime(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0
    if not seconds > 0:
        raise click.UsageError(f'--max-lifetime: expected a duration like "12h" or "7d", found "{text[:40]}"')
    return seconds


def still_allowed(taken: Grants, left: Grants) -> list[str]:
    """Describe what the role may still do, by a remaining grant, although it was removed."""
    return [
        f"may still {verb} {pattern}, by its grant on {cover}"
        for verb, patterns, rest in (("read", taken.read, left.read), ("write", taken.write, left.write))
        for pattern in patterns
        for cover in [grant for grant in rest if covers(grant, pattern)][:1]
    ]
