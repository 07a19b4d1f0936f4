"""The client: publishing with idempotency keys, pages, and streams of messages."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from math import inf
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import msgspec
from msgspec import Raw

from ..error_codes import ErrorCode
from ..errors import ConflictError, PeerError, Refused
from ..protocol.channels import check_channel, check_pattern
from ..protocol.wire_messages import UNDECODABLE, check_payload, to_json
from .message_streams import EventsStream, HttpPage, MessageStream, PagesStream, read_page
from .requester import (
    REQUEST_TIMEOUT,
    TEMPORARY,
    Answer,
    PublishResult,
    Requester,
    Retries,
    TokenFunction,
    TryAgain,
    error_code,
    failure_of,
)

_POSITION = re.compile(r"\d{1,19}(\.[!-~]{1,255})?", re.ASCII)


class HttpClient:
    """A client of the broker at `url`, such as `https://bus.example.com`. Close it, or use it in `async with`.

    `token` is a token, or an async function that returns one; it is called before the first request, and when the
    broker says that the token has expired. `http` is an `httpx.AsyncClient` with settings of your own, such as a proxy
    or certificates; it is not closed.

    Any number of tasks of one event loop may use it. Raises `ValueError` for another kind of URL.
    """

    def __init__(self, url: str, *, token: str | TokenFunction, http: httpx.AsyncClient | None = None) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError("url: one that begins with https:// or http://")
        self._requester = Requester(url, token, http)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close its connections."""
        await self._requester.aclose()

    # Publishing

    async def publish(
        self,
        channel: str,
        payload: Any,
        *,
        ephemeral: bool = False,
        retain: bool = False,
        expect: int | None = None,
        key: str | None = None,
        patience: float = 30.0,
    ) -> int | None:
        """Publish a JSON value and return its seq once it is committed (None for an ephemeral message).

        With `retain` it becomes the retained message of the channel; a payload None removes that. With `expect` too it
        is published only if that is the seq of the channel's retained message, or if there is none and `expect` is 0.
        Otherwise `ConflictError` is raised, a `Refused` whose `seq` is the present one.

        Without a response it is sent again for up to `patience` seconds, with an `Idempotency-Key`, so that it is
        published once. An ephemeral message is sent again only if it was certainly not received. With a `key` of yours
        (at most 255 characters of ASCII), you may also call this again, with the same arguments.

        Raises `Refused`: it is not published, unless the code is `unknown`. Raises `Unavailable` if there was no
        response: then it may be published, and so it may after a cancellation. Raises `TypeError` for a payload that
        has no JSON form, and `ValueError` for arguments that exclude each other.
        """
        item = _make_item(channel, payload)
        if ephemeral:
            item["ephemeral"] = True
        if retain:
            item["retain"] = True
        if expect is not None:
            item["expect"] = expect
        if (ephemeral and retain) or (expect is not None and not retain):
            raise ValueError("retain excludes ephemeral, and expect needs retain")
        [result] = await self._publish(to_json(item), key, patience, repeatable=not ephemeral, expect=expect)
        if isinstance(result, Refused):
            raise result
        return result

    async def publish_many(
        self,
        messages: Iterable[tuple[str, Any]],
        *,
        retain: bool = False,
        key: str | None = None,
        patience: float = 30.0,
    ) -> list[int | Refused]:
        """Publish pairs of a channel and a payload, in order, in one request.

        With `retain` each becomes the retained message of its channel; of several for one channel, the last one stays.
        Returns for each its seq, or a `Refused`: the others are published all the same. Otherwise as `publish`.
        """
        items = [_make_item(channel, payload) for channel, payload in messages]
        if retain:
            items = [{**item, "retain": True} for item in items]
        if not items:
            return []
        results = await self._publish(to_json(items), key, patience, repeatable=True)
        return [Refused(ErrorCode.INTERNAL, "no seq") if result is None else result for result in results]

    async def _publish(
        self, body: bytes, key: str | None, patience: float, *, repeatable: bool, expect: int | None = None
    ) -> list[int | Refused | None]:
        if key is not None and not (key.isascii() and key.isprintable() and 0 < len(key) <= 255):
            raise ValueError("key: 1 to 255 printable characters of ASCII")
        headers = {"Content-Type": "application/json"}
        if repeatable:
            headers["Idempotency-Key"] = key or secrets.token_urlsafe(24)
        retries, unknown = Retries(patience), False
        results: list[int | Refused | None] = []
        while True:
            try:
                answer = await self._requester.request(
                    "POST", "/publish", headers=headers, content=body, timeout=retries.left(REQUEST_TIMEOUT)
                )
                results = _read_results(answer)
                failure = _temporary_failure(results, answer)
                if failure is None:
                    break
            except TryAgain as error:
                failure = error
            except Refused as error:
                # The broker looks for the first try, and a seq that is not there never comes again: with an expected
                # one no try can succeed later.
                decided = isinstance(error, ConflictError) and expect
                raise (_unknown(error) if unknown and not decided else error) from None
            unknown = unknown or failure.outcome_unknown
            try:
                if unknown and not repeatable:
                    raise failure.error()
                await retries.pause(failure)
            except Refused as error:
                if results:
                    break
                raise (_unknown(error) if unknown else error) from None
        # A retry that is rejected says nothing of its first try.
        return [_unknown(each) if unknown and isinstance(each, Refused) else each for each in results]

    # Reading

    async def page(
        self,
        patterns: str | Sequence[str],
        *,
        since: int | str | None = None,
        before: int | None = None,
        limit: int = 100,
        wait: int = 0,
    ) -> HttpPage:
        """Read one page of up to `limit` (1 to 1,000) messages that match.

        With `since` (a cursor, or a seq) it has the messages after that position, and without it the newest ones, below
        the seq `before`. With `wait` (up to 30 s) the broker answers when there is a message; without `since`, that is
        the next one. The page may be empty even so. May be cancelled.

        Raises `Refused`, and `Unavailable` without a response; a retry can help. Raises `ValueError` for arguments that
        exclude each other.
        """
        if before is not None and (since is not None or wait):
            raise ValueError("before: it excludes since and wait")
        try:
            return await read_page(
                self._requester, _check_patterns(patterns), _position(since), limit, wait=wait, before=before
            )
        except TryAgain as failure:
            raise failure.error() from None

    def messages(
        self,
        patterns: str | Sequence[str],
        *,
        since: int | str = 0,
        limit: int = 100,
        wait: int = 30,
        patience: float = inf,
    ) -> MessageStream:
        """Iterate over the messages after a position, in pages of `limit`, and then over new ones, by long polling.

            async with client.messages("orders.*", since=cursor) as messages:
                async for message in messages: ...

        `since` is a cursor or a seq; 0 begins with the oldest message. Each request waits for up to `wait` seconds.
        Without `wait`, the iteration ends at the end of the log.
        """
        return PagesStream(self._requester, _check_patterns(patterns), _position(since), limit, wait, patience)

    def events(
        self, patterns: str | Sequence[str], *, since: int | str | None = None, patience: float = inf
    ) -> MessageStream:
        """Iterate over the messages of one event stream, which may have several patterns.

            async with client.events(["orders.*", "stock"], since=cursor) as messages:
                async for message in messages: ...

        It begins after `since` (a cursor, or a seq), or with new messages. A message that matches several of the
        patterns comes once. Reading pauses while your code does not ask for more.
        """
        return EventsStream(self._requester, _check_patterns(patterns), _position(since), patience)


