"""One member of a channel: which of its sessions count, and what was announced of it."""

from __future__ import annotations

from collections import deque

from .interface import Member
from .own_members import Membership


class SessionState:
    """A membership as the mirror knows it. `stamp` is the reading that was in progress when it was read last."""

    __slots__ = ("counted", "member", "membership", "stamp")

    def __init__(self, membership: Membership, member: MemberState, stamp: int) -> None:
        self.membership = membership
        self.member = member
        self.stamp = stamp
        self.counted = False
        """Whether it is one of the member's sessions: its replica is fresh."""
        member.known += 1


class MemberState:
    """The sessions of a member, and the member as it was announced last; None if it is not announced."""

    __slots__ = ("_first", "announced", "channel", "expected", "key", "known", "scheduled", "sessions")

    def __init__(self, first: Membership) -> None:
        self._first = first
        self.channel = first.channel
        self.key = first.key
        self.known = 0
        """Number of its memberships, including those that do not count."""
        self.sessions: dict[SessionState, None] = {}
        """Those that count."""
        self.expected: deque[float] = deque()
        """For each session that ended and may come back, the time until which it is expected."""
        self.announced: Member | None = None
        self.scheduled = False
        """Whether its leave is in the schedule."""

    def add(self, session: SessionState) -> None:
        """Count a session. It takes the place of one that is expected back."""
        session.counted = True
        self.sessions[session] = None
        if self.expected:
            self.expected.popleft()

    def remove(self, session: SessionState, expected: float | None, now: float) -> None:
        """Do not count a session any more. `expected`: the time until which it may come back; None if it will not."""
        session.counted = False
        del self.sessions[session]
        while self.expected and self.expected[0] <= now:
            self.expected.popleft()
        if expected is not None:
            self.expected.append(expected)

    def expect_again(self, until: float) -> None:
        """A session that is not known has taken the place of one that is expected back, and may come back itself."""
        if self.expected:
            self.expected.popleft()
        self.expected.append(until)

    @property
    def leaves_at(self) -> float:
        """The time until which a session is expected back; 0.0 if none is."""
        return max(self.expected, default=0.0)

    def present(self) -> Member:
        """The member with its sessions and their latest info."""
        first = self._first
        informed = [session.membership for session in self.sessions if session.membership.info is not None]
        info = max(informed, key=_by_age).info if informed else None
        anonymous = first.client_id is None
        return Member(
            self.channel,
            self.key,
            len(self.sessions),
            client_id=first.client_id,
            session=first.session_name if anonymous else None,
            info=info,
        )


def _by_age(membership: Membership) -> tuple[int, str, int]:
    return membership.at, membership.replica, membership.session
