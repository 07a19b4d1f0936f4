"""`catbus revoke`: remove grants from a role."""

from __future__ import annotations

from pathlib import Path

import click

from ...auth.grants import Grants
from ...protocol.channels import covers
from ..database_access import database_options, load_database, show_role, with_roles
from ..shared_options import grants_of, patterns_argument, permissions_option


@click.command("revoke", short_help="Remove grants from a role.")
@patterns_argument(required=True)
@permissions_option("What to remove", required=True)
@click.option("--from", "role", required=True, metavar="ROLE", help="The role: its token or its handle.")
@database_options
def command(
    patterns: tuple[str, ...],
    permissions: tuple[str, ...],
    role: str,
    config: Path | None,
    database: str | None,
    state: str | None,
) -> None:
    """Remove exactly these grants from a role, and show the role. It must have all of them.

    The change applies to connected sessions of the role within a second. A token of `catbus grant` cannot be changed:
    it is valid until it expires.

    \b
    Examples:
      catbus revoke -p write 'builds.*' --from 0123456789ab
      catbus revoke -p all 'builds.*' 'orders.42' --from "$TOKEN"
    """
    taken = grants_of(permissions, patterns)
    left = with_roles(load_database(config, database, state), lambda roles: roles.revoke(role, taken))
    show_role(left)
    for line in still_allowed(taken, left.grants):
        click.echo(f"the role {left.handle} {line}", err=True)


def still_allowed(taken: Grants, left: Grants) -> list[str]:
    """Describe what the role may still do, by a remaining grant, although it was removed."""
    return [
        f"may still {verb} {pattern}, by its grant on {cover}"
        for verb, patterns, rest in (("read", taken.read, left.read), ("write", taken.write, left.write))
        for pattern in patterns
        for cover in [grant for grant in rest if covers(grant, pattern)][:1]
    ]
