"""`POST /api/clients/{client_id}/disconnect` and `/revoke`: close the sessions of a client, or revoke its tokens."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from ....auth.revocations import LATEST_TIME
from ....protocol import wire_messages as wire
from ...replica_interface import ReplicaInterface
from ..http_request import HttpRequest
from ..query import convert_parameters, parse_query
from .administrator import ClientId, ReplicaName, for_administrators, name_of


class ClientPath(Struct):
    """The client that a request is about."""

    client_id: ClientId


class DisconnectReport(Struct):
    """What became of a request to disconnect a client."""

    replica: ReplicaName
    client_id: str
    sessions: Annotated[int, Meta(ge=0, description="How many sessions this replica had of it.")]


Seconds = Annotated[float, Meta(ge=0, le=LATEST_TIME)]


class RevokeRequest(Struct):
    """Which tokens of a client are revoked. Times are in seconds since 1970."""

    issued_before: Annotated[
        Seconds | None, Meta(description="Tokens that were issued before; by default those issued before now.")
    ] = None
    forget_after: Annotated[
        Seconds | None,
        Meta(
            description="No such token is valid then, so the broker need not remember it. By default it does for ever."
        ),
    ] = None


class RevocationReport(Struct):
    """The revocation that is in force: an earlier one counts if it is of a later time."""

    client_id: str
    issued_before: float


def _client_of(request: HttpRequest) -> str:
    parse_query(request.query, {})
    return convert_parameters(request.parameters, ClientPath).client_id


async def _disconnect(replica: ReplicaInterface, request: HttpRequest) -> DisconnectReport:
    client_id = _client_of(request)
    return DisconnectReport(name_of(replica), client_id, await replica.disconnect_client(client_id))


async def _revoke(replica: ReplicaInterface, request: HttpRequest) -> RevocationReport:
    client_id, body = _client_of(request), await request.read()
    try:
        wanted = msgspec.json.decode(body, type=RevokeRequest) if body else RevokeRequest()
    except wire.UNDECODABLE as error:
        raise wire.decoding_error(error) from None
    in_force = await replica.revoke_client(client_id, wanted.issued_before, wanted.forget_after)
    return RevocationReport(client_id, in_force)


disconnect_client = for_administrators(_disconnect)
revoke_client = for_administrators(_revoke)