def _make_item(channel: str, payload: Any) -> dict[str, Any]:
    try:
        data = bytes(payload) if isinstance(payload, Raw) else to_json(payload)
        return {"channel": _check(channel, check_channel), "payload": Raw(check_payload(data))}
    except (ValueError, OverflowError, RecursionError, PeerError) as error:
        raise TypeError(f"the payload has no JSON form: {error}") from error


def _check(name: str, check: Callable[[str], None]) -> str:
    """Check a channel or a pattern. Raises `Refused` with the code that the broker would use."""
    try:
        check(name)
    except PeerError as error:
        raise Refused(error.code, error.message) from None
    return name


def _check_patterns(patterns: str | Sequence[str]) -> list[str]:
    names = [patterns] if isinstance(patterns, str) else list(patterns)
    if not names:
        raise ValueError("patterns: at least one")
    return [_check(name, check_pattern) for name in names]


def _position(since: int | str | None) -> str | None:
    if since is None:
        return None
    text = str(since)
    if not _POSITION.fullmatch(text):
        raise ValueError(f"since: a seq or a cursor, not {text[:64]!a}")
    return text


def _read_results(answer: Answer) -> list[int | Refused | None]:
    """Return the results of a `POST /publish`. Raises `TryAgain` and `Refused` if it failed as a whole."""
    try:
        if answer.body.startswith(b"["):
            results = msgspec.json.decode(answer.body, type=list[PublishResult])
        elif answer.status == 200:
            results = [msgspec.json.decode(answer.body, type=PublishResult)]
        else:
            raise failure_of(answer)
    except UNDECODABLE:
        raise TryAgain("the response is not one of a broker") from None
    return [
        each.seq if each.code is None else Refused(error_code(each.code), each.error or each.code) for each in results
    ]


def _temporary_failure(results: Sequence[int | Refused | None], answer: Answer) -> TryAgain | None:
    """Return the first failure among the results after which a retry can help."""
    for each in results:
        if isinstance(each, Refused) and each.code in TEMPORARY:
            return TryAgain(each.message, code=each.code, pause=answer.retry_after)
    return None


def _unknown(error: Refused) -> Refused:
    """Return the error of a retry that was rejected: its first try may have been published."""
    return Refused(ErrorCode.UNKNOWN, error.message, error.retry_after)
