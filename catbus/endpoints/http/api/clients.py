"""`POST /api/clients/{client_id}/disconnect`: close the sessions of a client."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

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
    sessions: Annotated[int, Meta(ge=0, description="Sessions of this replica that were closed.")]


async def _disconnect(replica: ReplicaInterface, request: HttpRequest) -> DisconnectReport:
    parse_query(request.query, {})
    client_id = convert_parameters(request.parameters, ClientPath).client_id
    return DisconnectReport(name_of(replica), client_id, await replica.disconnect_client(client_id))


disconnect_client = for_administrators(_disconnect)
