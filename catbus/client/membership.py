"""The `Membership` of a channel."""

from __future__ import annotations

from typing import Any

from msgspec import Raw

from ..error_codes import ErrorCode
from ..errors import Refused
from ..protocol import wire_messages as wire
from .channel_memberships import MAX_INFO, MembershipHandle
from .connection_supervisor import ConnectionSupervisor
from .server_messages import encode_payload
from .signals import Signal


class Membership:
    """The membership of one channel, which `Bus.join` makes. It continues on each next connection."""

    def __init__(self, handle: MembershipHandle, supervisor: ConnectionSupervisor) -> None:
        self._handle = handle
        self._supervisor = supervisor

    @property
    def channel(self) -> str:
        return self._handle.channel

    @property
    def error(self) -> Refused | None:
        """Why the broker has ended the membership: the code is `revoked`, or that of the next connection."""
        return self._handle.error

    async def update(self, info: Any) -> None:
        """Replace the info that other members see. Returns when the broker has accepted it.

        Raises `Refused`: the info is the one before, or the membership has an `error`. Raises `TypeError` for an info
        that has no JSON form. After a cancellation the info may be either.
        """
        if self._handle.error is not None:
            raise Refused(self._handle.error.code, self._handle.error.message)
        await send_info(self._supervisor, self._handle, encode_info(info))


def encode_info(info: Any) -> Raw:
    """Encode the info of a member. Raises `Refused` and `TypeError`."""
    raw = encode_payload(info)
    if len(raw) > MAX_INFO:
        raise Refused(ErrorCode.TOO_LARGE, f"the info is larger than {MAX_INFO} bytes")
    if wire.depth(bytes(raw)) >= wire.MAX_DEPTH:
        raise Refused(ErrorCode.BAD_MESSAGE, f"the info is nested {wire.MAX_DEPTH} levels deep or more")
    return raw


async def send_info(supervisor: ConnectionSupervisor, handle: MembershipHandle, info: Raw) -> None:
    """Join the channel of a handle, or update the info there. Raises `Refused` and `Disconnected`."""
    signal = Signal()
    reply = supervisor.memberships.join(handle, info, signal.notify)
    supervisor.signals.notify_request()
    while reply.value is None:
        supervisor.check_not_closed()
        await signal.wait()
    if isinstance(reply.value, Refused):
        raise reply.value
