"""`catbus status`: how a broker is."""

from __future__ import annotations

import http.client
from typing import Any
from urllib.parse import urlsplit

import click
import trio

from ..client import connect
from ..errors import Unavailable
from ..wire import to_json
from .development import find_token
from .remote import token_option, url_option

_PATIENCE = 5.0


@click.command("status", short_help="Say how a broker is.")
@url_option
@token_option
def command(url: str, token: str | None) -> None:
    """Say whether a broker is ready and, with a token, how far its log is. Exits with 1 when it is not ready.

    \b
    Examples:
      catbus status
      catbus status --url wss://bus.example.com/ws --token "$TOKEN" | jq .head
    """
    ready, state = _ask_ready(url)
    report: dict[str, Any] = {"url": url, "ready": ready, "state": state}
    token = token or find_token(url)
    try:
        if ready and token:
            report |= trio.run(_ask_log, url, token)
    finally:
        click.echo(to_json(report).decode())
    if not ready:
        raise click.exceptions.Exit(1)


async def _ask_log(url: str, token: str) -> dict[str, Any]:
    async with connect(url, token=token) as bus:
        return {"client_id": bus.client_id, "epoch": bus.epoch, "head": bus.head, "floor": bus.floor}


def _ask_ready(url: str) -> tuple[bool, str]:
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss"):
        raise click.UsageError("--url: `status` asks over the network: the URL begins with ws:// or wss://")
    kind = http.client.HTTPSConnection if parts.scheme == "wss" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_PATIENCE)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        return response.status == 200, response.read(1000).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unavailable(f"there is no broker to be reached at {url}: {reason}") from None
    finally:
        connection.close()
