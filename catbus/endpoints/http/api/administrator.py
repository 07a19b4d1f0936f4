"""Who may use `/api/`, and the types that several of its resources share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated

from msgspec import Meta, Struct

from ....auth.grants import Identity
from ....error_codes import ErrorCode
from ....errors import PeerError, Unavailable
from ....observability.audit_log import log_admin_call
from ....protocol.wire_messages import clip
from ...replica_interface import ReplicaInterface
from ..error_responses import error_response
from ..http_request import HttpRequest, bearer_token
from ..http_response import HttpResponse, json_response
from ..operation import Handler

MAX_CLIENT_ID = 2000
"""Characters of a client_id in a request. Those of tokens are shorter by default (`limits.client_id`)."""

ClientId = Annotated[
    str, Meta(min_length=1, max_length=MAX_CLIENT_ID, pattern=r"^[^\x00]*$", description="The client_id of its token.")
]

Limit = Annotated[int, Meta(ge=1, le=1000, description="The most entries of each list in the answer.")]

ReplicaName = Annotated[str, Meta(description="The replica that answers: its host, and the number of its process.")]


def name_of(replica: ReplicaInterface) -> str:
    """Return the name of a replica for people."""
    found = replica.describe()
    return f"{found['name']}:{found['pid']}"


def may_administer(identity: Identity) -> bool:
    """Return whether an identity may use `/api/`."""
    return identity.admin or (identity.grants.may_read("*") and identity.grants.may_write("*"))


def for_administrators(
    answer: Callable[[ReplicaInterface, HttpRequest], Awaitable[Struct]], *, messages: bool = False
) -> Handler:
    """Make a handler that checks the token, answers with the struct that `answer` returns, and logs the call.

    The token is taken from the `Authorization` header alone: a URL may be logged on its way. `answer` may raise
    `PeerError` and `Unavailable`.

    `messages`: the answer has contents of messages, so that it is not sent any more once messages were erased. It has
    none that were erased before `answer` returns.
    """

    async def handle(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
        try:
            identity = await replica.authenticate(bearer_token(request), request.network)
            if not may_administer(identity):
                raise PeerError(
                    ErrorCode.UNAUTHORIZED, "this needs the admin key, or a token with read and write grants for `*`"
                )
        except PeerError as error:
            return error_response(replica, error)
        try:
            response = json_response(await answer(replica, request), headers=[(b"cache-control", b"no-store")])
            if messages:
                version = replica.delivery.page_version
                response = replace(response, is_valid=lambda: version == replica.delivery.page_version)
        except (PeerError, Unavailable) as error:
            response = error_response(replica, error)
        path, client_id = clip(request.path), identity.client_id
        log_admin_call(request.method, path, response.status, client_id=client_id, address=request.network)
        return response

    return handle
