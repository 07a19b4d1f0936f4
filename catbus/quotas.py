"""How fast clients may publish. No clock of its own: times are arguments, in seconds."""

from __future__ import annotations

from collections.abc import Hashable

KEPT = 10_000
"""Clients that are remembered. Over it those go that have published nothing for a second, or else the oldest."""


class Quota:
    """One client may publish so many messages a second, and so many bytes, and a second's worth of both at once.

    What was published is spent, and only then is there a wait: a single message may be larger than the quota.
    """

    __slots__ = ("_at", "_bytes", "_messages", "_of_bytes", "_of_messages")

    def __init__(self, messages: int, size: int, now: float) -> None:
        self._messages: float = messages
        self._bytes: float = size
        self._of_messages = messages
        self._of_bytes = size
        self._at = now

    def spend(self, messages: int, size: int, now: float) -> float:
        """The client has published so much. Returns after how many seconds it may publish more; 0 for at once."""
        passed, self._at = now - self._at, now
        self._messages = left = min(self._of_messages, self._messages + passed * self._of_messages) - messages
        self._bytes = room = min(self._of_bytes, self._bytes + passed * self._of_bytes) - size
        if left >= 0 and room >= 0:
            return 0.0
        return max(-left / self._of_messages, -room / self._of_bytes)

    def is_full(self, now: float) -> bool:
        """Whether it is as if the client had published nothing."""
        self.spend(0, 0, now)
        return self._messages == self._of_messages and self._bytes == self._of_bytes


class Quotas:
    """The quota of each client, which all of its sessions and requests share."""

    def __init__(self, messages: int, size: int) -> None:
        self._rates = messages, size
        self._clients: dict[Hashable, Quota] = {}

    def of(self, client: Hashable, now: float) -> Quota:
        """The quota of a client."""
        quota = self._clients.get(client)
        if quota is None:
            if len(self._clients) >= KEPT:
                self._make_room(now)
            quota = self._clients[client] = self.new(now)
        return quota

    def new(self, now: float) -> Quota:
        """A quota that nobody shares."""
        return Quota(*self._rates, now)

    def _make_room(self, now: float) -> None:
        idle = [client for client, quota in self._clients.items() if quota.is_full(now)]
        for client in idle or [next(iter(self._clients))]:
            del self._clients[client]
