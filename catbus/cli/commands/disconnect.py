"""`catbus disconnect`: close the sessions of a client."""

from __future__ import annotations

from urllib.parse import quote

import click

from ...protocol.wire_messages import to_json
from ..connection_options import ConnectionOptions, connection_options
from ..http_requests import call_api
from ..text_tables import format_name


@click.command("disconnect", short_help="Close the sessions of a client.")
@click.argument("client_id")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON, for scripts.")
def command(broker: ConnectionOptions, client_id: str, as_json: bool) -> None:
    """Close all sessions of the client CLIENT_ID, on every replica, with the closing code 4505.

    It needs the admin key, or a token with read and write grants for `*`. The client may connect again, and most
    clients do so by themselves: `catbus revoke --client-id` keeps it out.

    \b
    Examples:
      catbus disconnect alice
      catbus disconnect 'user/42' --url wss://bus.example.com/ws --token "$ADMIN_KEY"
    """
    if not client_id:
        raise click.UsageError("CLIENT_ID: a client_id has at least one character")
    found = call_api(broker, f"/api/clients/{quote(client_id, safe='')}/disconnect", method="POST")
    if as_json:
        click.echo(to_json(found).decode())
        return
    number = found["sessions"]
    here = f"{number:,} session{'s' * (number != 1)} of {found['replica']}"
    click.echo(f"disconnected {format_name(client_id)}: {here}, and those of other replicas")
