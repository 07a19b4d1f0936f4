"""The interface of presence, and the types that its implementations and the sessions share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from msgspec import Struct

from ..error_codes import ErrorCode
from ..errors import PeerError
from ..protocol.channels import check_channel

PresenceAction = Literal["join", "update", "leave"]
"""`update`: other info, or another number of sessions."""

MAX_INFO = 1024
"""Bytes that the info of a session may have, as JSON."""

MAX_MEMBERS = 1000
"""Members in a page."""

_MAX_POSITION = 1024
"""Characters of a position that is not too long to be one."""


class Member(Struct, frozen=True, gc=False):
    """A member of a channel: all sessions of one `client_id`, or one session without a client_id.

    Exactly one of `client_id` and `session` is given. `info` is JSON: that of the session that gave it last.
    """

    channel: str
    key: str
    """Identifies the member in its channel. It stays the same while the member is there."""
    sessions: int
    """How many of its sessions are in the channel; 0 in a `leave`."""
    client_id: str | None = None
    session: str | None = None
    """Identifies a session without client_id. Clients compare it, and nothing else."""
    info: bytes | None = None

    @property
    def position(self) -> tuple[str, str]:
        """The position in the order in which pages have members: by channel, then by key."""
        return self.channel, self.key


@dataclass(frozen=True, slots=True)
class MembersPage:
    """Members in order, and the position after which the next page begins; None after the last page."""

    members: Sequence[Member]
    next: str | None


def encode_position(position: tuple[str, str]) -> str:
    """The position of a member as the text that clients get as `next`."""
    return " ".join(position)


def decode_position(text: str) -> tuple[str, str]:
    """The position in a text that a client sent as `after`. Raises `PeerError` (bad_message)."""
    channel, _, key = text.partition(" ")
    try:
        if not key or len(text) > _MAX_POSITION or "\0" in key:
            raise ValueError
        key.encode()
        check_channel(channel)
    except (ValueError, PeerError):
        raise PeerError(ErrorCode.BAD_MESSAGE, "after: this is not the next of a page of members") from None
    return channel, key


class Watcher(Protocol):
    """The receiver of the members in a pattern and of their changes. The calls are synchronous and must not raise.

    A watcher must not call `watch` or `unwatch` while it is called.
    """

    def begin_members(self, pattern: str) -> None:
        """The members of the pattern are known: `Presence.present` returns them from now on.

        Called once after `watch`, perhaps within it, and before the first event.
        """

    def note_member(self, pattern: str, action: PresenceAction, member: Member) -> None:
        """A member joined, changed, or left. What `Presence.present` returns shows it already."""


@dataclass(frozen=True, slots=True)
class PresenceStatistics:
    """The statistics of a replica's presence since its start."""

    memberships: int
    """Channels that sessions of this replica are in; a session counts once for each of its channels."""
    patterns: int
    """Patterns that are watched on this replica."""
    members: int
    """Members in memory: those in the channels that these patterns match; in a log in memory, all."""
    events: int
    """Joins, updates and leaves that were announced; once for each, whatever the number of watchers."""
    writes: int
    """Statements that have written memberships."""
    written: int
    """Memberships that they have written."""
    reads: int
    """Statements that have read memberships for the watched patterns."""


class Presence(Protocol):
    """Who is in which channel, on all replicas. Belongs to one Trio thread.

    `session` is the number of a session of this replica. What a session does is announced soon, and not before the call
    returns.
    """

    def join(self, session: int, channel: str, client_id: str | None, info: bytes | None) -> None:
        """Make a session a member of a valid channel, or replace its info there. Never raises.

        `info` is valid JSON of at most `MAX_INFO` bytes. A session without info does not replace that of the member's
        other sessions.
        """

    def leave(self, session: int, channel: str, *, explicit: bool) -> None:
        """End a membership, if there is one. Never raises.

        `explicit`: the client has said so, and a leave of its last session is announced at once. Otherwise the client
        may come back within the grace.
        """

    def leave_all(self, session: int) -> None:
        """End all memberships of a session that has ended. Its client may come back within the grace. Never raises."""

    def channels(self, session: int) -> Sequence[str]:
        """The channels that a session is in."""

    def watch(self, pattern: str, watcher: Watcher) -> None:
        """Call the watcher for the members in channels that match a valid pattern. Watching twice is the same as once.

        A watcher that cannot take an event drops it, and reads `present` again from the beginning when it can.
        """

    def unwatch(self, pattern: str, watcher: Watcher) -> None:
        """Do not call the watcher for this pattern any more."""

    def present(
        self, pattern: str, after: tuple[str, str] | None = None, limit: int = MAX_MEMBERS
    ) -> tuple[Sequence[Member], bool]:
        """The members in a watched pattern, from memory: at most `limit`, in the order of their positions.

        Returns also whether there are more; then the next page begins after the last member's position. Between two
        pages anything may change. A watcher that reads pages passes an event on if the member's position is not above
        that of the last page's last member; a later page shows what happened above it.

        Before the pattern is known (`Watcher.begin_members`) there are none.
        """

    async def members(self, pattern: str, after: str | None = None, limit: int = 100) -> MembersPage:
        """Read a page of at most `limit` (1 to `MAX_MEMBERS`) members in a valid pattern, whether it is watched or not.

        `after` is the `next` of the page before. Members whose sessions have all ended are not there, although their
        leave is announced later. Raises `PeerError` for a wrong `after`, and `Unavailable` while the database cannot be
        read. May be cancelled.
        """

    async def run(self) -> None:
        """Announce what is due, until cancelled."""

    async def flush(self) -> None:
        """Wait until the other replicas can know of all that sessions did. May be cancelled."""

    def statistics(self) -> PresenceStatistics: ...
