"""`catbus status`: how a broker is."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import click

from ...client.transport import make_ssl_context
from ...errors import Unavailable
from ...protocol.wire_messages import to_json
from ..connection_options import ConnectionOptions, connection_options

_REQUEST_TIMEOUT = 5.0
_MAX_RESPONSE_BYTES = 1 << 20
SILENCE_SHOWN_AFTER = 15.0
"""Seconds after which a replica that has not said that it is there is worth a word."""


@click.command("status", short_help="Say how a broker is.")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Write JSON, on one line, for scripts.")
def command(broker: ConnectionOptions, as_json: bool) -> None:
    """Say whether a broker is ready. Exits with 1 when it is not.

    With a token that may read everything, it also says how its database and its log are, which replicas share them and
    how far each of them is.

    \b
    Examples:
      catbus status
      catbus status --json --url wss://bus.example.com/ws --token "$TOKEN" | jq .head
    """
    status, state = _request(broker, "/ready")
    ready = status == 200
    report: dict[str, Any] = {"url": broker.url, "ready": ready, "state": state}
    note = ""
    if broker.token:
        status, text = _request(broker, "/status", broker.token)
        if status == 200:
            report = {**json.loads(text), **report}
        else:
            note = f"it does not say more: {text}"
    else:
        note = "with a token that may read `*` it says more (--token)"
    click.echo(to_json(report).decode() if as_json else "\n".join(_format_report(report, note)))
    if not ready:
        raise click.exceptions.Exit(1)


def _request(broker: ConnectionOptions, path: str, token: str = "") -> tuple[int, str]:
    """The status of the answer, and what it says."""
    parts = urlsplit(broker.url)
    if parts.scheme not in ("ws", "wss"):
        raise click.UsageError("--url: `status` asks over the network: the URL begins with ws:// or wss://")
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    if parts.scheme == "wss":
        context = make_ssl_context(broker.ca)
        connection = http.client.HTTPSConnection(host, parts.port, timeout=_REQUEST_TIMEOUT, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=_REQUEST_TIMEOUT)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        return response.status, response.read(_MAX_RESPONSE_BYTES).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unavailable(f"there is no broker to be reached at {broker.url}: {reason}") from None
    finally:
        connection.close()


# For people.


def _format_report(report: dict[str, Any], note: str) -> Iterator[str]:
    yield f"{report['url']} is {'' if report['ready'] else 'not ready: '}{report['state']}"
    if "log" not in report:
        yield f"  {note}"
        return
    log = report["log"]
    now = time.time()
    process = f"{report['name']}, process {report['pid']}, catbus {report['version']}"
    yield _format_row("replica", f"{process}, for {_format_duration(now - report['started'] / 1000)}")
    yield _format_row("clients", f"{report['clients']:,}")
    yield _format_row("log", f"messages {report['floor']:,} to {report['head']:,} in {_format_size(log['size'])}")
    yield _format_row("epoch", report["epoch"] or "none yet")
    yield _format_row("behind", f"{report['late']:,} subscriptions, by {report['lag']:,} messages at the most")
    if "server" not in log:
        return
    yield _format_row("database", f"{log['server'] or 'not reached yet'}, {'there' if log['available'] else 'away'}")
    if log.get("missing"):
        yield _format_row("missing", _format_missing(log))
    yield _format_row("news", f"by {log['news']}, {log['behind']:,} messages behind the database")
    yield _format_row("queue", f"{log['notify_queue']:.1%} of the notification queue is in use")
    yield _format_row("roles", f"{log['roles']:,}")
    yield _format_row("retention", _format_retention(log["retention"], now))
    for holder in log["retention"]["holders"]:
        yield _format_row(
            "", f"in its way: {holder['application'] or 'somebody'}, process {holder['pid']}, {holder['since']}"
        )
    yield from _format_replicas(log["replicas"], now)


def _format_missing(log: dict[str, Any]) -> str:
    shown = ", ".join(f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in log["holes"])
    return f"{log['missing']:,} messages were deleted by hand: {shown}; `catbus repair` goes on behind them"


def _format_retention(found: dict[str, Any], now: float) -> str:
    if found["stepped"] is None:
        return "nothing has gone yet"
    ago = _format_duration(now - found["stepped"] / 1000)
    return f"{found['dropped']:,} messages deleted by this replica, most recently {ago} ago"


_COLUMNS = "REPLICA", "STATE", "CLIENTS", "APPLIED", "LATE", "LAG", "VERSION", "UP"


def _format_replicas(replicas: Sequence[dict[str, Any]], now: float) -> Iterator[str]:
    rows = [_COLUMNS, *(_format_replica(found, now) for found in replicas)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(_COLUMNS))]
    for row in rows:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _format_replica(found: dict[str, Any], now: float) -> tuple[str, ...]:
    """A row of the table; a replica of another release may say less of itself."""
    silent = found["silent"]
    state = f"silent for {silent:.0f} s" if silent > SILENCE_SHOWN_AFTER else str(found.get("state", "?"))
    values = [found.get(name) for name in ("clients", "applied", "late", "lag")]
    numbers = [f"{value:,}" if isinstance(value, int) else "?" for value in values]
    started = found.get("started")
    up = _format_duration(now - started / 1000) if isinstance(started, int) else "?"
    return (f"{found.get('name', '?')}:{found.get('pid', '?')}", state, *numbers, str(found.get("version", "?")), up)


def _format_row(name: str, text: str) -> str:
    return f"  {name:<10} {text}"


def _format_size(number: float) -> str:
    return f"{number / (1 << 20):,.1f} MiB"


def _format_duration(seconds: float) -> str:
    seconds = max(0, int(seconds))
    for length, unit, smaller, small in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= length:
            return f"{seconds // length} {unit} {seconds % length // smaller} {small}"
    return f"{seconds} s"
