"""`catbus status`: show the state of a broker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import click

from ...protocol.wire_messages import to_json
from ..connection_options import ConnectionOptions, connection_options
from ..http_requests import send_request
from ..text_tables import format_duration, format_table

SILENCE_SHOWN_AFTER = 15.0
"""Seconds since the last heartbeat of a replica, after which the silence is shown."""


@click.command("status", short_help="Show the state of a broker.")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Write one line of JSON, for scripts.")
def command(broker: ConnectionOptions, as_json: bool) -> None:
    """Show whether a broker is ready. Exits with 1 if it is not.

    With a token that may read all channels, also show its database, its log, and all replicas with their lag.

    \b
    Examples:
      catbus status
      catbus status --json --url wss://bus.example.com/ws --token "$TOKEN" | jq .head
    """
    status, state = send_request(broker, "/ready")
    ready = status == 200
    report: dict[str, Any] = {"url": broker.url, "ready": ready, "state": state}
    note = ""
    if broker.token:
        status, text = send_request(broker, "/status", broker.token)
        if status == 200:
            report = {**json.loads(text), **report}
        else:
            note = f"no details: {text}"
    else:
        note = "details require a token that may read `*` (--token)"
    click.echo(to_json(report).decode() if as_json else "\n".join(_format_report(report, note)))
    if not ready:
        raise click.exceptions.Exit(1)


# The text output.


def _format_report(report: dict[str, Any], note: str) -> Iterator[str]:
    yield f"{report['url']} is {'' if report['ready'] else 'not ready: '}{report['state']}"
    if "log" not in report:
        yield f"  {note}"
        return
    log = report["log"]
    now = time.time()
    process = f"{report['name']}, process {report['pid']}, catbus {report['version']}"
    yield _format_row("replica", f"{process}, up {format_duration(now - report['started'] / 1000)}")
    if "workers" in report:
        yield _format_row("workers", ", ".join(map(_format_worker, report["workers"])))
    yield _format_row("clients", f"{report['clients']:,}")
    yield _format_row("log", f"messages {report['floor']:,} to {report['head']:,} in {_format_size(log['size'])}")
    yield _format_row("epoch", report["epoch"] or "none yet")
    yield _format_row("lagging", f"{report['lagging']:,} subscriptions, max lag: {report['lag']:,} messages")
    if "server" not in log:
        return
    reachable = "reachable" if log["available"] else "unreachable"
    yield _format_row("database", f"{log['server'] or 'not connected yet'}, {reachable}")
    if log.get("missing"):
        yield _format_row("missing", _format_missing(log))
    yield _format_row("follows", f"by {log['news']}, lag: {log['behind']:,} messages")
    yield _format_row("queue", f"{log['notify_queue']:.1%} of the notification queue used")
    yield _format_row("roles", f"{log['roles']:,}")
    yield _format_row("retention", _format_retention(log["retention"], now))
    for holder in log["retention"]["holders"]:
        yield _format_row(
            "", f"blocked by {holder['application'] or 'an unnamed client'}, process {holder['pid']}, {holder['since']}"
        )
    yield from format_table(_COLUMNS, [_format_replica(found, now) for found in log["replicas"]])


def _format_worker(found: dict[str, Any]) -> str:
    process = f" (process {found['pid']})" if "pid" in found else ""
    return f"{found['worker']} {found['state']}{process}"


def _format_missing(log: dict[str, Any]) -> str:
    shown = ", ".join(f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in log["holes"])
    return f"{log['missing']:,} messages were deleted by hand: {shown}; `catbus repair` lets subscriptions continue"


def _format_retention(found: dict[str, Any], now: float) -> str:
    if found["stepped"] is None:
        return "no messages deleted yet"
    ago = format_duration(now - found["stepped"] / 1000)
    return f"{found['dropped']:,} messages deleted by this replica, most recently {ago} ago"


_COLUMNS = "REPLICA", "STATE", "CLIENTS", "APPLIED", "LAGGING", "LAG", "VERSION", "UP"


def _format_replica(found: dict[str, Any], now: float) -> tuple[str, ...]:
    """Format a row of the table. A replica of another release may report fewer fields."""
    silent = found["silent"]
    state = f"silent for {silent:.0f} s" if silent > SILENCE_SHOWN_AFTER else str(found.get("state", "?"))
    values = [found.get(name) for name in ("clients", "applied", "lagging", "lag")]
    numbers = [f"{value:,}" if isinstance(value, int) else "?" for value in values]
    started = found.get("started")
    up = format_duration(now - started / 1000) if isinstance(started, int) else "?"
    return (f"{found.get('name', '?')}:{found.get('pid', '?')}", state, *numbers, str(found.get("version", "?")), up)


def _format_row(name: str, text: str) -> str:
    return f"  {name:<10} {text}"


def _format_size(number: float) -> str:
    return f"{number / (1 << 20):,.1f} MiB"
