"""A host's addresses, and which of them answers first."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import anyio

from ..errors import Disconnected

HEAD_START = 0.25
"""How long, in seconds, one address has before the next is tried beside it (RFC 8305)."""

T = TypeVar("T")


def names_of(host: str) -> tuple[str, ...]:
    """What to look up for a host: both addresses of this machine where it is meant.

    Whatever the system says (RFC 6761, section 6.3): it may know one address, and the broker listen on the other.
    """
    return ("::1", "127.0.0.1") if host == "localhost" or host.endswith(".localhost") else (host,)


async def look_up(host: str, port: int) -> list[tuple[int, Any]]:
    """Families and addresses for UDP: IPv6 first, then one of each in turn. Raises `OSError`."""
    if len(names_of(host)) > 1:
        return [(socket.AF_INET6, ("::1", port)), (socket.AF_INET, ("127.0.0.1", port))]
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    families: tuple[list[Any], list[Any]] = ([], [])
    for family, _, _, _, where in found:
        families[family != socket.AF_INET6].append((family, where))
    return [place for turn in zip_longest(*families) for place in turn if place is not None]


async def race(attempts: Sequence[Callable[[], Awaitable[T]]], abandon: Callable[[T], None]) -> T:
    """Start one after another, the next when the last has failed or takes long. The first to succeed is the result.

    Others that succeed too are abandoned, and all when it is cancelled. Raises the `Disconnected` that says most.
    """
    winners: list[T] = []
    failures: list[Disconnected] = []

    async def run(attempt: Callable[[], Awaitable[T]], failed: anyio.Event) -> None:
        try:
            winners.append(await attempt())
        except Disconnected as error:
            failures.append(error)
            failed.set()
        else:
            tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            for attempt in attempts:
                failed = anyio.Event()
                tasks.start_soon(run, attempt, failed)
                with anyio.move_on_after(HEAD_START):
                    await failed.wait()
    except BaseException:
        for one in winners:
            abandon(one)
        raise
    for one in winners[1:]:
        abandon(one)
    if winners:
        return winners[0]
    # What somebody answered says more than that nobody did.
    raise next((error for error in failures if not isinstance(error.__cause__, OSError)), failures[0])
