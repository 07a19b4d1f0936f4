"""`catbus why`: say whether a message was delivered to a client, and why not."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import quote

import click

from ...errors import PeerError
from ...protocol.channels import check_channel
from ...protocol.wire_messages import to_json
from ..connection_options import ConnectionOptions, connection_options
from ..delivery_explanation import explain
from ..http_requests import call_api


@click.command("why", short_help="Say whether a message was delivered to a client, and why not.")
@click.argument("message", metavar="SEQ|CHANNEL")
@click.option("--client-id", required=True, metavar="ID", help="The client.")
@click.option(
    "--replica", "replicas", multiple=True, metavar="URL", help="Another replica to ask, like --url; may be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="Print the answers of the replicas as JSON.")
@connection_options
def command(message: str, client_id: str, replicas: tuple[str, ...], as_json: bool, broker: ConnectionOptions) -> None:
    """Say what became of the message SEQ for a client: delivered, lagging, or why not.

    A replica knows the sessions that are open on it, what they are subscribed to, and how far each subscription is.
    With several replicas, name the others with --replica; `catbus status` lists them. Delivered means that the message
    was given to the connection of a session that is still open. Of sessions that have ended, replicas know nothing.

    An ephemeral message has no number, and nobody notes what becomes of it. For its CHANNEL, the command says whether
    the client would receive one, and how many its full send queues have dropped.

    It needs the admin key, or a token with read and write grants for `*`.

    \b
    Examples:
      catbus why 4711 --client-id alice
      catbus why 4711 --client-id alice --url ws://10.0.0.1:8080/ws --replica ws://10.0.0.2:8080/ws
      catbus why room.typing --client-id alice
    """
    seq = int(message) if message.isascii() and message.isdecimal() else None
    if seq is None:
        try:
            check_channel(message)
        except PeerError as error:
            raise click.UsageError(f"neither a seq nor a channel: {error}") from None
    elif seq < 1:
        raise click.UsageError("the first message has the seq 1")
    asked = f"channels/{message}" if seq is None else f"messages/{seq}"
    path = f"/api/clients/{quote(client_id, safe='')}/{asked}"
    reports = [call_api(replace(broker, url=url), path) for url in (broker.url, *replicas)]
    if as_json:
        click.echo(to_json(reports).decode())
    else:
        click.echo("\n".join(explain(reports, seq, None if seq is not None else message, client_id)))
