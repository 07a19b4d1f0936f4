"""Limits of the rate at which clients publish. No clock of its own: times are arguments, in seconds."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import islice
from weakref import WeakValueDictionary

from .token_bucket import TokenBucket

MAX_REMEMBERED = 10_000
"""Clients that are remembered besides those with sessions."""
_CANDIDATES = 8
"""Least recently used clients among which one is chosen to be forgotten."""


class PublishRateLimit:
    """The limit of one client, in messages and bytes per second, with a burst of one second.

    A message is spent when it was published, and the wait comes afterwards: one message may exceed the limit.
    """

    __slots__ = ("__weakref__", "_bytes", "_messages")

    def __init__(self, messages: int, size: int, now: float) -> None:
        self._messages = TokenBucket(messages, messages, now)
        self._bytes = TokenBucket(size, size, now)

    def spend(self, messages: int, size: int, now: float) -> float:
        """Record what the client has published. Returns in how many seconds it may publish more; 0 for at once."""
        return max(self._messages.charge(messages, now), self._bytes.charge(size, now))

    def is_full(self, now: float) -> bool:
        """Whether nothing is spent."""
        return all(bucket.level(now) == bucket.burst for bucket in (self._messages, self._bytes))


class PublishRateLimits:
    """The limit of each client, which all its sessions and requests share."""

    def __init__(self, messages: int, size: int) -> None:
        self._rates = messages, size
        self._limits: WeakValueDictionary[Hashable, PublishRateLimit] = WeakValueDictionary()
        """All of them: a session keeps that of its client alive."""
        self._recent: dict[Hashable, PublishRateLimit] = {}
        """The most recently used ones, the last at the end."""

    def get(
        self, client: Hashable, now: float, messages: int | None = None, size: int | None = None
    ) -> PublishRateLimit:
        """The limit of a client, whose token may have other rates.

        Tokens of one client with different rates have separate limits.
        """
        rates = messages or self._rates[0], size or self._rates[1]
        key = client, rates
        limit = self._limits.get(key)
        if limit is None:
            limit = self._limits[key] = PublishRateLimit(*rates, now)
        self._recent.pop(key, None)
        self._recent[key] = limit
        if len(self._recent) > MAX_REMEMBERED:
            self._forget_one(now)
        return limit

    def new(self, now: float) -> PublishRateLimit:
        """A limit that is not shared."""
        return PublishRateLimit(*self._rates, now)

    def _forget_one(self, now: float) -> None:
        """Forget an old client, if possible one that owes nothing. Looks at few: a client may come under many names."""
        oldest = list(islice(self._recent.items(), _CANDIDATES))
        del self._recent[next((key for key, limit in oldest if limit.is_full(now)), oldest[0][0])]
