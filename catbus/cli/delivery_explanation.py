"""What `catbus why` says of the answers of replicas. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from .text_tables import format_name, format_time

Report = Mapping[str, Any]
"""An answer of `/api/clients/{client_id}/messages/{seq}`, or of `/channels/{channel}`."""

_RANK = ("sent", "queued", "lagging", "earlier", "not subscribed", "not permitted")
_GONE = {
    "erased": "was erased: it is delivered to nobody any more. A client that has received it keeps it",
    "removed by retention": "was removed by retention. A subscription that lagged behind it got a `gap`",
    "deleted": "was deleted from the log by hand. `catbus repair` makes subscriptions continue after it",
}


def explain(reports: Sequence[Report], seq: int | None, channel: str | None, client_id: str) -> Iterator[str]:
    """Yield what became of a message for a client: first one sentence, then what it rests on.

    `channel` is that of an ephemeral message, whose `seq` is None. There is at least one report.
    """
    client = format_name(client_id)
    known = max(reports, key=lambda report: report["head"])
    if seq is not None:
        # A replica that is behind does not know the message yet.
        asked = next((each["message"] for each in reports if each["message"]["state"] != "unknown"), known["message"])
        if asked["state"] == "unknown":
            yield f"never published: the newest message is {known['head']}"
            return
        if asked["state"] != "in the log":
            yield f"message {seq} {_GONE[asked['state']]}"
            if asked["state"] == "removed by retention":
                yield f"  the oldest message is {known['floor']}"
            return
        channel, message = asked["channel"], f"message {seq}"
        sender = format_name(asked["sender"] or "a client without a client_id")
        published = f"published at {_time(asked['at'])} on {channel} by {sender}"
    else:
        message = f"an ephemeral message on {channel}"
        published = "ephemeral messages are in no log, and nobody notes what becomes of each"
    found = [(session, report["replica"]) for report in reports for session in report["sessions"]]
    if not found:
        yield f"no session of {client} is open{_where(reports)}, so what became of {message} is not known there"
        yield f"  {published}"
        yield "  a client that returns with its cursor receives what it has missed"
        yield f"  with [events] sessions, `catbus sub _catbus.sessions.{client} --since 0` shows when it was connected"
        return
    best, replica = min(found, key=lambda each: _RANK.index(each[0]["fate"]))
    fate = "dropped" if seq is None and best["ephemeral_dropped"] else best["fate"]
    text = (_VERDICTS if seq is not None else _EPHEMERAL_VERDICTS)[fate]
    yield text.format(message=message, client=client, replica=replica, **best)
    yield f"  {published}"
    for session, name in found:
        place = f"session {session['session']} on {name}, {session['transport']}, since {_time(session['opened'])}"
        yield f"  {place}: {_facts(session)}"


_VERDICTS = {
    "sent": "delivered: {message} was sent to {client} by {replica}",
    "queued": "delivered: {message} was sent to {client} by {replica}, or is in its send queue",
    "lagging": "lagging: {message} comes to {client}, after {behind} other messages of the log",
    "earlier": "not delivered: {client} subscribed after {message}, without a cursor before it",
    "not subscribed": "not delivered: {client} is connected, and not subscribed to its channel",
    "not permitted": "not delivered: {client} has no permission to read its channel, and no subscription",
}
_EPHEMERAL_VERDICTS = {
    "sent": "subscribed: {client} receives {message}, and none was dropped so far",
    "queued": "subscribed: {client} receives {message}, and none was dropped so far",
    "dropped": "perhaps dropped: full send queues of {client} had no room for {ephemeral_dropped} ephemeral messages",
    "not subscribed": "not delivered: {client} is connected, and not subscribed to that channel",
    "not permitted": "not delivered: {client} has no permission to read that channel, and no subscription",
}


def _facts(session: Mapping[str, Any]) -> str:
    facts = [session["fate"]]
    if session["pattern"] is not None:
        facts.append(f"pattern {session['pattern']}")
    if session["queued"]:
        facts.append(f"{session['queued']} bytes in its send queue")
    if session["ephemeral_dropped"]:
        facts.append(f"{session['ephemeral_dropped']} ephemeral messages dropped")
    return ", ".join(facts)


def _where(reports: Sequence[Report]) -> str:
    return " on " + ", ".join(sorted({report["replica"] for report in reports}))


def _time(milliseconds: int) -> str:
    return format_time(datetime.fromtimestamp(milliseconds / 1000, UTC))
