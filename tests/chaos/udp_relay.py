"""The UDP network between clients and a replica, which can be blocked and can lose datagrams."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import trio

MAX_DATAGRAM_SIZE = 65_536
MAX_FLOWS = 200
"""Maximum number of clients. The oldest is forgotten first."""


class UdpRelay:
    """Relays datagrams to `target` from a socket for each client. `port` stays the same for every target."""

    def __init__(self, rng: random.Random) -> None:
        self.port = 0
        self.target: tuple[str, int] | None = None
        self.loss = 0.0
        """The share of datagrams that are lost in either direction: from 0 to 1."""
        self.drop_replies = False
        """Whether replies are dropped."""
        self._rng = rng
        self._flows: dict[Any, tuple[trio.socket.SocketType, trio.CancelScope]] = {}

    def set_target(self, target: tuple[str, int]) -> None:
        """Relay to another target from now on, which does not know the clients of the previous one."""
        self.forget()
        self.target = target

    def forget(self) -> None:
        """Relay from other ports from now on, like a restarted address translator."""
        for _, scope in self._flows.values():
            scope.cancel()
        self._flows.clear()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as inside:
            await inside.bind(("127.0.0.1", 0))
            self.port = inside.getsockname()[1]
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    data, client = await _receive(inside)
                    if self._is_lost() or self.target is None:
                        continue
                    if client not in self._flows:
                        await self._open(client, inside, nursery)
                    outside, _ = self._flows[client]
                    with suppress(OSError):
                        await outside.send(data)

    async def _open(self, client: Any, inside: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        if len(self._flows) >= MAX_FLOWS:
            _, scope = self._flows.pop(next(iter(self._flows)))
            scope.cancel()
        outside = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
        await outside.connect(self.target)
        scope = trio.CancelScope()
        self._flows[client] = outside, scope
        nursery.start_soon(self._return, client, inside, outside, scope)

    async def _return(
        self, client: Any, inside: trio.socket.SocketType, outside: trio.socket.SocketType, scope: trio.CancelScope
    ) -> None:
        with outside, scope:
            while True:
                data, _ = await _receive(outside)
                if not (self.drop_replies or self._is_lost()):
                    with suppress(OSError):
                        await inside.sendto(data, client)

    def _is_lost(self) -> bool:
        return self._rng.random() < self.loss


async def _receive(socket: trio.socket.SocketType) -> tuple[bytes, Any]:
    """Return the next datagram. Errors about earlier datagrams are ignored."""
    while True:
        with suppress(OSError):
            return await socket.recvfrom(MAX_DATAGRAM_SIZE)
