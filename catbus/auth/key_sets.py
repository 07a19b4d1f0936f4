"""Key sets of issuers (JWKS, RFC 7517, section 5): they are fetched by URL, and again when they may have changed."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import httpx
import trio

from ..errors import Unavailable
from ..observability.loggers import RateLimitedLog, get_logger
from .jwt_keys import USABLE_KEYS, JwtKey, KeySetStatistics, from_jwks

logger = get_logger("catbus.auth")

FETCH_TIMEOUT = 5.0
"""Seconds after which a fetch fails."""

MAX_KEY_SET = 256 << 10
"""Bytes that a key set may have."""

REFRESH_INTERVAL = 3600.0
"""Seconds between two fetches."""

RETRY_INTERVAL = 10.0
"""Seconds between two fetches that tokens with an unknown key cause, and before the fetch that follows a failed one."""

_HEADERS = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}


async def fetch_key_set(url: str, context: ssl.SSLContext) -> list[JwtKey]:
    """Fetch the usable keys of a key set. Raises `Unavailable` if that fails, or if there are none.

    Redirects are not followed. Proxies and credentials of the environment are not used, and no cookie is kept.
    """
    body = bytearray()
    status: int | None = None
    options: dict[str, Any] = {"verify": context, "trust_env": False, "follow_redirects": False, "timeout": None}
    try:
        with trio.move_on_after(FETCH_TIMEOUT) as scope:
            async with (
                httpx.AsyncClient(**options) as client,
                client.stream("GET", url, headers=_HEADERS) as response,
            ):
                # Not decompressed: a few bytes could become gigabytes.
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > MAX_KEY_SET:
                        # Leaving the loop would leave the client's generators open.
                        scope.cancel()
                status = response.status_code
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise Unavailable(_find_reason(error)) from error
    if len(body) > MAX_KEY_SET:
        raise Unavailable(f"the key set has more than {MAX_KEY_SET} bytes")
    if status is None:
        raise Unavailable(f"no response within {FETCH_TIMEOUT:g} s")
    if status != 200:
        raise Unavailable(f"the status of the response is {status}")
    keys = list(from_jwks(body.decode(errors="replace")))
    if not keys:
        raise Unavailable(f"the response is not a key set with a public key, {USABLE_KEYS}")
    return keys


def _find_reason(error: BaseException) -> str:
    """The text of the exception that caused this one: the client's own has often none."""
    cause = error
    while (earlier := cause.__cause__ or cause.__context__) is not None:
        cause = earlier
    return f"{type(error).__name__}: {cause}"


@dataclass(slots=True)
class _FetchRound:
    """One fetch of all key sets."""

    done: trio.Event = field(default_factory=trio.Event)
    complete: bool = False


class KeySetFetcher:
    """Fetches key sets, and passes the keys of all of them to `use`. While one cannot be fetched, its last keys stay.

    A key that its issuer has removed is used until the next fetch: for an hour at most while the issuer is reachable.
    """

    def __init__(self, urls: Sequence[str], use: Callable[[Sequence[JwtKey]], None]) -> None:
        self._keys: dict[str, list[JwtKey]] = {url: [] for url in urls}
        self._fetched = dict.fromkeys(urls, trio.current_time())
        """The Trio time of the last successful fetch of each, or of the start."""
        self._use = use
        self._context = ssl.create_default_context()
        self._fetches = self._failures = 0
        self._present, self._next = _FetchRound(), _FetchRound()
        """The round that began last, and the one that has not begun yet."""
        self._present.done.set()
        self._asked = trio.Event()
        self._problems = RateLimitedLog(logger.warning)

    def statistics(self) -> KeySetStatistics:
        age = trio.current_time() - min(self._fetched.values())
        return KeySetStatistics(self._fetches, self._failures, age)

    async def finish(self) -> bool:
        await self._present.done.wait()
        return False

    async def refresh(self) -> bool:
        this = self._next
        self._asked.set()
        await this.done.wait()
        return this.complete

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch until cancelled. It has started when every key set was fetched once, or could not be fetched."""
        complete = await self._fetch_all()
        task_status.started()
        asked = -inf
        while True:
            with trio.move_on_after(REFRESH_INTERVAL if complete else RETRY_INTERVAL):
                await self._asked.wait()
                await trio.sleep_until(asked + RETRY_INTERVAL)
            if self._asked.is_set():
                asked = trio.current_time()
            complete = await self._fetch_all()

    async def _fetch_all(self) -> bool:
        this = self._present = self._next
        self._next = _FetchRound()
        self._asked = trio.Event()
        failed: list[str] = []
        async with trio.open_nursery() as nursery:
            for url in self._keys:
                nursery.start_soon(self._fetch, url, failed)
        self._use([key for keys in self._keys.values() for key in keys])
        this.complete = not failed
        this.done.set()
        return this.complete

    async def _fetch(self, url: str, failed: list[str]) -> None:
        self._fetches += 1
        try:
            keys = await fetch_key_set(url, self._context)
        except Unavailable as error:
            self._failures += 1
            failed.append(url)
            place, _, _ = url.partition("?")
            self._problems.log(
                trio.current_time(),
                "the keys of an issuer cannot be fetched",
                kind=f"{place} {error}",
                url=place,
                error=str(error),
                keys=len(self._keys[url]),
            )
        else:
            self._keys[url] = keys
            self._fetched[url] = trio.current_time()
