"""The channels that the sessions of a client join, which outlive its connections. Pure."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import UNSET, Raw

from ..error_codes import RETRYABLE, ErrorCode
from ..errors import Refused
from ..protocol import wire_messages as wire
from .in_flight_requests import PendingReply, RequestSender

MAX_INFO = 1024
"""The largest info of a member, in bytes of JSON."""

NO_INFO = Raw(b"null")


def _do_nothing() -> None:
    pass


class MembershipHandle:
    """One use of a membership. `error`: why the broker has ended it."""

    __slots__ = ("channel", "error")

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.error: Refused | None = None


class _Membership:
    __slots__ = ("accepted", "channel", "handles", "joined_on")

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.handles: dict[MembershipHandle, None] = {}
        self.accepted: Raw | None = None
        """The newest info that the broker has accepted."""
        self.joined_on: RequestSender | None = None
        """The connection whose session is a member."""


class _JoinRequest:
    """A `join` without a reply, and the tasks that wait for it."""

    __slots__ = ("info", "membership", "replies")

    def __init__(self, membership: _Membership, info: Raw, replies: list[PendingReply[str]]) -> None:
        self.membership = membership
        self.info = info
        self.replies = replies


class ChannelMemberships:
    """The memberships of one client. `next_id` returns the id of the next request.

    Each session joins the channels of the one before, with the newest info. `on_retry` is called when something waits
    for `retry` on the present connection.
    """

    def __init__(self, next_id: Callable[[], int], on_retry: Callable[[], None] = _do_nothing) -> None:
        self._next_id = next_id
        self._on_retry = on_retry
        self._connection: RequestSender | None = None
        self._by_channel: dict[str, _Membership] = {}
        self._joins: dict[int, _JoinRequest] = {}
        """By id, in the order of the ids."""
        self._leaves: set[int] = set()
        """The ids of each `leave` without a reply."""
        self._to_retry: dict[_Membership, None] = {}

    @property
    def awaiting_reply(self) -> bool:
        """Whether a request has no reply."""
        return bool(self._joins or self._leaves)

    @property
    def retry_pending(self) -> bool:
        """Whether a membership waits for `retry`."""
        return bool(self._to_retry)

    # Calls of the application

    def join(self, handle: MembershipHandle, info: Raw, wake: Callable[[], None] = _do_nothing) -> PendingReply[str]:
        """Join the channel of a handle, or update the info there.

        The reply is `Refused` at once if the broker allows no more channels.
        """
        reply: PendingReply[str] = PendingReply(wake)
        limits = {} if self._connection is None else self._connection.limits
        most = limits.get("joined_channels", len(self._by_channel) + 1)
        if handle.channel not in self._by_channel and len(self._by_channel) >= most:
            reply.settle(Refused(ErrorCode.LIMIT, f"the broker allows a client to join {most} channels, and not more"))
            return reply
        membership = self._by_channel.setdefault(handle.channel, _Membership(handle.channel))
        membership.handles[handle] = None
        self._send_join(_JoinRequest(membership, info, [reply]))
        return reply

    def leave(self, handle: MembershipHandle) -> None:
        """End a handle. The session leaves the channel with the last one."""
        membership = self._by_channel.get(handle.channel)
        if membership is None or handle not in membership.handles:
            return
        del membership.handles[handle]
        if not membership.handles:
            self._forget(membership)
            self._send_leave(handle.channel)

    def retry(self) -> None:
        """Join again where the broker could not do it."""
        again, self._to_retry = self._to_retry, {}
        for membership in again:
            if not self._is_requested(membership):
                self._join_again(membership)

    # Changes of the connection

    def resume(self, connection: RequestSender) -> None:
        """Join all channels over a new connection."""
        self._connection = connection
        self._leaves.clear()
        self._to_retry.clear()
        requests, self._joins = self._joins, {}
        for membership in self._by_channel.values():
            waiting = [request for request in requests.values() if request.membership is membership]
            if waiting:
                replies = [reply for request in waiting for reply in request.replies]
                self._send_join(_JoinRequest(membership, waiting[-1].info, replies))
            else:
                self._join_again(membership)

    def wake_all(self) -> None:
        """Wake all waiting tasks, because there will be no further connection. They find that out themselves."""
        for request in self._joins.values():
            for reply in request.replies:
                reply.wake()

    # Replies of the broker

    def handle_joined(self, reply: wire.Joined) -> None:
        request = self._joins.pop(reply.id, None)  # type: ignore[arg-type]  # no id is None
        if request is not None:
            request.membership.accepted, request.membership.joined_on = request.info, self._connection
            for waiting in request.replies:
                waiting.settle(reply.channel)

    def handle_left(self, reply: wire.Left) -> None:
        """Handle the end of a membership: requested, or because the read permission was withdrawn."""
        membership = self._by_channel.get(reply.channel)
        if reply.id is not None:
            self._leaves.discard(reply.id)
        elif membership is not None:
            membership.joined_on = None
            # The reply to a `join` that the broker receives later counts.
            if not self._is_requested(membership):
                self._end(membership, Refused(ErrorCode.REVOKED, "the permission was withdrawn"))

    def handle_error(self, number: int | None, reason: Refused) -> bool:
        """Handle the rejection of a request. Returns False if no request without a reply has this id."""
        if number in self._leaves:
            self._leaves.discard(number)
            return True
        request = self._joins.pop(number, None)  # type: ignore[arg-type]
        if request is None:
            return False
        for reply in request.replies:
            reply.settle(reason)
        membership = request.membership
        is_current = self._by_channel.get(membership.channel) is membership
        if not is_current or membership.accepted is None or membership.joined_on is self._connection:
            # The session is a member all the same, or its first `join` was rejected, which the waiting task handles.
            return True
        if request.info is not membership.accepted:
            self._join_again(membership)
        elif reason.code in RETRYABLE:
            self._to_retry[membership] = None
            self._on_retry()
        else:
            self._end(membership, reason)
        return True

    # Helpers

    def _is_requested(self, membership: _Membership) -> bool:
        return any(request.membership is membership for request in self._joins.values())

    def _join_again(self, membership: _Membership) -> None:
        if membership.accepted is not None:
            self._send_join(_JoinRequest(membership, membership.accepted, []))

    def _send_join(self, request: _JoinRequest) -> None:
        number = self._next_id()
        self._joins[number] = request
        if self._connection is not None:
            info = UNSET if request.info == NO_INFO else request.info
            self._connection.send_request(wire.Join(request.membership.channel, info, number))

    def _send_leave(self, channel: str) -> None:
        if self._connection is not None:
            number = self._next_id()
            self._leaves.add(number)
            self._connection.send_request(wire.Leave(channel, number))

    def _end(self, membership: _Membership, error: Refused) -> None:
        """End a membership for the application, and also at the broker if a `join` is on its way."""
        for handle in membership.handles:
            handle.error = error
        self._forget(membership)
        if self._is_requested(membership):
            self._send_leave(membership.channel)

    def _forget(self, membership: _Membership) -> None:
        del self._by_channel[membership.channel]
        self._to_retry.pop(membership, None)
