"""A host's addresses, and which of them answers first."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import anyio

from ..errors import Disconnected
from .transport_interface import Transport

HEAD_START = 0.25
"""How long, in seconds, one address has before the next is tried beside it (RFC 8305)."""

MEMORY = 600.0
"""Seconds for which the way that was open first is tried first."""

T = TypeVar("T")

Dial = Callable[[], Awaitable[Transport]]


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


class Ways:
    """Several ways to a broker: the one that was open first the last time is tried first, for a while."""

    def __init__(self, dials: Sequence[Dial]) -> None:
        self._dials = list(dials)
        self._winner: Dial | None = None
        self._until = 0.0

    async def __call__(self) -> Transport:
        """The transport that is there first. Raises `Disconnected`. Cancelling it leaves nothing open."""
        known = self._winner is not None and anyio.current_time() < self._until
        order = sorted(self._dials, key=lambda dial: known and dial is not self._winner)
        won: dict[int, Dial] = {}

        async def go(dial: Dial) -> Transport:
            transport = await dial()
            won[id(transport)] = dial
            return transport

        transport = await open_either([partial(go, dial) for dial in order])
        self._winner, self._until = won[id(transport)], anyio.current_time() + MEMORY
        return transport


async def open_either(dials: Sequence[Dial]) -> Transport:
    """The transport that is there first; the next is tried when the one before has failed or takes long.

    Raises the `Disconnected` that says most. Cancelling it leaves nothing open.
    """
    losers: list[Transport] = []
    try:
        return await race(dials, losers.append)
    finally:
        for loser in losers:
            with anyio.CancelScope() as at_once:
                at_once.cancel()
                await loser.aclose()
