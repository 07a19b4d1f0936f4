"""`GET /api/replicas`: all replicas of the broker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ...replica_interface import ReplicaInterface
from ..http_request import HttpRequest
from ..query import parse_query
from .administrator import for_administrators


class ReplicaDescription(Struct):
    """A replica, as it described itself in its last heartbeat. A field that its release does not have is null."""

    id: Annotated[str | None, Meta(description="Another one after each start.")] = None
    name: Annotated[str | None, Meta(description="The name of its host.")] = None
    pid: int | None = None
    version: str | None = None
    started: Annotated[int | None, Meta(description="In milliseconds since 1970.")] = None
    state: Annotated[str | None, Meta(description="As in `/ready`.")] = None
    clients: Annotated[int | None, Meta(description="The number of its sessions.")] = None
    applied: Annotated[int | None, Meta(description="The newest seq that it has handed to its subscriptions.")] = None
    lagging: Annotated[int | None, Meta(description="Subscriptions that lag.")] = None
    lag: Annotated[int | None, Meta(description="The largest lag of them, in messages.")] = None
    silent: Annotated[float, Meta(description="Seconds since its last heartbeat.")] = 0.0


class ReplicasReport(Struct):
    """The replicas that had a heartbeat within the last minute; the one that answers comes first."""

    available: Annotated[
        bool, Meta(description="Whether the log is reachable. If not, the list is as old as the last heartbeat.")
    ]
    replicas: list[ReplicaDescription]


async def _answer(replica: ReplicaInterface, request: HttpRequest) -> ReplicasReport:
    parse_query(request.query, {})
    # A log in memory has no heartbeats: this replica is the only one.
    found = replica.log.report().get("replicas") or [replica.describe()]
    assert isinstance(found, list)
    return ReplicasReport(replica.log.available, [_describe(each) for each in found])


def _describe(report: Mapping[str, Any]) -> ReplicaDescription:
    """Return the report of a replica, which may run another release: fields of another type are left out."""
    known = {}
    for field in msgspec.structs.fields(ReplicaDescription):
        try:
            known[field.name] = msgspec.convert(report.get(field.name, field.default), field.type)
        except msgspec.ValidationError:
            continue
    return ReplicaDescription(**known)


list_replicas = for_administrators(_answer)
