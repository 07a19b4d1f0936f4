"""The memberships of a replica's own sessions, and which of them still have to be written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from hashlib import sha256
from itertools import islice

from msgspec import Struct, structs

MAX_ENDED = 10_000
"""Ended memberships that may wait to be written to a database."""

_MAX_KEY = 500
"""Characters of a key. A longer client_id is replaced by its hash, so that an index has room for it."""


class MembershipState(IntEnum):
    """What has become of a membership."""

    PRESENT = 0
    ENDED = 1
    """Its session has ended. The client may come back."""
    LEFT = 2
    """The client has left the channel."""


class Membership(Struct, frozen=True, gc=False):
    """A session in a channel, as replicas tell it to each other.

    `at` is when the session joined or gave its info, in milliseconds since 1970 by the clock of its replica: of several
    sessions of a member, the info of the latest counts. Of several states of a membership, that with the greatest
    `version` counts.
    """

    replica: str
    session: int
    channel: str
    client_id: str | None = None
    info: bytes | None = None
    at: int = 0
    state: MembershipState = MembershipState.PRESENT
    version: int = 0

    @property
    def key(self) -> str:
        """The key of the member to which it belongs: see `Member.key`."""
        client_id = self.client_id
        if client_id is None:
            return f"s{self.session_name}"
        if len(client_id) > _MAX_KEY:
            return f"h{sha256(client_id.encode()).hexdigest()}"
        return f"c{client_id}"

    @property
    def place(self) -> Place:
        """Identifies the membership."""
        return self.channel, self.key, self.replica, self.session

    @property
    def session_name(self) -> str:
        """Identifies the session on all replicas."""
        return f"{self.replica}-{self.session}"


Place = tuple[str, str, str, int]
"""Identifies a membership: its channel, the key of its member, and its session with its replica."""


class OwnMembers:
    """Pure. The caller writes what `take` returns, in this order, and says with `give_back` what it did not write.

    If more than `max_ended` ended memberships wait to be written, all memberships are written again instead.
    """

    def __init__(self, replica: str, max_ended: float = MAX_ENDED) -> None:
        self.replica = replica
        self._max_ended = max_ended
        self.rewrites = 0
        """How often all memberships had to be written again."""
        self._sessions: dict[int, dict[str, Membership]] = {}
        self._size = 0
        self._unwritten: dict[Place, Membership] = {}

    def __len__(self) -> int:
        """Return the number of memberships."""
        return self._size

    @property
    def unwritten(self) -> int:
        """Number of memberships that have to be written."""
        return len(self._unwritten)

    def channels(self, session: int) -> Sequence[str]:
        """The channels that a session is in."""
        return tuple(self._sessions.get(session, ()))

    def join(self, session: int, channel: str, client_id: str | None, info: bytes | None, at: int) -> None:
        """A session joins a channel, or has other info there. `at` is in milliseconds since 1970."""
        if client_id is not None:
            # PostgreSQL stores no U+0000, and nothing that is not Unicode. One such text would spoil a whole statement.
            client_id = client_id.replace("\0", "\ufffd").encode(errors="replace").decode()
        before = self._sessions.get(session, {}).get(channel)
        if before is not None and before.client_id != client_id:
            self.leave(session, channel, explicit=True)
            before = None
        if before is None:
            self._size += 1
        elif before.info == info:
            return
        membership = Membership(self.replica, session, channel, client_id, info, at)
        self._sessions.setdefault(session, {})[channel] = self._unwritten[membership.place] = membership

    def leave(self, session: int, channel: str, *, explicit: bool) -> None:
        """End a membership, if there is one."""
        channels = self._sessions.get(session, {})
        membership = channels.pop(channel, None)
        if membership is None:
            return
        if not channels:
            del self._sessions[session]
        self._size -= 1
        state = MembershipState.LEFT if explicit else MembershipState.ENDED
        self._unwritten[membership.place] = structs.replace(membership, info=None, state=state)
        if len(self._unwritten) > self._size + self._max_ended:
            self.rewrite()

    def leave_all(self, session: int) -> None:
        """End all memberships of a session that has ended."""
        for channel in self.channels(session):
            self.leave(session, channel, explicit=False)

    def take(self, limit: int) -> Sequence[Membership]:
        """Take memberships that have to be written, the longest unwritten first."""
        taken = list(islice(self._unwritten.items(), limit))
        for place, _ in taken:
            del self._unwritten[place]
        return [membership for _, membership in taken]

    def give_back(self, taken: Iterable[Membership]) -> None:
        """These may not have been written. What has changed since then is written instead of them."""
        for membership in taken:
            present = self._sessions.get(membership.session, {}).get(membership.channel)
            if membership is present or membership.state is not MembershipState.PRESENT:
                self._unwritten.setdefault(membership.place, membership)

    def rewrite(self) -> None:
        """Write all memberships again. The caller ends all others of this replica when they are written."""
        self.rewrites += 1
        present = [membership for channels in self._sessions.values() for membership in channels.values()]
        self._unwritten = {membership.place: membership for membership in present}
