"""The messages of a broker, decoded directly into the objects that the application receives."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple, get_args

import msgspec
from msgspec import UNSET, Raw, Struct

from ..error_codes import ErrorCode
from ..errors import PeerError
from ..protocol import wire_messages as wire
from ..protocol.wire_messages import Gap, GoAway, Head, Live, Reply
from .argument_checks import encode_cursor

__all__ = [
    "Gap",
    "GoAway",
    "Head",
    "Live",
    "MemberKey",
    "Message",
    "Page",
    "PresentMember",
    "ServerMessage",
    "SnapshotPage",
    "decode",
    "encode_payload",
]


class Message(Struct, tag="message", frozen=True, dict=True, rename={"raw": "payload"}):
    """One message of one subscription.

    `at` is in milliseconds since 1970 by the clock of the broker. An ephemeral message has no `seq`. `sender` is the
    client_id of the publisher, or None. `epoch` is the epoch of the log in which it has its `seq`. `raw` is the payload
    as JSON, and may be part of a payload that is published again. `retain`: it was published with `retain`.
    """

    channel: str
    raw: Raw
    pattern: str | None = None
    seq: int | None = None
    at: int | None = None
    sender: str | None = None
    epoch: str = ""
    retain: bool = False

    @property
    def cursor(self) -> str | None:
        """The position after this message, as opaque text for `since`. None for an ephemeral message."""
        return None if self.seq is None else encode_cursor(self.seq, self.epoch)

    @cached_property
    def payload(self) -> Any:
        """The payload, decoded on first access.

        Integers of up to 4,300 digits are exact. Other numbers become the nearest `float`, or infinity.
        """
        return wire.decode_payload(self.raw)

    @property
    def data(self) -> bytes:
        """The payload as it was published: JSON in UTF-8."""
        return bytes(self.raw)

    def __repr__(self) -> str:
        return f"<Message {self.seq} on {self.channel}: {self.data.decode()}>"


class Page(Reply, tag="history"):
    """A page of messages from the log, oldest first. `more`: there are older ones.

    `cursor` is the position after the newest of them, as opaque text for `since`.
    """

    messages: list[Message]
    more: bool
    id: int | None = None
    cursor: str = ""


class SnapshotPage(Reply, tag="retained"):
    """A page of the retained messages of one subscription. `complete`: it is the last one."""

    pattern: str
    messages: list[Message]
    complete: bool


class MemberKey(NamedTuple):
    """Identifies a member: by the client_id of its sessions, or by its only session if that has none."""

    channel: str
    client_id: str | None
    session: str | None


class PresentMember(Struct, frozen=True):
    """A member of a channel.

    `sessions` is the number of its sessions there. `info` is the JSON value that the newest of them has given, or None.
    """

    channel: str
    sessions: int
    client_id: str | None = None
    session: str | None = None
    info: Any = None

    @property
    def key(self) -> MemberKey:
        """What identifies the member as long as it is there."""
        return MemberKey(self.channel, self.client_id, self.session)

    @classmethod
    def read(cls, found: wire.ChannelMember | wire.PresenceChange) -> PresentMember:
        info = None if found.info is UNSET else wire.decode_payload(found.info)
        return cls(found.channel, found.sessions, found.client_id, found.session, info)


ServerMessage = (
    wire.AuthOk
    | wire.AuthError
    | wire.Subscribed
    | wire.Unsubscribed
    | wire.SubscribeError
    | wire.Published
    | wire.PublishError
    | Message
    | wire.Live
    | wire.Head
    | wire.Gap
    | wire.Revoked
    | Page
    | SnapshotPage
    | wire.Joined
    | wire.Left
    | wire.MemberList
    | wire.PresenceChange
    | wire.GoAway
    | wire.Pong
    | wire.Error
)

_decoder = msgspec.json.Decoder(ServerMessage)
_text = msgspec.json.Decoder(str)
_TYPES = frozenset(kind.__struct_config__.tag for kind in get_args(ServerMessage))


def decode(data: bytes) -> ServerMessage | None:
    """Decode one whole object. Returns None for an unknown type, which is to be ignored.

    An error with an unknown code is decoded as `internal`. Raises one of `wire.UNDECODABLE`.
    """
    if not data.isascii():
        data.decode()
    try:
        return wire.decode_last(_decoder.decode, data)
    except msgspec.ValidationError:
        pairs = wire.decode_pairs(data)
        if _read(pairs, "type") not in _TYPES:
            return None
        if _read(pairs, "code") in list(ErrorCode):
            raise
        pairs["code"] = Raw(wire.to_json(ErrorCode.INTERNAL))
        return _decoder.decode(wire.to_json(pairs))


def _read(pairs: dict[str, Raw], name: str) -> str | None:
    """Return the value of a name if it is text."""
    try:
        return _text.decode(pairs.get(name, b""))
    except msgspec.DecodeError:
        return None


def encode_payload(value: Any) -> Raw:
    """Encode a value as JSON. A `msgspec.Raw` is JSON already, and is only checked. Raises `TypeError`."""
    try:
        if isinstance(value, Raw):
            return Raw(wire.check_payload(bytes(value)))
        return Raw(wire.to_json(value))
    except (TypeError, ValueError, OverflowError, RecursionError, PeerError) as error:
        raise TypeError(f"the payload has no JSON form: {error}") from error
