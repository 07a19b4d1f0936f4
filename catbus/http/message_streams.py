"""Messages that are read over HTTP: pages of the log, and streams that continue after the loss of a connection."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import Any, Self

import anyio
import httpx
import msgspec
from msgspec import Raw, Struct

from ..error_codes import ErrorCode
from ..errors import Refused
from ..protocol.event_stream_parser import EventStreamParser, EventTooLarge, ServerSentEvent
from ..protocol.wire_messages import UNDECODABLE, decode_payload
from .requester import (
    REQUEST_TIMEOUT,
    Requester,
    Retries,
    TryAgain,
    close_response,
    describe,
    failure_of,
    read_body,
)

SILENCE_TIMEOUT = 60.0
"""Seconds without a byte after which an event stream counts as lost. The broker sends some every 15 to 30 s."""

EMPTY_PAUSE = 0.2
"""Seconds between two requests of which the first found nothing, however soon it was answered."""


class HttpMessage(Struct, frozen=True, dict=True, rename={"raw": "payload"}):
    """A message of the log, or an ephemeral one, which has no `seq` and no `cursor`.

    `at` is in milliseconds since 1970 by the clock of the broker. `sender` is the client_id of the publisher, or None.
    `cursor` is the position after the message, as opaque text for `since`. `retain`: it was published with `retain`.
    """

    channel: str
    raw: Raw
    seq: int | None = None
    at: int | None = None
    sender: str | None = None
    cursor: str | None = None
    retain: bool = False

    @cached_property
    def payload(self) -> Any:
        """The payload, decoded on first access."""
        return decode_payload(self.raw)

    @property
    def data(self) -> bytes:
        """The payload as it was published: JSON in UTF-8."""
        return bytes(self.raw)


class MissingMessages(Struct, frozen=True, rename={"first": "from", "last": "to"}):
    """Messages with a seq from `first` to `last` may be missing.

    `reason`: "retention", "repair", or "epoch" if the log has another epoch; then `first` is above `last` if none is.
    """

    first: int
    last: int
    reason: str


class HttpPage(Struct, frozen=True):
    """A page of messages, oldest first.

    `cursor` is the position after the page, for `since`; `more` says whether there are further messages in the
    direction of the page; `gap` is set if messages may be missing before it.
    """

    messages: Sequence[HttpMessage]
    cursor: str
    more: bool = False
    gap: MissingMessages | None = None


async def read_page(
    requester: Requester,
    patterns: Sequence[str],
    since: str | None,
    limit: int,
    *,
    wait: int = 0,
    before: int | None = None,
) -> HttpPage:
    """Read one page, as `HttpClient.page` does. Raises `TryAgain` and `Refused`."""
    given: dict[str, object] = {"pattern": list(patterns), "since": since, "before": before, "limit": limit}
    parameters = {name: value for name, value in given.items() if value is not None}
    if wait:
        parameters["wait"] = wait
    answer = await requester.request("GET", "/messages", params=parameters, timeout=REQUEST_TIMEOUT + wait)
    if answer.status != 200:
        raise failure_of(answer)
    try:
        page = msgspec.json.decode(answer.body, type=HttpPage)
    except UNDECODABLE:
        raise TryAgain("the response is not one of a broker") from None
    epoch = page.cursor.partition(".")[2]
    messages = [msgspec.structs.replace(each, cursor=f"{each.seq}.{epoch}") for each in page.messages]
    return msgspec.structs.replace(page, messages=messages)


class CloseEvent(Struct):
    """The data of the event `close`."""

    code: int
    reason: str = ""


class MessageStream(AsyncIterator[HttpMessage]):
    """Messages in the order of their seqs. Iterate over it inside its `async with` block.

    When a connection is lost, the iteration continues at `cursor`: no message is missing, and none is repeated, except
    ephemeral ones. It raises `Refused` if the broker rejects the request for good or withdraws the permission, and
    `Unavailable` after `patience` seconds without a response. Cancelling it loses no message.
    """

    def __init__(self, requester: Requester, cursor: str | None, patience: float) -> None:
        self._requester = requester
        self._retries = Retries(patience)
        self._waiting: deque[HttpMessage] = deque()
        self._failure: TryAgain | Refused | None = None
        """What comes after the messages that wait."""
        self.cursor = cursor
        """The position up to which it is complete, as text for `since`; None before the first response.

        It includes the last message that the iteration returned. Store it after that message has been processed.
        """
        self.gaps: list[MissingMessages] = []
        """The messages that may be missing, oldest first."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection. The iteration may continue afterwards, on a new one."""

    async def __anext__(self) -> HttpMessage:
        while not self._waiting:
            failure, self._failure = self._failure, None
            if isinstance(failure, Refused):
                raise failure
            if failure is not None:
                await self._retries.pause(failure)
            try:
                if not await self._fetch() and not self._waiting:
                    raise StopAsyncIteration
            except TryAgain as error:
                self._failure = error
        message = self._waiting.popleft()
        self.cursor = message.cursor or self.cursor
        return message

    @abstractmethod
    async def _fetch(self) -> bool:
        """Receive what comes next, and return whether there may be more. Raises `TryAgain`."""


