"""`GET /api/sessions`: the open sessions of this replica, in pages."""

from __future__ import annotations

from time import perf_counter
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from ....protocol.wire_messages import MAX_NUMBER
from ....session.session_report import SessionReport
from ...replica_interface import ReplicaInterface
from ..http_request import HttpRequest
from ..query import parse_query_as
from .administrator import ClientId, Limit, ReplicaName, for_administrators, name_of


class SessionsQuery(Struct):
    """The parameters of `GET /api/sessions`."""

    client_id: ClientId | UnsetType = UNSET
    limit: Limit = 100
    after: Annotated[int, Meta(ge=0, le=MAX_NUMBER, description="The `next` of the page before.")] = 0


class SessionsPage(Struct):
    """A page of the open sessions, the oldest first."""

    replica: ReplicaName
    open: Annotated[int, Meta(ge=0, description="The number of all open sessions of this replica.")]
    sessions: list[SessionReport]
    next: Annotated[int | None, Meta(description="The `after` of the next page; null on the last one.")] = None


async def _answer(replica: ReplicaInterface, request: HttpRequest) -> SessionsPage:
    """Describe sessions for as long as this request may use the CPU at a time, and let other tasks run in between."""
    query = parse_query_as(request.query, SessionsQuery)
    found = replica.sessions_after(query.after)
    page = SessionsPage(name_of(replica), len(replica.sessions_after(0)), [])
    scheduler, position = replica.cpu_scheduler, replica.delivery.position
    began = perf_counter()
    for opened in found:
        if perf_counter() - began > scheduler.slices.peer:
            await scheduler.yield_cpu()
            began = perf_counter()
        if query.client_id is not UNSET and opened.client_id != query.client_id:
            continue
        if len(page.sessions) == query.limit:
            page.next = page.sessions[-1].id
            break
        page.sessions.append(opened.report(position))
    return page


list_sessions = for_administrators(_answer)
