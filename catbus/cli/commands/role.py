"""`catbus role`: create, show and delete roles."""

from __future__ import annotations

from pathlib import Path

import click

from ..database_access import database_options, describe_database, load_database, show_role, with_roles
from ..shared_options import grants_of, patterns_argument, permissions_option


@click.group("role", short_help="Create, show and delete roles.", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Create, show and delete roles. A role has a token, and its grants are in the database.

    A token of `catbus grant` contains its grants, which are fixed until it expires. The grants of a role can be changed
    at any time, also for connected sessions (catbus grant --to, catbus revoke --from). Its token is valid until the
    role is deleted. Commands take a role by its token or by its handle, which `catbus role list` shows.

    The commands use the database of --database, else DATABASE_URL, else that of the file of --config, else the embedded
    database of the broker on this machine, which may be running.

    \b
    Examples:
      catbus role create --client-id ci -p read -p write 'builds.*'
      catbus role list
      catbus role delete 0123456789ab
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command("create", short_help="Create a role and its token.")
@patterns_argument(required=False)
@permissions_option("What the role may do", required=False)
@click.option("--client-id", metavar="NAME", help="The client_id of the role: the `sender` of its messages. [none]")
@database_options
def create(
    patterns: tuple[str, ...],
    permissions: tuple[str, ...],
    client_id: str | None,
    config: Path | None,
    database: str | None,
    state: str | None,
) -> None:
    """Create a role that may read or write the channels that match any PATTERN, and its token.

    The token is the only text on stdout. It is shown only once: the database has only its hash.

    \b
    Examples:
      catbus role create --client-id ci -p read -p write 'builds.*'
      TOKEN=$(catbus role create -p read 'orders.*' 'invoices.*')
      catbus role create --client-id later
    """
    if bool(patterns) != bool(permissions):
        raise click.UsageError("give both a PATTERN and a permission (-p read, -p write), or neither")
    if client_id is not None and not client_id.strip():
        raise click.UsageError("--client-id is empty")
    settings = load_database(config, database, state)
    token, role = with_roles(settings, lambda roles: roles.create(client_id, grants_of(permissions, patterns)))
    click.echo(token)
    click.echo(
        f"{client_id or 'the role'} may {role.grants}; the token of the role {role.handle} is shown only once: "
        f"{describe_database(settings)} has only its hash",
        err=True,
    )


@command.command("list", short_help="Show all roles.")
@database_options
def list_(config: Path | None, database: str | None, state: str | None) -> None:
    """Show all roles, oldest first, one JSON object per line.

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
    """Show the role with this token or handle, as a JSON object.

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
    """Delete the role with this token or handle. Its token is no longer valid.

    Connected sessions of the role are closed within a second.

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
