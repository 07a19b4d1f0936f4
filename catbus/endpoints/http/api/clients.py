"""`POST /api/clients/{client_id}/disconnect`: close the sessions of a client."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from ....observability.loggers import get_logger
from ....protocol.wire_messages import clip
from ...replica_interface import ReplicaInterface
from ..http_request import HttpRequest
from ..query import convert_parameters, parse_query
from .administrator import ClientId, for_administrators

logger = get_logger("catbus.endpoints")


class ClientPath(Struct):
    """The client that a request is about."""

    client_id: ClientId


class DisconnectReport(Struct):
    """What became of a request to disconnect a client."""

    client_id: str
    sessions: Annotated[int, Meta(ge=0, description="Sessions of this replica that were closed.")]


async def _disconnect(replica: ReplicaInterface, request: HttpRequest) -> DisconnectReport:
    parse_query(request.query, {})
    client_id = convert_parameters(request.parameters, ClientPath).client_id
    closed = await replica.disconnect_client(client_id)
    logger.info("an administrator disconnected a client", client_id=clip(client_id), sessions=closed)
    return DisconnectReport(client_id, closed)


disconnect_client = for_administrators(_disconnect)
