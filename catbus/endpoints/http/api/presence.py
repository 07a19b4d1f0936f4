"""`GET /api/presence`: the members of channels, on all replicas, in pages."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from ....presence.member_pages import read_members
from ....protocol.channels import check_pattern
from ...replica_interface import ReplicaInterface
from ..formats import PATTERN
from ..http_request import HttpRequest
from ..query import parse_query_as
from .administrator import Limit, ReplicaName, for_administrators, name_of


class PresenceQuery(Struct):
    """The parameters of `GET /api/presence`."""

    pattern: Annotated[str, Meta(description="Members of the channels that match.", extra_json_schema=PATTERN)] = "*"
    limit: Limit = 100
    after: Annotated[str, Meta(description="The `next` of the page before.")] | UnsetType = UNSET


class MemberReport(Struct):
    """A member of a channel: all sessions of a client, or one session without a client_id."""

    channel: str
    sessions: Annotated[int, Meta(ge=1, description="The number of its sessions in the channel.")]
    client_id: Annotated[str | None, Meta(description="Null for a session without one.")]
    session: Annotated[str | None, Meta(description="The name of a session without a client_id; null for a client.")]
    info: Annotated[Raw | UnsetType, Meta(description="What the newest of its sessions has said about itself.")] = UNSET


class PresencePage(Struct):
    """A page of members, in the order of their channels."""

    replica: ReplicaName
    members: list[MemberReport]
    next: Annotated[str | None, Meta(description="The `after` of the next page; null on the last one.")] = None


async def _answer(replica: ReplicaInterface, request: HttpRequest) -> PresencePage:
    query = parse_query_as(request.query, PresenceQuery)
    check_pattern(query.pattern)
    after = None if query.after is UNSET else query.after
    page = await read_members(replica.presence, query.pattern, after, query.limit)
    reports = [
        MemberReport(
            each.channel, each.sessions, each.client_id, each.session, UNSET if each.info is None else Raw(each.info)
        )
        for each in page.members
    ]
    return PresencePage(name_of(replica), reports, page.next)


list_members = for_administrators(_answer)
