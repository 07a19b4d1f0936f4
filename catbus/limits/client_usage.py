"""What each client uses of the resources that all clients share. No clock of its own."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from ..close_codes import CloseCode
from ..error_codes import ErrorCode
from ..errors import PeerError


@dataclass(slots=True, eq=False)
class ClientUsage:
    """What the sessions of one client use together."""

    client: Hashable
    sessions: int = 0
    cost: int = 0
    """Cost of their publishes that the log has not settled yet, in bytes."""
    subscriptions: int = 0


class ClientUsages:
    """The usage of each client that has sessions, by the key that `client_of` makes of its token.

    A client has at most `sessions` sessions. It has as many subscriptions as all clients together leave free of
    `subscriptions`, so one client uses at most half of them.
    """

    def __init__(self, sessions: int, subscriptions: int) -> None:
        self.subscriptions = 0
        """Subscriptions of all clients."""
        self._max_sessions = sessions
        self._max_subscriptions = subscriptions
        self._usages: dict[Hashable, ClientUsage] = {}

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._usages)

    def of(self, client: Hashable) -> ClientUsage | None:
        """Return the usage of a client, or None for a client without sessions."""
        return self._usages.get(client)

    def add_session(self, client: Hashable) -> ClientUsage:
        """Count a session of a client. Raises `PeerError` that closes when the client has too many sessions."""
        usage = self._usages.setdefault(client, ClientUsage(client))
        if usage.sessions >= self._max_sessions:
            raise PeerError(ErrorCode.OVERLOADED, "this client has too many sessions", CloseCode.OVERLOADED)
        usage.sessions += 1
        return usage

    def remove_session(self, usage: ClientUsage) -> None:
        """Count a session of a client no longer."""
        usage.sessions -= 1
        if not usage.sessions:
            del self._usages[usage.client]

    def check_subscriptions(self, usage: ClientUsage, number: int = 1) -> None:
        """Raise `PeerError` when the client may not have so many more subscriptions, one after the other."""
        # Each leaves less free, so the last of them finds `number - 1` more of the client, and as many fewer free.
        if usage.subscriptions + number - 1 >= self._max_subscriptions - (self.subscriptions + number - 1):
            text = "there is no room for more subscriptions of this client (limits.subscriptions_total)"
            raise PeerError(ErrorCode.OVERLOADED, text)

    def add_subscriptions(self, usage: ClientUsage, number: int) -> None:
        """Count so many subscriptions of a client more, or fewer where `number` is negative."""
        usage.subscriptions += number
        self.subscriptions += number
