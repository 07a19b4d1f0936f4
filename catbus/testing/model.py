"""A broker as the specification has it, small enough to be read in one sitting: no network, no time, no limits.

What it is asked is decided at once; what a subscription is owed is computed from the log when somebody wants to know.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from ..auth.tokens import Grants


def matches(pattern: str, channel: str) -> bool:
    """Whether a pattern is for a channel (section 2). Said anew here: a model shares no code with what it judges."""
    return pattern in ("*", channel) or (pattern.endswith(".*") and channel.startswith(pattern[:-1]))


def covers(grant: str, pattern: str) -> bool:
    """Whether a grant allows all that a pattern can match."""
    return grant in ("*", pattern) or (grant.endswith(".*") and pattern.startswith(grant[:-1]))


@dataclass(frozen=True)
class Entry:
    """One message of the log."""

    seq: int
    channel: str
    payload: Any
    sender: str | None
    producer: int
    echo: bool


@dataclass
class Subscription:
    """What matches `pattern` after `since`, for as long as it is held."""

    pattern: str
    since: int


@dataclass
class Session:
    """One client that has authenticated. `producer` tells publishers apart, over several sessions of one client."""

    client_id: str | None
    grants: Grants
    producer: int
    subscriptions: dict[str, Subscription] = field(default_factory=dict)

    def may_read(self, pattern: str) -> bool:
        return any(covers(grant, pattern) for grant in self.grants.read)

    def may_write(self, channel: str) -> bool:
        return any(matches(grant, channel) for grant in self.grants.write)


class Model:
    """All there is to know of a broker: its log after `base`, and who is connected by which name."""

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.log: list[Entry] = []
        self.sessions: dict[str, Session] = {}

    @property
    def head(self) -> int:
        return self.log[-1].seq if self.log else self.base

    def publish(
        self, name: str, channel: str, payload: Any, *, echo: bool = True, seq: int | None = None
    ) -> int | None:
        """The seq, or None where it is refused (section 9.1). `seq` is for where others publish, too."""
        session = self.sessions[name]
        if not session.may_write(channel):
            return None
        seq = self.head + 1 if seq is None else seq
        self.log.append(Entry(seq, channel, payload, session.client_id, session.producer, echo))
        return seq

    def subscribe(self, name: str, pattern: str, since: int | None = None) -> bool:
        """Whether it is allowed. Without `since`, from now on (section 8)."""
        session = self.sessions[name]
        if not session.may_read(pattern):
            return False
        session.subscriptions[pattern] = Subscription(pattern, self.head if since is None else since)
        return True

    def history(self, name: str, pattern: str, limit: int) -> list[Entry] | None:
        """The newest that match, oldest first; None where it is refused."""
        if not self.sessions[name].may_read(pattern):
            return None
        return [entry for entry in self.log if matches(pattern, entry.channel)][-limit:]

    def unsubscribe(self, name: str, pattern: str) -> bool:
        """Whether it was held."""
        return self.sessions[name].subscriptions.pop(pattern, None) is not None

    def regrant(self, name: str, grants: Grants) -> set[str]:
        """The client may this from now on; returns the patterns that end by it (section 5)."""
        session = self.sessions[name]
        session.grants = grants
        ended = {pattern for pattern in session.subscriptions if not session.may_read(pattern)}
        for pattern in ended:
            del session.subscriptions[pattern]
        return ended

    def owed(self, name: str, pattern: str, after: int) -> list[Entry]:
        """What a subscription is to be delivered of what stands after `after`, in order, each once."""
        session = self.sessions[name]
        subscription = session.subscriptions[pattern]
        return [
            entry
            for entry in self.log[bisect_right(self.log, max(after, subscription.since), key=lambda each: each.seq) :]
            if matches(pattern, entry.channel) and (entry.echo or entry.producer != session.producer)
        ]
