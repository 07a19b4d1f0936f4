"""The blocks of an event stream (WHATWG HTML, section 9.2): what a session sends to an `EventSource`. Pure.

`id` is `SEQ.EPOCH`: the stream is complete up to that message, so `Last-Event-ID` resumes after it. A block of `id`
alone moves it and fires no event. Messages have no `event` field; what else a page may want to know is a named event.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .wire_messages import (
    Gap,
    GoAway,
    Head,
    Live,
    MemberList,
    PresenceChange,
    ProtocolVersion,
    Reply,
    Retained,
    Revoked,
    encode,
    encode_message_object,
    to_json,
)

COMMENT = b":\n\n"
"""A block without content. It keeps the connection alive while the position cannot be told."""


def event(name: str, data: Any, identifier: bytes = b"") -> bytes:
    """Encode a named event with JSON data. `identifier` is the line of `id_line`, if it has one."""
    return b"event: %b\n%bdata: %b\n\n" % (name.encode(), identifier, to_json(data))


def id_line(seq: int, epoch: str) -> bytes:
    return b"id: %d.%b\n" % (seq, epoch.encode())


def retry_block(seconds: float) -> bytes:
    """Encode the time after which a client reconnects. It applies until the next such block, also in later streams."""
    return b"retry: %d\n\n" % (seconds * 1000)


def encode_reply(
    reply: Reply, protocol: ProtocolVersion, epoch: str = "", *, snapshot_follows: bool = False
) -> bytes | None:
    """Encode a reply for a session. None if its version of the protocol has no such reply. `live` needs the `epoch`."""
    if protocol is ProtocolVersion.EVENTS:
        return encode_event(reply, epoch, snapshot_follows=snapshot_follows)
    return encode(reply, protocol)


def encode_event(reply: Reply, epoch: str, *, snapshot_follows: bool = False) -> bytes | None:
    """Encode a reply as a block. None if an event stream has no such reply. `epoch` is that of the log now.

    With `snapshot_follows`, a `gap` has no id: a client that resumed after it would not get the snapshot.
    """
    match reply:
        case Head():
            return id_line(reply.seq, reply.epoch) + b"\n"
        case Live():
            return event("live", {"seq": reply.seq, "epoch": epoch}, id_line(reply.seq, epoch))
        case Gap():
            data = {"from": reply.first, "to": reply.last, "epoch": reply.epoch, "reason": reply.reason}
            return event("gap", data, b"" if snapshot_follows else id_line(reply.last, reply.epoch))
        case Retained():
            return encode_retained_event([to_json(message) for message in reply.messages], reply.complete)
        case Revoked():
            return event("revoked", {"pattern": reply.pattern, "seq": reply.seq})
        case MemberList(pattern=str()):
            return event("members", reply)
        case PresenceChange():
            return event("presence", reply)
        case GoAway():
            return event("goaway", {"reason": reply.reason, "reconnect_in": reply.reconnect_in})
        case _:
            return None


def encode_message_event(
    channel: str, payload: bytes, seq: int, at: int, sender: str | None, epoch: bytes, retain: bool = False
) -> bytes:
    """Encode a message as an event without a name. A `seq` of 0 is an ephemeral message: it moves no position."""
    if not seq:
        name = b"" if sender is None else b',"sender":' + to_json(sender)
        return b'data: {"type":"message","channel":"%b","payload":%b,"at":%d%b}\n\n' % (
            channel.encode(),
            payload,
            at,
            name,
        )
    return b"id: %d.%b\ndata: %b\n\n" % (
        seq,
        epoch,
        encode_message_object(channel, payload, seq, at, sender, retain),
    )


def encode_retained_event(messages: Iterable[bytes], complete: bool) -> bytes:
    """Encode a page of retained messages, which are encoded already. It has no id: see `encode_event`."""
    end = b"true" if complete else b"false"
    return b'event: retained\ndata: {"messages":[%b],"complete":%b}\n\n' % (b",".join(messages), end)
