"""A model of the broker as the specification describes it, without network, time or limits.

The model decides every request at once. It computes what a subscription has to receive from the log, on demand.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ..auth.grants import Grants


def matches(pattern: str, channel: str) -> bool:
    """Return whether a pattern matches a channel (section 2). The model shares no code with what it checks."""
    if pattern == "*":
        return channel[0] != "_"
    return pattern == channel or (pattern.endswith(".*") and channel.startswith(pattern[:-1]))


def covers(grant: str, pattern: str) -> bool:
    """Return whether a grant allows everything that a pattern can match."""
    if grant == "*":
        return pattern[0] != "_"
    return grant == pattern or (grant.endswith(".*") and pattern.startswith(grant[:-1]))


@dataclass(frozen=True)
class ModelMessage:
    """One message of the model's log."""

    seq: int
    channel: str
    payload: Any
    sender: str | None
    producer: int
    echo: bool
    retain: bool = False


@dataclass
class ModelSubscription:
    """A subscription to what matches `pattern` after the seq `since`."""

    pattern: str
    since: int


@dataclass
class ModelSession:
    """One authenticated client. `producer` identifies a publisher across several sessions of one client."""

    client_id: str | None
    grants: Grants
    producer: int
    subscriptions: dict[str, ModelSubscription] = field(default_factory=dict)
    channels: dict[str, Any] = field(default_factory=dict)
    """The channels of which it is a member, and its info there."""

    def may_read(self, pattern: str) -> bool:
        return any(covers(grant, pattern) for grant in self.grants.read)

    def may_write(self, channel: str) -> bool:
        return channel[0] != "_" and any(matches(grant, channel) for grant in self.grants.write)


class ReferenceModel:
    """The state of a broker: its log after the seq `base`, and the connected sessions by name."""

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self.log: list[ModelMessage] = []
        self.retained_before: dict[str, int] = {}
        """The seqs of the retained messages at `base`, by channel."""
        self.sessions: dict[str, ModelSession] = {}
        self.lost: set[tuple[str, str | None]] = set()
        """Members whose connection has ended: their leave is announced after a grace, unless they come back."""
        self.joined: set[tuple[str, str | None]] = set()
        """All members so far. Others were members before the model began, and have ended."""

    @property
    def head(self) -> int:
        return self.log[-1].seq if self.log else self.base

    def publish(
        self,
        name: str,
        channel: str,
        payload: Any,
        *,
        echo: bool = True,
        seq: int | None = None,
        retain: bool = False,
    ) -> int | None:
        """Append a message and return its seq, or None if it is rejected (section 9.1).

        `seq` is the broker's seq if other clients publish as well.
        """
        session = self.sessions[name]
        if not session.may_write(channel):
            return None
        seq = self.head + 1 if seq is None else seq
        self.log.append(ModelMessage(seq, channel, payload, session.client_id, session.producer, echo, retain))
        return seq

    def retained(self, patterns: Collection[str]) -> dict[str, int]:
        """Return the seqs of the retained messages of matching channels: a map fed with the log (section 8.1)."""
        state = dict(self.retained_before)
        for entry in self.log:
            if entry.retain:
                state.pop(entry.channel, None)
                if entry.payload is not None:
                    state[entry.channel] = entry.seq
        return {channel: seq for channel, seq in state.items() if any(matches(p, channel) for p in patterns)}

    def subscribe(self, name: str, pattern: str, since: int | None = None) -> bool:
        """Subscribe if it is allowed, and return whether it is. Without `since`, from the head on (section 8)."""
        session = self.sessions[name]
        if not session.may_read(pattern):
            return False
        session.subscriptions[pattern] = ModelSubscription(pattern, self.head if since is None else since)
        return True

    def history(self, name: str, pattern: str, limit: int) -> list[ModelMessage] | None:
        """Return the newest matching messages, oldest first, or None if the request is rejected."""
        if not self.sessions[name].may_read(pattern):
            return None
        return [entry for entry in self.log if matches(pattern, entry.channel)][-limit:]

    def unsubscribe(self, name: str, pattern: str) -> bool:
        """Unsubscribe, and return whether there was such a subscription."""
        return self.sessions[name].subscriptions.pop(pattern, None) is not None

    def replace_grants(self, name: str, grants: Grants) -> set[str]:
        """Replace the grants of a client, and return the patterns of the subscriptions that end (section 5)."""
        session = self.sessions[name]
        session.grants = grants
        ended = {pattern for pattern in session.subscriptions if not session.may_read(pattern)}
        for pattern in ended:
            del session.subscriptions[pattern]
        return ended

    def join(self, name: str, channel: str, info: Any) -> bool:
        """Make a session a member of a channel if it is allowed, and return whether it is (section 9.4)."""
        session = self.sessions[name]
        if not session.may_read(channel):
            return False
        session.channels[channel] = info
        self.lost.discard((channel, session.client_id))
        self.joined.add((channel, session.client_id))
        return True

    def leave(self, name: str, channel: str) -> None:
        """End a membership, if there is one."""
        self.sessions[name].channels.pop(channel, None)

    def end_memberships(self, name: str) -> set[str]:
        """End the memberships of a client that its grants do not allow, and return their channels."""
        session = self.sessions[name]
        ended = {channel for channel in session.channels if not session.may_read(channel)}
        for channel in ended:
            del session.channels[channel]
        return ended

    def end_session(self, name: str) -> None:
        """End a session, because its connection has ended."""
        session = self.sessions.pop(name)
        self.lost |= {(channel, session.client_id) for channel in session.channels}

    def members(self, pattern: str) -> dict[tuple[str, str | None], Any]:
        """Return the info of each member, by channel and client_id, of the channels that match."""
        return {
            (channel, session.client_id): info
            for session in self.sessions.values()
            for channel, info in session.channels.items()
            if matches(pattern, channel)
        }

    def expected(self, name: str, pattern: str, after: int) -> list[ModelMessage]:
        """Return the messages that a subscription has to receive after the seq `after`, in order, each once."""
        session = self.sessions[name]
        subscription = session.subscriptions[pattern]
        return [
            entry
            for entry in self._after(max(after, subscription.since))
            if matches(pattern, entry.channel) and (entry.echo or entry.producer != session.producer)
        ]

    def expected_events(self, patterns: Collection[str], after: int) -> list[ModelMessage]:
        """Return the messages that an event stream has to receive after the seq `after`, in order, each once."""
        return [entry for entry in self._after(after) if any(matches(pattern, entry.channel) for pattern in patterns)]

    def expected_once(self, name: str, after: int) -> list[ModelMessage]:
        """Return the messages that a session of the first version has to receive: one copy of each."""
        subscriptions = self.sessions[name].subscriptions.values()
        return [
            entry
            for entry in self._after(after)
            if any(entry.seq > each.since and matches(each.pattern, entry.channel) for each in subscriptions)
        ]

    def _after(self, seq: int) -> list[ModelMessage]:
        return self.log[bisect_right(self.log, seq, key=lambda each: each.seq) :]
