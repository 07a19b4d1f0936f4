"""The presence of subscriptions: the members that match a pattern, and their changes, as lines in a send queue.

A watch sends a snapshot in pages, and then each change. While its send queue has no room, the changes of a member are
combined; if too many members have changed, a new snapshot follows. So a slow client gets the state, and not every step.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import trio
from msgspec import UNSET, Raw, UnsetType

from ..delivery.reply_lines import PresenceLine
from ..delivery.send_queue import SendQueue
from ..presence import Member, Presence, PresenceAction
from ..presence.member_pages import members_that_fit
from ..protocol import wire_messages as wire
from ..protocol.server_sent_events import encode_reply
from ..protocol.wire_messages import ProtocolVersion

PAGE_MEMBERS = 100
"""Members in a page of a snapshot."""
PAGE_BYTES = 16_384
"""Bytes of a page of a snapshot, approximately. A page is sent whenever a send queue has any room."""
MAX_CHANGES = 1_000
"""Changed members that a watch keeps until its send queue has room."""
MAX_ALL_CHANGES = 100_000
"""Changed members that all watches of a replica keep together."""


@dataclass(frozen=True, slots=True)
class FeedStatistics:
    """`snapshots`: begun so far. `changes`: changed members that wait until a send queue has room."""

    snapshots: int
    changes: int


class PresenceFeeder:
    """The task that sends snapshots, and the changes that have waited, for all watches of a replica in turn."""

    def __init__(self, presence: Presence) -> None:
        self.presence = presence
        self.changes = 0
        """Changed members that the watches keep."""
        self.snapshots = 0
        """Snapshots that were begun."""
        self._ready: dict[Hashable, dict[PresenceWatch, None]] = {}
        """The watches to be fed, by client. Clients take turns, and so do the watches of a client."""
        self._work = trio.Event()
        self._newest: tuple[str, PresenceAction, Member, ProtocolVersion] | None = None
        self._line = PresenceLine(b"", "")

    def statistics(self) -> FeedStatistics:
        return FeedStatistics(self.snapshots, self.changes)

    def wake(self, watch: PresenceWatch) -> None:
        """Feed a watch when its turn comes."""
        self._ready.setdefault(watch.client, {})[watch] = None
        self._work.set()

    async def run(self) -> None:
        """Feed watches, until cancelled. One of them gets a page, and then the next one has its turn."""
        while True:
            while self._ready:
                client = next(iter(self._ready))
                watches = self._ready.pop(client)
                watch = next(iter(watches))
                del watches[watch]
                if watches:
                    self._ready[client] = watches
                watch.feed()
                await trio.lowlevel.checkpoint()
            self._work = trio.Event()
            await self._work.wait()

    def line(self, pattern: str, action: PresenceAction, member: Member, protocol: ProtocolVersion) -> PresenceLine:
        """Encode a change. The watches of a pattern mostly send the same one after another, so it is encoded once."""
        wanted = pattern, action, member, protocol
        if self._newest is None or self._newest[2] is not member or self._newest != wanted:
            reply = wire.PresenceChange(
                pattern, action, member.channel, member.sessions, member.client_id, member.session, raw_info(member)
            )
            self._newest, self._line = wanted, _encode(reply, pattern, protocol)
        return self._line


class PresenceWatch:
    """The presence of one subscription. It is a `Watcher` of its pattern from `begin` to `close`."""

    __slots__ = (
        "_again",
        "_changes",
        "_closed",
        "_complete",
        "_feeder",
        "_known",
        "_last",
        "_waits",
        "client",
        "pattern",
        "queue",
    )

    def __init__(self, feeder: PresenceFeeder, client: Hashable, pattern: str, send_queue: SendQueue) -> None:
        self.client = client
        self.pattern = pattern
        self.queue = send_queue
        self._feeder = feeder
        self._known = self._complete = self._again = self._waits = self._closed = False
        self._last: tuple[str, str] | None = None
        """The position of the last member of the snapshot that was sent."""
        self._changes: dict[tuple[str, str], tuple[bool, Member]] = {}
        """Changed members by position: whether the client knows the member, and the member as it is now."""

    def begin(self) -> None:
        """Watch the pattern. The snapshot follows as soon as its members are known."""
        self._feeder.presence.watch(self.pattern, self)

    def close(self) -> None:
        """Send nothing more."""
        self._closed = True
        self._forget_changes()
        self._feeder.presence.unwatch(self.pattern, self)

    def begin_members(self, pattern: str) -> None:
        self._known = True
        self._feeder.snapshots += 1
        self._feeder.wake(self)

    def note_member(self, pattern: str, action: PresenceAction, member: Member) -> None:
        if self._again or not (self._complete or (self._last is not None and member.position <= self._last)):
            return  # A page that is still to be sent shows it.
        if self._complete and not self._changes and self.queue.has_room:
            self.queue.put(self._feeder.line(pattern, action, member, self.queue.protocol))
        else:
            self._keep_change(action, member)

    def feed(self) -> None:
        """Send a page of the snapshot, or changes that have waited, if the send queue has room."""
        if self._closed or not self._known or self._waits:
            return
        if not self.queue.has_room:
            self._waits = True
            self.queue.when_emptied(self._stop_waiting)
            return
        if self._complete and self._again:
            self._complete = self._again = False
            self._last = None
            self._feeder.snapshots += 1
        if not self._complete:
            self._send_page()
        else:
            self._send_changes()
        if self._again or self._changes or not self._complete:
            self._feeder.wake(self)

    def _stop_waiting(self) -> None:
        self._waits = False
        self._feeder.wake(self)

    def _send_page(self) -> None:
        members, more = self._feeder.presence.present(self.pattern, self._last, PAGE_MEMBERS)
        kept = members_that_fit(members, PAGE_BYTES)
        if kept:
            self._last = kept[-1].position
        self._complete = not more and len(kept) == len(members)
        reply = wire.MemberList([channel_member(each) for each in kept], self.pattern, self._complete)
        self.queue.put(_encode(reply, self.pattern, self.queue.protocol))

    def _send_changes(self) -> None:
        sent = 0
        while self._changes and sent < PAGE_MEMBERS and self.queue.has_room:
            known, member = self._changes.pop(next(iter(self._changes)))
            self._feeder.changes -= 1
            sent += 1
            action: PresenceAction = "leave" if not member.sessions else "update" if known else "join"
            self.queue.put(self._feeder.line(self.pattern, action, member, self.queue.protocol))

    def _keep_change(self, action: PresenceAction, member: Member) -> None:
        before = self._changes.pop(member.position, None)
        known = action != "join" if before is None else before[0]
        if known or member.sessions:
            self._changes[member.position] = known, member
            self._feeder.changes += before is None
        else:
            self._feeder.changes -= before is not None
        if len(self._changes) > MAX_CHANGES or self._feeder.changes > MAX_ALL_CHANGES:
            self._forget_changes()
            self._again = True
        self._feeder.wake(self)

    def _forget_changes(self) -> None:
        self._feeder.changes -= len(self._changes)
        self._changes.clear()


def channel_member(member: Member) -> wire.ChannelMember:
    """Return a member as messages have it."""
    return wire.ChannelMember(member.channel, member.sessions, member.client_id, member.session, raw_info(member))


def raw_info(member: Member) -> Raw | UnsetType:
    return UNSET if member.info is None else Raw(member.info)


def _encode(reply: wire.Reply, pattern: str, protocol: ProtocolVersion) -> PresenceLine:
    line = encode_reply(reply, protocol)
    assert line is not None, "first-version sessions have no presence"
    return PresenceLine(line, pattern)
