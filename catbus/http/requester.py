"""Requests to a broker over HTTP: the token, the errors, and the pauses between tries."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import httpx
import msgspec
from msgspec import Struct

from ..error_codes import RETRYABLE, ErrorCode
from ..errors import ConflictError, Refused, Unavailable
from ..protocol.wire_messages import UNDECODABLE

REQUEST_TIMEOUT = 10.0
"""Seconds for the response to one request, besides the time that it may wait for new messages."""

FIRST_PAUSE = 0.2
"""The first pause between two tries, in seconds. Each later one is twice as long; all are shortened at random."""

MAX_PAUSE = 30.0
"""The longest pause between two tries, in seconds, unless the broker asks for a longer one."""

MAX_RETRY_AFTER = 300.0
"""The longest pause that the broker can ask for, in seconds."""

MAX_RESPONSE_SIZE = 64 << 20
"""Bytes of a response, other than an event stream."""

TEMPORARY = RETRYABLE - {ErrorCode.INTERNAL}
"""The error codes after which a request is sent again."""

_NOT_SENT = httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout

TokenFunction = Callable[[], Awaitable[str]]


class TryAgain(Exception):
    """A request failed, and a retry can help.

    `code` is that of the broker, or None if the broker has not answered. `pause`: seconds to wait at least. `sent`:
    whether the broker may have received the request.
    """

    def __init__(self, text: str, *, code: ErrorCode | None = None, pause: float = 0.0, sent: bool = True) -> None:
        super().__init__(text)
        self.text = text
        self.code = code
        self.pause = pause
        self.outcome_unknown = sent and code in (None, ErrorCode.UNKNOWN)

    def error(self) -> Refused | Unavailable:
        """Return the error for the caller."""
        return Unavailable(self.text) if self.code is None else Refused(self.code, self.text, self.pause or None)


class Answer(Struct):
    """A response whose body has been read."""

    status: int
    body: bytes
    retry_after: float


class PublishResult(Struct):
    """The result of one publish. `seq` is that of the message, or with `conflict` that of the retained message."""

    seq: int | None = None
    error: str | None = None
    code: str | None = None


class Retries:
    """The pauses between the tries of one request or stream, for `patience` seconds in all."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.succeeded()

    def succeeded(self) -> None:
        """Begin anew."""
        self._failures = 0
        self._since = time.monotonic()

    def left(self, most: float) -> float:
        """Return the seconds that are left, at most `most`."""
        return max(0.1, min(most, self._patience - (time.monotonic() - self._since)))

    async def pause(self, failure: TryAgain) -> None:
        """Wait before the next try. Raises the failure's error if there is no time for another one."""
        self._failures += 1
        pause = min(MAX_PAUSE, FIRST_PAUSE * 2.0 ** min(self._failures - 1, 16)) * random.uniform(0.5, 1)  # noqa: S311 (no secret)
        pause = max(pause, min(failure.pause, MAX_RETRY_AFTER))
        if time.monotonic() - self._since + pause > self._patience:
            raise failure.error() from None
        await anyio.sleep(pause)


class _RequestBody(httpx.AsyncByteStream):
    """The body of a request. httpx's own is a generator, which Trio complains about if it is not read to its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Once(self._data)


class _Once(AsyncIterator[bytes]):
    def __init__(self, data: bytes) -> None:
        self._left = [data] if data else []

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


class Requester:
    """Sends requests to the broker at a URL. `HttpClient` documents the arguments."""

    def __init__(self, url: str, token: str | TokenFunction, http: httpx.AsyncClient | None) -> None:
        self._url = url.rstrip("/")
        self._fetch_token = token if callable(token) else None
        self._token = None if callable(token) else token
        self._owned = http is None
        self._http = http or httpx.AsyncClient()

    async def aclose(self) -> None:
        """Close the connections, unless they are the caller's."""
        if self._owned:
            await self._http.aclose()

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        """Send a request and read its response. Raises `TryAgain`."""
        response = await self.send(method, path, **options)
        try:
            return await read_body(response)
        finally:
            await close_response(response)

    async def send(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        timeout: float = REQUEST_TIMEOUT,
        content: bytes = b"",
        **options: Any,
    ) -> httpx.Response:
        """Send a request and return its response, whose body is not read yet. Raises `TryAgain`."""
        renewed = self._token is None
        while True:
            if self._token is None:
                assert self._fetch_token is not None
                self._token = await self._fetch_token()
            fields = {"Authorization": f"Bearer {self._token}", **(headers or {})}
            request = self._http.build_request(
                method, self._url + path, headers=fields, timeout=httpx.Timeout(timeout), content=content, **options
            )
            request.stream = _RequestBody(content)
            try:
                response = await self._http.send(request, stream=True)
            except _NOT_SENT as error:
                raise TryAgain(f"the broker is unreachable: {describe(error)}", sent=False) from None
            except httpx.TransportError as error:
                raise TryAgain(f"no response: {describe(error)}") from None
            if response.status_code != 401 or self._fetch_token is None or renewed:
                return response
            await close_response(response)
            self._token, renewed = None, True


async def read_body(response: httpx.Response) -> Answer:
    """Read the body of a response. Raises `TryAgain`."""
    body = bytearray()
    try:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_RESPONSE_SIZE:
                raise TryAgain(f"the response has more than {MAX_RESPONSE_SIZE} bytes")
    except httpx.TransportError as error:
        raise TryAgain(f"the response broke off: {describe(error)}") from None
    after = response.headers.get("Retry-After", "")
    return Answer(response.status_code, bytes(body), float(after[:9]) if after.isascii() and after.isdigit() else 0.0)


async def close_response(response: httpx.Response, chunks: AsyncIterator[bytes] | None = None) -> None:
    """Close a response, whose body may be partly read by an iteration over `chunks`."""
    with anyio.CancelScope(shield=True):
        # The iteration is one generator within another, and closing the outermost leaves the others suspended. On a
        # closed socket the next read fails, which ends all of them.
        socket = None if response.http_version == "HTTP/2" else response.extensions.get("network_stream")
        if chunks is not None and socket is not None:
            await socket.aclose()
            with suppress(httpx.TransportError, httpx.StreamError):
                async for _ in chunks:
                    pass
        await response.aclose()


def failure_of(answer: Answer) -> TryAgain | Refused:
    """Return the error of a response that is one."""
    try:
        found = msgspec.json.decode(answer.body, type=PublishResult)
    except UNDECODABLE:
        found = PublishResult()
    text = found.error or f"HTTP status {answer.status}"
    if found.code is None and answer.status in (429, 500, 502, 503, 504):
        return TryAgain(text, pause=answer.retry_after)  # It is a proxy's.
    code = error_code(found.code)
    if code in TEMPORARY:
        return TryAgain(text, code=code, pause=answer.retry_after)
    if code is ErrorCode.CONFLICT and found.seq is not None:
        return ConflictError(text, found.seq)
    return Refused(code, text)


def error_code(code: str | None) -> ErrorCode:
    return ErrorCode(code) if code in list(ErrorCode) else ErrorCode.INTERNAL


def describe(error: Exception) -> str:
    return str(error) or type(error).__name__
