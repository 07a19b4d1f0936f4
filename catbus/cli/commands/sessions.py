"""`catbus sessions`: list the open sessions of a replica."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from ...protocol.wire_messages import to_json
from ..connection_options import ConnectionOptions, connection_options
from ..http_requests import call_api
from ..text_tables import format_duration, format_name, format_table

_PAGE = 500
"""Sessions that are requested at once."""


@click.command("sessions", short_help="List the open sessions of a replica.")
@connection_options
@click.option("--client-id", metavar="ID", help="Only the sessions of this client.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="The most to list.")
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON, for scripts.")
def command(broker: ConnectionOptions, client_id: str | None, limit: int, as_json: bool) -> None:
    """List the open sessions of the replica at --url, the oldest first.

    It needs the admin key, or a token with read and write grants for `*`. Each replica lists its own sessions:
    `catbus status` shows all replicas.

    \b
    SUBS       its subscriptions; LAGGING: those that catch up from the log; LAG: messages that they lack at most
    QUEUED     bytes that wait to be sent to it
    PENDING    its publishes that are not acknowledged yet
    IN, OUT    messages that it has published, and that were sent to it

    \b
    Examples:
      catbus sessions
      catbus sessions --client-id alice
      catbus sessions --limit 10000 --json | jq '.sessions[] | select(.lagging > 0) | .client_id'
    """
    if client_id == "":
        raise click.UsageError("--client-id: a client_id has at least one character")
    found = _read_pages(broker, client_id, limit)
    click.echo(to_json(found).decode() if as_json else "\n".join(_format(found, client_id)))


def _read_pages(broker: ConnectionOptions, client_id: str | None, limit: int) -> dict[str, Any]:
    """Return the answer to a request, with the sessions of as many pages as are needed."""
    query: dict[str, object] = {} if client_id is None else {"client_id": client_id}
    sessions: list[Any] = []
    after = 0
    while True:
        page = call_api(broker, "/api/sessions", {**query, "limit": min(_PAGE, limit - len(sessions)), "after": after})
        sessions += page["sessions"]
        if page["next"] is None or len(sessions) >= limit:
            return {**page, "sessions": sessions}
        after = page["next"]


_COLUMNS = (
    *("ID", "CLIENT", "STATE", "TRANSPORT", "ADDRESS", "OPEN FOR", "SUBS", "LAGGING", "LAG", "QUEUED", "PENDING"),
    *("IN", "OUT"),
)
_NUMBERS = "subscriptions", "lagging", "lag", "queued", "pending", "published", "delivered"


def _format(found: dict[str, Any], client_id: str | None) -> Iterator[str]:
    now, sessions = time.time(), found["sessions"]
    whose = "" if client_id is None else f" of {format_name(client_id)}"
    yield f"sessions of {found['replica']}: {found['open']:,} open, {len(sessions):,}{whose} listed"
    if sessions:
        yield from format_table(_COLUMNS, [_format_session(each, now) for each in sessions])
    if found["next"] is not None:
        yield "  There are more: --limit"


def _format_session(session: dict[str, Any], now: float) -> tuple[str, ...]:
    client = "admin key" if session["admin"] else format_name(session["client_id"] or "-")
    opened = format_duration(now - session["opened"] / 1000)
    place = session["state"], session["transport"], session["network"] or "-"
    return (str(session["id"]), client, *place, opened, *(f"{session[name]:,}" for name in _NUMBERS))