class PagesStream(MessageStream):
    """Reads one page after the other."""

    def __init__(
        self, requester: Requester, patterns: Sequence[str], cursor: str | None, limit: int, wait: int, patience: float
    ) -> None:
        super().__init__(requester, cursor, patience)
        self._patterns = patterns
        self._limit = limit
        self._wait = wait
        self._end = cursor
        """The position after the last page."""

    async def _fetch(self) -> bool:
        # The messages of the last page have been returned. It is complete beyond the last of them.
        self.cursor = self._end
        page = await read_page(self._requester, self._patterns, self._end, self._limit, wait=self._wait)
        self._retries.succeeded()
        self._end = page.cursor
        if page.gap is not None:
            self.gaps.append(page.gap)
        self._waiting.extend(page.messages)
        if self._wait and not page.messages and not page.more:
            await anyio.sleep(EMPTY_PAUSE)
        return page.more or bool(self._wait)


class EventsStream(MessageStream):
    """Reads an event stream, and opens the next one at the cursor when it ends."""

    def __init__(self, requester: Requester, patterns: Sequence[str], cursor: str | None, patience: float) -> None:
        super().__init__(requester, cursor, patience)
        self._patterns = patterns
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None
        self._parser = EventStreamParser()

    async def aclose(self) -> None:
        response, chunks = self._response, self._chunks
        self._response = self._chunks = None
        if response is not None:
            await close_response(response, chunks)

    async def _fetch(self) -> bool:
        self._move_cursor()
        try:
            if self._chunks is None:
                await self._open()
            assert self._chunks is not None
            chunk = await anext(self._chunks, b"")
            if not chunk:
                raise TryAgain("the stream has ended", pause=self._retry)
            for event in self._parser.feed(chunk):
                self._take(event)
            if not self._waiting:
                self._move_cursor()
        except httpx.TransportError as error:
            await self.aclose()
            self._failure = TryAgain(f"the stream broke off: {describe(error)}", pause=self._retry)
        except EventTooLarge as error:
            await self.aclose()
            self._failure = Refused(ErrorCode.TOO_LARGE, str(error))
        except (TryAgain, Refused) as error:
            await self.aclose()
            self._failure = error
        except BaseException:
            # The reading was cancelled, which ends the response: the next stream begins at the cursor.
            await self.aclose()
            raise
        return True

    def _move_cursor(self) -> None:
        """Move past messages that do not match: a block with an id alone is no event."""
        self.cursor = self._parser.last_id or self.cursor

    @property
    def _retry(self) -> float:
        return 0.0 if self._parser.retry is None else self._parser.retry / 1000

    async def _open(self) -> None:
        parser, self._parser = self._parser, EventStreamParser()
        self._parser.retry = parser.retry
        headers = {} if self.cursor is None else {"Last-Event-ID": self.cursor}
        options: dict[str, Any] = {"params": {"pattern": self._patterns}, "timeout": SILENCE_TIMEOUT}
        self._response = await self._requester.send("GET", "/events", headers=headers, **options)
        if self._response.status_code != 200:
            raise failure_of(await read_body(self._response))
        self._chunks = self._response.aiter_bytes()

    def _take(self, event: ServerSentEvent) -> None:
        try:
            match event.name:
                case "message":
                    message = msgspec.json.decode(event.data, type=HttpMessage)
                    cursor = None if message.seq is None else event.id
                    self._waiting.append(msgspec.structs.replace(message, cursor=cursor))
                    self._retries.succeeded()
                case "gap":
                    self.gaps.append(msgspec.json.decode(event.data, type=MissingMessages))
                case "live":
                    self._retries.succeeded()
                case "revoked":
                    raise Refused(ErrorCode.REVOKED, "the permission was withdrawn")
                case "close":
                    self._take_close(msgspec.json.decode(event.data, type=CloseEvent))
        except UNDECODABLE as error:
            raise TryAgain(f"an event that is not of this protocol: {error}", pause=self._retry) from None

    def _take_close(self, close: CloseEvent) -> None:
        if 4000 <= close.code <= 4399:
            raise Refused(ErrorCode.UNAUTHENTICATED, close.reason)
