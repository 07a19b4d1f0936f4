"""`catbus role`: make, show and delete roles."""

from __future__ import annotations

from pathlib import Path

import click

from ..database_access import database_options, describe_database, load_database, show_role, with_roles
from ..shared_options import grants_of, patterns_argument, permissions_option


@click.group("role", short_help="Make, show and delete roles.", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Make, show and delete roles: bearers of tokens whose grants are kept in the database.

    A token of `catbus grant` says itself what it allows, for as long as it is good. A role's token says nothing: what
    it allows is kept in the database, can be changed at any moment, also while its bearer is connected (catbus grant
    --to, catbus revoke --from), and ends when the role is deleted. A role is named by its token or by its handle, which
    `catbus role list` shows.

    The commands speak to the database: that of --database, else of DATABASE_URL, else of the file that --config names,
    else the embedded one of the broker on this machine, which may be running.

    \b
    Examples:
      catbus role create --client-id ci -p read -p write 'builds.*'
      catbus role list
      catbus role delete 0123456789ab
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command("create", short_help="Make a role and its token.")
@patterns_argument(required=False)
@permissions_option("What the bearer may do", required=False)
@click.option("--client-id", metavar="NAME", help="Who the bearer is: the `sender` of its messages. [nobody]")
@database_options
def create(
    patterns: tuple[str, ...],
    permissions: tuple[str, ...],
    client_id: str | None,
    config: Path | None,
    database: str | None,
    state: str | None,
) -> None:
    """Make a role that may read or write the channels that match any PATTERN, and its token.

    The token stands alone on the first line of the output. It is shown this once: the database keeps a hash of it.

    \b
    Examples:
      catbus role create --client-id ci -p read -p write 'builds.*'
      TOKEN=$(catbus role create -p read 'orders.*' 'invoices.*')
      catbus role create --client-id later
    """
    if bool(patterns) != bool(permissions):
        raise click.UsageError("a PATTERN needs a permission (-p read, -p write), and a permission a PATTERN")
    if client_id is not None and not client_id.strip():
        raise click.UsageError("--client-id is empty")
    settings = load_database(config, database, state)
    token, role = with_roles(settings, lambda roles: roles.create(client_id, grants_of(permissions, patterns)))
    click.echo(token)
    click.echo(
        f"{client_id or 'the bearer'} may {role.grants}; the token of the role {role.handle} is shown this once, and "
        f"{describe_database(settings)} has its hash",
        err=True,
    )


@command.command("list", short_help="Show all roles.")
@database_options
def list_(config: Path | None, database: str | None, state: str | None) -> None:
    """Show all roles, oldest first: one JSON object a line.

    \b
    Examples:
      catbus role list
      catbus role list --database postgres://me@db/catbus | jq -r 'select(.client_id == "ci") | .role'
    """
    for role in with_roles(load_database(config, database, state), lambda roles: roles.list(), change=False):
        show_role(role)


@command.command("show", short_help="Show a role.")
@click.argument("role")
@database_options
def show(role: str, config: Path | None, database: str | None, state: str | None) -> None:
    """Show the role that has this token or handle, as a JSON object.

    \b
    Examples:
      catbus role show 0123456789ab
      catbus role show "$TOKEN" | jq .read
    """
    show_role(with_roles(load_database(config, database, state), lambda roles: roles.show(role), change=False))


@command.command("delete", short_help="Delete a role.")
@click.argument("role")
@database_options
def delete(role: str, config: Path | None, database: str | None, state: str | None) -> None:
    """Delete the role that has this token or handle. Nobody is let in by its token any more.

    Who is connected by it is closed within a second.

    \b
    Examples:
      catbus role delete 0123456789ab
      catbus role delete "$TOKEN"
    """
    settings = load_database(config, database, state)
    deleted = with_roles(settings, lambda roles: roles.delete(role))
    click.echo(
        f"deleted the role {deleted.handle}, which could {deleted.grants}; in {describe_database(settings)}", err=True
    )
