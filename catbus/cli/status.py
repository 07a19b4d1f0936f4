"""`catbus status`: how a broker is."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import click
import trio

from ..errors import Unavailable
from ..wire import to_json
from .remote import Remote, remote_options

_PATIENCE = 5.0
_LONGEST = 1 << 16


@click.command("status", short_help="Say how a broker is.")
@remote_options
def command(remote: Remote) -> None:
    """Say whether a broker is ready and, with a token, how far its log is. Exits with 1 when it is not ready.

    With a token that may read everything, it also says what the log takes up and what becomes of its oldest part.

    \b
    Examples:
      catbus status
      catbus status --url wss://bus.example.com/ws --token "$TOKEN" | jq .head
    """
    status, state = _ask(remote.url, "/ready")
    ready = status == 200
    report: dict[str, Any] = {"url": remote.url, "ready": ready, "state": state}
    try:
        if ready and remote.token:
            report |= trio.run(_ask_log, remote)
            status, text = _ask(remote.url, "/status", remote.token)
            if status == 200:
                report["log"] = json.loads(text)["log"]
    finally:
        click.echo(to_json(report).decode())
    if not ready:
        raise click.exceptions.Exit(1)


async def _ask_log(remote: Remote) -> dict[str, Any]:
    async with remote.connect() as bus:
        return {"client_id": bus.client_id, "epoch": bus.epoch, "head": bus.head, "floor": bus.floor}


def _ask(url: str, path: str, token: str = "") -> tuple[int, str]:
    """The status of the answer, and what it says."""
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss"):
        raise click.UsageError("--url: `status` asks over the network: the URL begins with ws:// or wss://")
    kind = http.client.HTTPSConnection if parts.scheme == "wss" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_PATIENCE)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        return response.status, response.read(_LONGEST).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unavailable(f"there is no broker to be reached at {url}: {reason}") from None
    finally:
        connection.close()
