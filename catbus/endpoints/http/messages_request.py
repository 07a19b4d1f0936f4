"""`GET /messages`: a page of messages, read forward from a cursor or backward, for clients that keep no connection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import trio
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from ...auth.grants import Identity, client_of
from ...delivery.message_pages import MAX_BACKWARD_PATTERNS, MessagePage, MissingRange, PageReader
from ...error_codes import ErrorCode
from ...errors import PeerError, Unavailable
from ...log import Entry
from ...protocol.wire_messages import Number
from ..replica_interface import ReplicaInterface
from .error_responses import error_response
from .formats import CURSOR, PATTERN
from .http_request import HttpRequest, request_token
from .http_response import HttpResponse, json_response
from .query import ACCESS_TOKEN, convert_parameters, distinct_patterns, format_cursor, parse_query, since

MAX_WAIT = 30
"""Seconds for which a request may wait for a message."""

RECHECK_AFTER = 0.1
"""Seconds of reading after which the permissions are checked again."""


class MessagesQuery(Struct):
    """The query of `GET /messages`. `since` and `before` exclude each other, and so do `wait` and `before`."""

    pattern: Annotated[
        list[Annotated[str, Meta(extra_json_schema=PATTERN)]],
        Meta(min_length=1, description="Messages that match any of these patterns. It may be repeated."),
    ]
    since: (
        Annotated[str, Meta(description="Read forward after this cursor, or after this seq.", extra_json_schema=CURSOR)]
        | UnsetType
    ) = UNSET
    epoch: Annotated[str, Meta(description="The epoch of `since`, if that is a seq.")] | UnsetType = UNSET
    before: Annotated[Number, Meta(description="Read backward from below this seq.")] | UnsetType = UNSET
    wait: Annotated[int, Meta(ge=0, le=MAX_WAIT, description="Seconds to wait if there is no message yet.")] = 0
    limit: Annotated[int, Meta(ge=1, le=1000, description="Messages in the page.")] = 100


class StoredMessage(Struct, omit_defaults=True):
    """A message of the log. `at`: when it was committed, in milliseconds since 1970.

    `retain`: whether it was published with `retain`.
    """

    channel: str
    payload: Raw
    seq: int
    at: int
    sender: str | UnsetType = UNSET
    retain: bool = False


def stored_message(entry: Entry) -> StoredMessage:
    """Return a message of the log as an answer has it."""
    sender = UNSET if entry.sender is None else entry.sender
    return StoredMessage(entry.channel, Raw(entry.payload), entry.seq, entry.at, sender, entry.retain)


class MessagesAnswer(Struct):
    """A page of messages in order, the oldest first.

    `cursor` is the `since` of the next request. `more`: whether there are more in the direction of reading. In `gap`,
    before the messages, others may be missing.
    """

    messages: list[StoredMessage]
    cursor: str
    more: bool
    gap: MissingRange | UnsetType = UNSET


async def messages(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer with a page of messages, as soon as there are any or the wait is over.

    The permissions are checked before and after a wait or slow reading. A request that waits ends early when the client
    disconnects or the replica stops. Messages that were erased since they were read are never sent.
    """
    pages = replica.message_pages
    began = trio.current_time()
    try:
        token = request_token(request)
        identity = await replica.authenticate(token, request.network)
        if request.has_body:
            raise PeerError(ErrorCode.BAD_MESSAGE, "a request for messages has no body")
        query, cursor = _parse(request.query, replica.config.limits.subscriptions)
        _check_grants(identity, query.pattern)
        reader = PageReader(pages, query.pattern, query.limit, client_of(identity, token, request.network))
        version, (after, epoch) = None, cursor or (None, None)
        while version != replica.delivery.page_version:
            version = replica.delivery.page_version
            if cursor is not None or query.wait:
                page = await _read_forward(request, reader, after, epoch, began + query.wait)
            else:
                page = await reader.read_before(None if query.before is UNSET else query.before)
            if query.wait or trio.current_time() - began > RECHECK_AFTER:
                _check_grants(await replica.authenticate(token, request.network), query.pattern)
        pages.check_memory()
    except (PeerError, Unavailable) as error:
        return error_response(replica, error)
    headers = [(b"cache-control", b"no-store")]
    if replica.readiness == "draining":
        # The next request of this client opens a connection, to another replica.
        headers.append((b"connection", b"close"))
    response = json_response(_answer(page), headers=headers)
    return replace(response, is_valid=lambda: version == replica.delivery.page_version)


def _parse(text: str, max_patterns: int) -> tuple[MessagesQuery, tuple[int, str | None] | None]:
    """Return the query, with each pattern once, and the seq and the epoch to resume after. Raises `PeerError`."""
    allowed = {name: max_patterns if name == "pattern" else 1 for name in MessagesQuery.__struct_fields__}
    found = parse_query(text, allowed)
    cursor = since(found)
    given = {name: values if name == "pattern" else values[0] for name, values in found.items() if name != ACCESS_TOKEN}
    query = convert_parameters(given, MessagesQuery)
    query.pattern = distinct_patterns(query.pattern)
    if query.before is not UNSET and (cursor is not None or query.wait):
        raise PeerError(ErrorCode.BAD_MESSAGE, "`before` excludes `since` and `wait`")
    if cursor is None and not query.wait and len(query.pattern) > MAX_BACKWARD_PATTERNS:
        text = f"`pattern` may occur {MAX_BACKWARD_PATTERNS} times without `since` or `wait`"
        raise PeerError(ErrorCode.BAD_MESSAGE, text)
    return query, cursor


def _check_grants(identity: Identity, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not identity.grants.may_read(pattern):
            raise PeerError(ErrorCode.UNAUTHORIZED, f"no read grant covers {pattern}")


async def _read_forward(
    request: HttpRequest, reader: PageReader, after: int | None, epoch: str | None, deadline: float
) -> MessagePage:
    """Read a page forward. If it has no messages, wait for some until the deadline, unless the client disconnects."""
    page = await reader.read_after(after, epoch)
    if page.final or trio.current_time() >= deadline:
        return page
    with reader.counted():
        while not (page.final or reader.stopping) and trio.current_time() < deadline:
            read_on = await _wait(request, reader, page, deadline)
            if read_on is None:
                break
            page = await reader.read_after(read_on, page.epoch)
    return page


async def _wait(request: HttpRequest, reader: PageReader, page: MessagePage, deadline: float) -> int | None:
    """Wait until messages follow a page: see `PageReader.wait`. Returns None when the client has disconnected."""
    read_on = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_disconnected, request, nursery.cancel_scope)
        read_on = await reader.wait(page, deadline)
        nursery.cancel_scope.cancel()
    return read_on


async def _cancel_when_disconnected(request: HttpRequest, scope: trio.CancelScope) -> None:
    await request.wait_disconnected()
    scope.cancel()


def _answer(page: MessagePage) -> MessagesAnswer:
    stored = [stored_message(entry) for entry in page.entries]
    gap = UNSET if page.gap is None else page.gap
    return MessagesAnswer(stored, format_cursor(page.seq, page.epoch), page.more, gap)
