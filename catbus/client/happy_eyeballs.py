"""Happy Eyeballs (RFC 8305): a race between the addresses of a host, and between the transports of a broker."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import anyio

from ..errors import Disconnected
from .transport_interface import Transport

CONNECTION_ATTEMPT_DELAY = 0.25
"""Seconds before the next attempt starts beside one that has not ended (RFC 8305, section 5)."""

PREFERENCE_TIME = 600.0
"""Seconds for which the winner of a race has the first attempt in the next ones."""

T = TypeVar("T")

Dial = Callable[[], Awaitable[Transport]]


def names_to_resolve(host: str) -> tuple[str, ...]:
    """Return the names to resolve for a host: for `localhost` both loopback addresses (RFC 6761, section 6.3).

    The resolver of the system may know one of them while the broker listens on the other.
    """
    return ("::1", "127.0.0.1") if host == "localhost" or host.endswith(".localhost") else (host,)


async def resolve_host(host: str, port: int) -> list[tuple[int, Any]]:
    """Return address families and addresses for UDP, alternating and beginning with IPv6. Raises `OSError`."""
    if len(names_to_resolve(host)) > 1:
        return [(socket.AF_INET6, ("::1", port)), (socket.AF_INET, ("127.0.0.1", port))]
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    families: tuple[list[Any], list[Any]] = ([], [])
    for family, _, _, _, where in found:
        families[family != socket.AF_INET6].append((family, where))
    return [address for pair in zip_longest(*families) for address in pair if address is not None]


async def race(attempts: Sequence[Callable[[], Awaitable[T]]], abandon: Callable[[T], None]) -> T:
    """Start attempts one after another, each when the one before has failed or is slow. Return the first success.

    `abandon` is called with any other success, and with all of them on cancellation. If every attempt fails, the most
    informative `Disconnected` is raised.
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
                with anyio.move_on_after(CONNECTION_ATTEMPT_DELAY):
                    await failed.wait()
    except BaseException:
        for winner in winners:
            abandon(winner)
        raise
    for winner in winners[1:]:
        abandon(winner)
    if winners:
        return winners[0]
    # An error from a broker says more than an error of the network.
    raise next((error for error in failures if not isinstance(error.__cause__, OSError)), failures[0])


class TransportRace:
    """A race between several transports. For a while, the winner has the first attempt in the next races."""

    def __init__(self, dials: Sequence[Dial]) -> None:
        self._dials = list(dials)
        self._winner: Dial | None = None
        self._until = 0.0

    async def __call__(self) -> Transport:
        """Return the transport that opens first. Raises `Disconnected`. Cancelling it leaves nothing open."""
        known = self._winner is not None and anyio.current_time() < self._until
        order = sorted(self._dials, key=lambda dial: known and dial is not self._winner)
        won: dict[int, Dial] = {}

        async def open_transport(dial: Dial) -> Transport:
            transport = await dial()
            won[id(transport)] = dial
            return transport

        transport = await open_first_transport([partial(open_transport, dial) for dial in order])
        self._winner, self._until = won[id(transport)], anyio.current_time() + PREFERENCE_TIME
        return transport


async def open_first_transport(dials: Sequence[Dial]) -> Transport:
    """Return the transport that opens first, and close any other. Otherwise as `race`.

    Cancelling it leaves nothing open.
    """
    losers: list[Transport] = []
    try:
        return await race(dials, losers.append)
    finally:
        for loser in losers:
            with anyio.CancelScope() as at_once:
                at_once.cancel()
                await loser.aclose()
