"""`GET /api/retained`: the retained messages of the broker, in pages."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from ....delivery.page_size import MAX_PAGE_BYTES
from ....protocol.channels import check_channel, check_pattern
from ...replica_interface import ReplicaInterface
from ..formats import CHANNEL, PATTERN
from ..http_request import HttpRequest
from ..messages_request import StoredMessage, stored_message
from ..query import parse_query_as
from .administrator import Limit, for_administrators


class RetainedQuery(Struct):
    """The parameters of `GET /api/retained`."""

    pattern: Annotated[str, Meta(description="Channels that match it.", extra_json_schema=PATTERN)] = "*"
    after: Annotated[str, Meta(description="The `next` of the page before.", extra_json_schema=CHANNEL)] | UnsetType = (
        UNSET
    )
    limit: Limit = 100


class RetainedMessagesPage(Struct):
    """A page of retained messages, in the byte order of their channels. It has about 1 MiB at most."""

    messages: list[StoredMessage]
    next: Annotated[str | None, Meta(description="The `after` of the next page; null on the last one.")] = None


async def _answer(replica: ReplicaInterface, request: HttpRequest) -> RetainedMessagesPage:
    query = parse_query_as(request.query, RetainedQuery)
    check_pattern(query.pattern)
    after = None if query.after is UNSET else query.after
    if after is not None:
        check_channel(after)
    delivery, version = replica.delivery, -1
    # A page that was read before an erasure may contain what was erased.
    while version != delivery.page_version:
        version = delivery.page_version
        page = await replica.log.retained(
            query.pattern, after=after, until=delivery.position, rows=query.limit, size=MAX_PAGE_BYTES, newer=True
        )
    messages = [stored_message(entry) for entry in page.entries]
    return RetainedMessagesPage(messages, None if page.complete else page.last)


list_retained = for_administrators(_answer, messages=True)
