"""The presence of one session: the channels of which it is a member, and the members that its subscriptions watch."""

from __future__ import annotations

from ..delivery.send_queue import SendQueue
from ..error_codes import ErrorCode
from ..errors import PeerError, Unavailable
from ..presence.interface import MAX_INFO
from ..presence.member_pages import read_members
from ..protocol import wire_messages as wire
from .presence_watch import PresenceWatch, channel_member
from .services import SessionServices
from .state_machine import Session

SESSIONS_CHANNEL = "_catbus.sessions"
"""The channel of which every session is a member, with `[presence] sessions = true`."""


class SessionPresence:
    """Joins and leaves channels for a session, and watches patterns for its subscriptions."""

    __slots__ = ("_announced", "_presence", "_services", "_session", "_session_id", "_watches")

    def __init__(self, session: Session, services: SessionServices, session_id: int) -> None:
        self._session = session
        self._services = services
        self._session_id = session_id
        self._presence = services.presence
        self._watches: dict[str, PresenceWatch] = {}
        self._announced = False

    # Memberships

    def announce(self, transport: str, network: str) -> None:
        """Make the session, which has been authenticated, a member of `SESSIONS_CHANNEL`, if it is configured.

        Each session is a member by itself, because its `info` differs from that of other sessions of its client.
        """
        if self._services.config.presence.sessions:
            self._announced = True
            place = {"replica": self._services.replica_id, "session": self._session_id}
            found = wire.to_json({"client_id": self._client_id, "transport": transport, "address": network, **place})
            info = found if len(found) <= MAX_INFO else wire.to_json(place)
            self._presence.join(self._session_id, SESSIONS_CHANNEL, None, info)

    def join(self, request: wire.Join, info: bytes | None) -> None:
        """Make the session a member of a channel, or replace its info. A membership counts as a subscription."""
        usages, session = self._services.client_usages, self._session
        if request.channel not in session.channels:
            try:
                usages.check_subscriptions(session.usage)
            except PeerError as error:
                session.reject_request(request, error)
                return
            usages.add_subscriptions(session.usage, 1)
        self._presence.join(self._session_id, request.channel, self._client_id, info)
        session.joined(request)

    def leave(self, channel: str, number: int | None = None) -> None:
        """End a membership, and tell the client. `number`: the id of its request, if any."""
        self._services.client_usages.add_subscriptions(self._session.usage, -1)
        self._presence.leave(self._session_id, channel, explicit=True)
        self._session.left(channel, number)

    def revoke(self) -> None:
        """End the memberships of channels that the session's grants do not allow to read any more."""
        for channel in self._session.unreadable_channels():
            self.leave(channel)

    async def send_members(self, request: wire.ListMembers) -> int:
        """Send a page of members, or an error. Returns how many members were read."""
        try:
            async with self._services.member_turns.turn(self._session.usage.client):
                page = await read_members(self._presence, request.pattern, request.after, request.limit)
        except Unavailable as error:
            self._session.reject_request(request, PeerError(ErrorCode.UNAVAILABLE, str(error)))
            return 0
        except PeerError as error:
            self._session.reject_request(request, error)
            return 0
        self._session.send_members(request, [channel_member(each) for each in page.members], page.next)
        return len(page.members)

    # Subscriptions

    def watch(self, pattern: str, send_queue: SendQueue) -> None:
        """Send the members that match a pattern, and their changes, to a send queue."""
        client = self._session.usage.client
        watch = self._watches[pattern] = PresenceWatch(self._services.presence_feeder, client, pattern, send_queue)
        watch.begin()

    def unwatch(self, pattern: str) -> None:
        """Send no more changes for a pattern."""
        watch = self._watches.pop(pattern, None)
        if watch is not None:
            watch.close()

    def close(self) -> None:
        """End all memberships, because the session has ended. Its client may come back within the grace."""
        if self._announced:
            self._presence.leave(self._session_id, SESSIONS_CHANNEL, explicit=True)
        self._services.client_usages.add_subscriptions(self._session.usage, -len(self._session.channels))
        self._session.channels.clear()
        self._presence.leave_all(self._session_id)

    @property
    def _client_id(self) -> str | None:
        identity = self._session.identity
        return None if identity is None else identity.client_id
