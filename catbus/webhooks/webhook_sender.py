"""Sends the requests of deliveries. It connects only to addresses that were checked after their names were resolved.

This uses httpcore, the transport of httpx, because httpx has no public way to choose the address of a connection. No
proxy, credential or cookie of the environment is used, and no redirect is followed.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from functools import partial
from typing import Any

import httpcore
import trio

from .public_addresses import AddressRules
from .signed_request import SignedRequest
from .verdicts import AttemptResult, Outcome, read_response

CLOSE_TIMEOUT = 1.0
"""Seconds for closing a connection in order: a receiver that does not read holds nothing up."""
MAX_BODY = 64 << 10
"""Bytes of the body of a response that are read, so that the connection can be used again. They are thrown away."""
BODY_TIMEOUT = 1.0
"""Seconds for that."""
IDLE_TIME = 2.0
"""Seconds for which an idle connection is kept. Many servers close theirs after 5 s."""
ADDRESS_TIMEOUT = 5.0
"""Seconds for one address of a receiver that has several."""
MAX_ADDRESSES = 4
"""Addresses of a receiver that are tried."""
MAX_LOOKUPS = 32
"""Names that are looked up at the same time. A look-up is a thread, which cannot be stopped."""
MAX_TEXT = 200
"""Characters of the description of an error."""

_ERRORS = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
    OSError,
)


class WebhookSender:
    """Sends requests, at most `connections` at the same time, to addresses that `rules` permit."""

    def __init__(self, rules: AddressRules, connections: int) -> None:
        lookups = trio.CapacityLimiter(MAX_LOOKUPS)
        context = ssl.create_default_context()
        self._pools = {
            scheme: httpcore.AsyncConnectionPool(
                ssl_context=context,
                max_connections=connections,
                max_keepalive_connections=connections,
                keepalive_expiry=IDLE_TIME,
                network_backend=_CheckedConnections(rules, lookups, encrypted=scheme == "https"),
            )
            for scheme in ("https", "http")
        }

    async def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            await pool.aclose()

    async def send(self, request: SignedRequest, now: float, timeout: float) -> AttemptResult:
        """Send a request, and return what came of it within `timeout` seconds. `now` is in seconds since 1970.

        It raises nothing for what a receiver does. Cancellation closes the connection.
        """
        pool = self._pools[request.url.partition(":")[0]]
        headers = [*request.headers(now).items()]
        result = None
        with trio.move_on_after(timeout):
            try:
                async with pool.stream("POST", request.url, headers=headers, content=request.body) as response:
                    found = {
                        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers
                    }
                    result = read_response(response.status, found, now)
                    await _read_body(response)
            except _ERRORS as error:
                # Errors after the head of the response change nothing.
                return result or AttemptResult(Outcome.UNREACHABLE, _describe(error))
        return result or AttemptResult(Outcome.TIMEOUT, f"no response within {timeout:g} s")


async def _read_body(response: httpcore.Response) -> None:
    """Read a short body. If there is more, or if it takes longer, the connection is closed instead of used again."""
    read = 0
    with trio.move_on_after(BODY_TIMEOUT) as scope:
        async for part in response.aiter_stream():
            read += len(part)
            if read > MAX_BODY:
                # Leaving the loop would leave the generators of httpcore open.
                scope.cancel()


class _Stream(httpcore.AsyncNetworkStream):
    """A connection that is closed within a bound: httpcore shields that from cancellation, and TLS sends at the end."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        with trio.move_on_after(CLOSE_TIMEOUT):
            await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _CheckedConnections(httpcore.AsyncNetworkBackend):
    """Connects to a host by those of its addresses that are permitted. httpcore adds TLS, with the name of the host."""

    def __init__(self, rules: AddressRules, lookups: trio.CapacityLimiter, *, encrypted: bool) -> None:
        self._rules = rules
        self._lookups = lookups
        self._encrypted = encrypted
        self._tcp = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._look_up(host, port)
        permitted = [address for address in addresses if self._rules.permits(address, encrypted=self._encrypted)]
        if not permitted:
            how = "" if self._encrypted else "without TLS "
            raise httpcore.ConnectError(f"connecting {how}to {addresses[0]} is not allowed ([webhooks] allow)")
        *others, last = permitted[:MAX_ADDRESSES]
        for address in others:
            try:
                return _Stream(await self._tcp.connect_tcp(address, port, ADDRESS_TIMEOUT))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                pass
        return _Stream(await self._tcp.connect_tcp(last, port, timeout))

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def _look_up(self, host: str, port: int) -> list[str]:
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = await trio.to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=self._lookups)
        except (OSError, UnicodeError, OverflowError) as error:
            raise httpcore.ConnectError(f"the name {host} cannot be resolved: {error}") from None
        return list(dict.fromkeys(str(place[0]) for *_, place in found))


def _describe(error: BaseException) -> str:
    # Some of httpcore's exceptions have no text, and one that caused them has.
    while not str(error) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = f"{type(error).__name__}: {error}"
    return "".join(each if each.isprintable() else "?" for each in text)[:MAX_TEXT]
