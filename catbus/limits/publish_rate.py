"""How fast clients may publish. No clock of its own: times are arguments, in seconds."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import islice
from weakref import WeakValueDictionary

from .token_bucket import TokenBucket

KEPT = 10_000
"""Clients that are remembered beside those that have sessions."""
_LOOKED_AT = 8
"""Of those that have published nothing for the longest time, how many are looked at where one has to be forgotten."""


class PublishRateLimit:
    """One client may publish so many messages a second, and so many bytes, and a second's worth of both at once.

    What was published is spent, and only then is there a wait: a single message may be larger than the quota.
    """

    __slots__ = ("__weakref__", "_bytes", "_messages")

    def __init__(self, messages: int, size: int, now: float) -> None:
        self._messages = TokenBucket(messages, messages, now)
        self._bytes = TokenBucket(size, size, now)

    def spend(self, messages: int, size: int, now: float) -> float:
        """The client has published so much. Returns after how many seconds it may publish more; 0 for at once."""
        wait, longer = self._messages.charge(messages, now), self._bytes.charge(size, now)
        return max(wait, longer)

    def is_full(self, now: float) -> bool:
        """Whether it is as if the client had published nothing."""
        return all(bucket.level(now) == bucket.burst for bucket in (self._messages, self._bytes))


class PublishRateLimits:
    """The quota of each client, which all of its sessions and requests share."""

    def __init__(self, messages: int, size: int) -> None:
        self._rates = messages, size
        self._quotas: WeakValueDictionary[Hashable, PublishRateLimit] = WeakValueDictionary()
        """All that there are: a session keeps its client's."""
        self._recent: dict[Hashable, PublishRateLimit] = {}
        """Those that were asked for last, in this order."""

    def of(
        self, client: Hashable, now: float, messages: int | None = None, size: int | None = None
    ) -> PublishRateLimit:
        """The quota of a client, whose token may name other rates.

        Each rate that its tokens name is a quota of its own: it spends what somebody has signed.
        """
        rates = messages or self._rates[0], size or self._rates[1]
        key = client, rates
        quota = self._quotas.get(key)
        if quota is None:
            quota = self._quotas[key] = PublishRateLimit(*rates, now)
        self._recent.pop(key, None)
        self._recent[key] = quota
        if len(self._recent) > KEPT:
            self._forget_one(now)
        return quota

    def new(self, now: float) -> PublishRateLimit:
        """A quota that nobody shares."""
        return PublishRateLimit(*self._rates, now)

    def _forget_one(self, now: float) -> None:
        """Without a look at all of them: a client may come under many names."""
        oldest = list(islice(self._recent.items(), _LOOKED_AT))
        del self._recent[next((key for key, quota in oldest if quota.is_full(now)), oldest[0][0])]
