"""`GET /api/clients/{client_id}/messages/{seq}` and `/channels/{channel}`: what became of a message for a client."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from ....protocol.channels import ERASED, check_channel
from ....protocol.wire_messages import MAX_NUMBER
from ....session.message_fate import SessionFate, fate_for
from ...replica_interface import ReplicaInterface
from ..formats import CHANNEL
from ..http_request import HttpRequest
from ..query import convert_parameters, parse_query
from .administrator import ClientId, ReplicaName, for_administrators, name_of


class ClientMessagePath(Struct):
    """The client and the message that a request is about."""

    client_id: ClientId
    seq: Annotated[int, Meta(ge=1, le=MAX_NUMBER, description="The number of the message.")]


class ClientChannelPath(Struct):
    """The client and the channel that a request is about."""

    client_id: ClientId
    channel: Annotated[str, Meta(extra_json_schema=CHANNEL)]


class AskedMessage(Struct):
    """The message, as far as the log has it."""

    state: Annotated[
        Literal["in the log", "erased", "removed by retention", "deleted", "unknown"],
        Meta(description="`deleted`: by hand. `unknown`: this replica has no message with so high a number."),
    ]
    channel: str | None = None
    at: Annotated[int | None, Meta(description="When it was committed, in milliseconds since 1970.")] = None
    sender: str | None = None


class DeliveriesReport(Struct):
    """What this replica knows about messages for a client."""

    replica: ReplicaName
    head: Annotated[int, Meta(ge=0, description="The newest seq that this replica knows.")]
    floor: Annotated[int, Meta(ge=0, description="The oldest seq of the log.")]
    message: Annotated[AskedMessage | None, Meta(description="Null if the request names only a channel.")]
    sessions: Annotated[
        list[SessionFate], Meta(description="The open sessions of the client on this replica, if the channel is known.")
    ]


async def _explain_message(replica: ReplicaInterface, request: HttpRequest) -> DeliveriesReport:
    parse_query(request.query, {})
    asked = convert_parameters(request.parameters, ClientMessagePath)
    message = await _find(replica, asked.seq)
    return _report(replica, asked.client_id, message.channel, asked.seq, message)


async def _explain_channel(replica: ReplicaInterface, request: HttpRequest) -> DeliveriesReport:
    parse_query(request.query, {})
    asked = convert_parameters(request.parameters, ClientChannelPath)
    check_channel(asked.channel)
    return _report(replica, asked.client_id, asked.channel)


def _report(
    replica: ReplicaInterface,
    client_id: str,
    channel: str | None,
    seq: int | None = None,
    message: AskedMessage | None = None,
) -> DeliveriesReport:
    """Make it without a pause, so that all of it is about the same moment."""
    position = replica.delivery.position
    sessions = [
        fate_for(opened, channel, seq, position)
        for opened in replica.sessions_after(0)
        if channel is not None and opened.client_id == client_id
    ]
    return DeliveriesReport(name_of(replica), replica.log.applied, replica.log.floor, message, sessions)


async def _find(replica: ReplicaInterface, seq: int) -> AskedMessage:
    log = replica.log
    if seq > log.applied:
        return AskedMessage("unknown")
    page = await log.read(seq - 1, rows=1)
    if page.after >= seq:
        return AskedMessage("removed by retention" if page.lost == "retention" else "deleted")
    if not page.entries or page.entries[0].seq != seq:
        return AskedMessage("deleted")
    entry = page.entries[0]
    if entry.channel == ERASED:
        return AskedMessage("erased")
    return AskedMessage("in the log", entry.channel, entry.at, entry.sender)


explain_message = for_administrators(_explain_message)
explain_channel = for_administrators(_explain_channel)
