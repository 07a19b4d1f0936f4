"""The effects of a session's state machine: what it asks its driver to do.

The driver takes them one by one, and carries each out before it takes the next:

    VerifyToken        call `accept_token` or `reject_token`, unless the session is `closed` by then
    StartSubscription  call `subscribed`, then deliver the messages that match
    EndSubscription    call `remove_subscription`, stop delivering, then call `unsubscribed`
    AppendMessage      append to the log, which calls `settle`
    BroadcastMessage   pass the message on, once
    CheckPublish       call the hook `on_publish`, and note in the effect what it decided
    ReadHistory        read the history, then call `send_history` or `reject_request`
    JoinChannel        make the session a member, then call `joined`, or call `reject_request`
    LeaveChannel       end the membership, then call `left`
    ReadMembers        read the members, then call `send_members` or `reject_request`
    SendHeads          send `head` on every stream whose subscriptions are live
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PeerError
from ..log import Append
from ..protocol import wire_messages as wire


@dataclass(frozen=True, slots=True)
class VerifyToken:
    token: str
    producer: str | None


@dataclass(frozen=True, slots=True)
class StartSubscription:
    request: wire.Subscribe


@dataclass(frozen=True, slots=True)
class EndSubscription:
    request: wire.Unsubscribe


@dataclass(frozen=True, slots=True)
class AppendMessage:
    append: Append
    epoch: str | None
    """For a retry: the epoch that the client knew when it first sent the publish."""


@dataclass(frozen=True, slots=True)
class BroadcastMessage:
    channel: str
    payload: bytes
    sender: str | None
    origin: bytes | None


@dataclass(slots=True)
class CheckPublish:
    message: wire.Publish
    rejection: PeerError | None = None
    replaced: bool = False
    """Whether the message has another payload now."""


@dataclass(frozen=True, slots=True)
class ReadHistory:
    request: wire.History


@dataclass(frozen=True, slots=True)
class JoinChannel:
    request: wire.Join
    info: bytes | None


@dataclass(frozen=True, slots=True)
class LeaveChannel:
    request: wire.Leave


@dataclass(frozen=True, slots=True)
class ReadMembers:
    request: wire.ListMembers


@dataclass(frozen=True, slots=True)
class SendHeads:
    """The client has sent `ping`."""


Effect = (
    VerifyToken
    | StartSubscription
    | EndSubscription
    | AppendMessage
    | BroadcastMessage
    | CheckPublish
    | ReadHistory
    | JoinChannel
    | LeaveChannel
    | ReadMembers
    | SendHeads
)
