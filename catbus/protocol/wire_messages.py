"""The messages of `catbus.v1`: their fields, and how they are decoded and encoded.

`protocol/README.md` is the specification. A reply lists in `fixed` the fields that a first-version client knows. A
reply without `fixed` is never sent to such a client.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from ..error_codes import ErrorCode
from ..errors import PeerError

MAX_DEPTH = 64
"""Levels to which a message may be nested."""

M = TypeVar("M")

MAX_NUMBER = 2**63 - 1
"""The largest seq, and the largest id of a request."""

Number = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]


class ProtocolVersion(IntEnum):
    """The version of the specification that a client knows, as it says in `auth`; EVENTS is an event stream."""

    FIRST = 0
    V1 = 1
    EVENTS = 2


# From the client


class Request(Struct, omit_defaults=True):
    """A message from a client."""


class Auth(Request, tag="auth"):
    token: str
    protocol: int = 0
    producer: str | None = None


class Subscribe(Request, tag="subscribe"):
    pattern: str
    since: Number | None = None
    epoch: str | None = None
    stream: bool = False
    datagrams: bool = False
    retained: bool = False
    presence: bool = False
    id: Number | None = None


class Unsubscribe(Request, tag="unsubscribe"):
    pattern: str
    id: Number | None = None


class Publish(Request, tag="publish"):
    channel: str
    payload: Raw
    id: Number | None = None
    retry: bool = False
    after: Number | None = None
    epoch: str | None = None
    ephemeral: bool = False
    echo: bool = True
    ack: bool = True
    retain: bool = False
    expect: Number | None = None


class History(Request, tag="history"):
    pattern: str
    limit: Annotated[int, Meta(ge=1)] = 100
    before: Number | None = None
    id: Number | None = None


class Join(Request, tag="join"):
    """Become a member of a channel. Without `info`, or with `null`, the member has none."""

    channel: str
    info: Raw | UnsetType = UNSET
    id: Number | None = None


class Leave(Request, tag="leave"):
    channel: str
    id: Number | None = None


class ListMembers(Request, tag="members"):
    pattern: str
    limit: Annotated[int, Meta(ge=1)] = 100
    after: str | None = None
    id: Number | None = None


class Ping(Request, tag="ping"):
    seq: int


ClientMessage = Auth | Subscribe | Unsubscribe | Publish | History | Join | Leave | ListMembers | Ping


# From the server


class Reply(Struct, omit_defaults=True):
    """A message from a server."""

    fixed: ClassVar[tuple[str, ...] | None] = None


class AuthOk(Reply, tag="auth_ok"):
    client_id: str | None
    producer: str = ""
    epoch: str = ""
    head: int | None = None
    floor: int | None = None
    limits: dict[str, int] = {}
    fixed = ("client_id",)


class AuthError(Reply, tag="auth_error"):
    message: str
    code: ErrorCode
    retry_after: float | None = None
    fixed = ("message",)


class Subscribed(Reply, tag="subscribed"):
    pattern: str
    seq: int
    stream: bool = False
    epoch: str | None = None
    id: int | None = None
    fixed = ("pattern",)


class Unsubscribed(Reply, tag="unsubscribed"):
    """The end of a subscription. `id` is that of the `unsubscribe`; none if the peer stopped the stream instead."""

    pattern: str
    seq: int
    id: int | None = None
    fixed = ("pattern",)


class SubscribeError(Reply, tag="subscribe_error"):
    pattern: str
    message: str
    code: ErrorCode
    id: int | None = None
    fixed = ("pattern", "message")


class Published(Reply, tag="published"):
    channel: str
    id: int | None = None
    seq: int | None = None
    duplicate: bool = False
    fixed = ("channel",)


class PublishError(Reply, tag="publish_error"):
    channel: str
    message: str
    code: ErrorCode
    id: int | None = None
    retry_after: float | None = None
    seq: int | None = None
    fixed = ("channel", "message")


class ChannelMessage(Reply, tag="message"):
    """A published message, for one subscription. `at`: milliseconds since 1970. An ephemeral one has no `seq`."""

    channel: str
    payload: Raw
    pattern: str | None = None
    seq: int | None = None
    at: int | None = None
    sender: str | None = None
    retain: bool = False
    fixed = ("channel", "payload")


class Retained(Reply, tag="retained"):
    """A page of the retained messages that match one pattern, in the order of their channels. They have no pattern."""

    pattern: str
    messages: list[ChannelMessage]
    complete: bool


class Live(Reply, tag="live"):
    pattern: str
    seq: int


class Head(Reply, tag="head"):
    seq: int
    epoch: str
    at: int


class Gap(Reply, tag="gap", rename={"first": "from", "last": "to"}):
    pattern: str
    first: int
    last: int
    epoch: str
    reason: str


class Revoked(Reply, tag="revoked"):
    pattern: str
    seq: int


class HistoryPage(Reply, tag="history"):
    messages: list[ChannelMessage]
    more: bool
    id: int | None = None


class Joined(Reply, tag="joined"):
    channel: str
    id: int | None = None


class Left(Reply, tag="left"):
    channel: str
    id: int | None = None


class ChannelMember(Struct, omit_defaults=True):
    """A member of a channel: all sessions of a client, or one session without a client_id."""

    channel: str
    sessions: int
    client_id: str | None = None
    session: str | None = None
    info: Raw | UnsetType = UNSET


class MemberList(Reply, tag="members"):
    """A page of members: the reply to `members`, or with a `pattern` a part of the snapshot for its subscription."""

    members: list[ChannelMember]
    pattern: str | None = None
    complete: bool = False
    next: str | None = None
    id: int | None = None


class PresenceChange(Reply, tag="presence"):
    """A change of a member. `action`: `join`, `update` or `leave`."""

    pattern: str
    action: str
    channel: str
    sessions: int
    client_id: str | None = None
    session: str | None = None
    info: Raw | UnsetType = UNSET


class GoAway(Reply, tag="goaway"):
    reason: str
    reconnect_in: float


class Pong(Reply, tag="pong"):
    seq: int
    fixed = ("seq",)


class Error(Reply, tag="error"):
    """An error without a message type of its own.

    `id` is that of the rejected `history`, `join`, `leave` or `members`, or of an object that does not decode, if it
    can be read.
    """

    message: str
    code: ErrorCode
    id: int | None = None
    fixed = ("message",)


ERROR_REPLIES = AuthError, SubscribeError, PublishError, Error
"""The replies that report an error."""


ServerMessage = (
    AuthOk
    | AuthError
    | Subscribed
    | Unsubscribed
    | SubscribeError
    | Published
    | PublishError
    | ChannelMessage
    | Retained
    | Live
    | Head
    | Gap
    | Revoked
    | HistoryPage
    | Joined
    | Left
    | MemberList
    | PresenceChange
    | GoAway
    | Pong
    | Error
)

_client_decoder: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(ClientMessage)
_publish_decoder = msgspec.json.Decoder(Publish)
_server_decoder: msgspec.json.Decoder[ServerMessage] = msgspec.json.Decoder(ServerMessage)
_pairs_decoder = msgspec.json.Decoder(dict[str, Raw])
_encoder = msgspec.json.Encoder()


def decode_client(data: bytes) -> ClientMessage:
    """Decode one whole object from a client.

    Raises `msgspec.DecodeError`, `UnicodeDecodeError` or `RecursionError`; `decoding_error` makes a reply of them.
    """
    _check_text(data)
    # The same as `decode_last`, without a call: this runs for every object of every client.
    try:
        return _client_decoder.decode(data)
    except msgspec.ValidationError:
        return _decode_pairwise(_client_decoder.decode, data)


def decode_publish(data: bytes) -> Publish:
    """Decode a publish whose `type` may be missing, as nothing else is allowed. Raises as `decode_client` does."""
    _check_text(data)
    return decode_last(_publish_decoder.decode, data)


def decode_server(data: bytes) -> ServerMessage:
    """Decode one whole object from a server. Raises as `decode_client` does."""
    _check_text(data)
    return decode_last(_server_decoder.decode, data)


def decode_last(decode: Callable[[bytes], M], data: bytes) -> M:
    """Decode an object. If a name stands twice, its last value counts, as in `JSON.parse`.

    msgspec takes the last value, too, but requires that the earlier ones have the right type, and that every `type` is
    the same. To look for repeated names in each object would cost more than decoding it.
    """
    try:
        return decode(data)
    except msgspec.ValidationError:
        return _decode_pairwise(decode, data)


def _decode_pairwise(decode: Callable[[bytes], M], data: bytes) -> M:
    """Decode an object from which all but the last value of each name were removed."""
    return decode(_encoder.encode(decode_pairs(data)))


def decode_pairs(data: bytes) -> dict[str, Raw]:
    """Decode an object into the last value of each name, as raw JSON. Raises as `decode_client` does."""
    return _pairs_decoder.decode(data)


UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decoding_error(error: Exception, data: bytes = b"") -> PeerError:
    """Make the reply to `data`, an object that could not be decoded."""
    match error:
        case RecursionError():
            text = f"nested deeper than {MAX_DEPTH}"
        case UnicodeDecodeError():
            text = "not valid UTF-8"
        case _:
            text = clip(str(error))
    return PeerError(ErrorCode.BAD_MESSAGE, text, id=_find_id(data))


def _find_id(data: bytes) -> int | None:
    """Read the `id` of an object that does not decode, if possible: its sender waits for a reply.

    The standard library reads objects that msgspec does not: with half of a surrogate pair, or not in UTF-8.
    """
    try:
        found = json.loads(data.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    number = found.get("id") if isinstance(found, dict) else None
    return number if type(number) is int and 0 <= number < 2**63 else None


def clip(text: str) -> str:
    """Shorten a text of a peer so that it can be repeated in a reply."""
    return text if len(text) <= 255 else text[:252] + "..."


def _check_text(data: bytes) -> None:
    # msgspec does not check the UTF-8 of a Raw value, and a browser closes the connection if it is wrong.
    if not data.isascii():
        data.decode()
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and depth(data) > MAX_DEPTH:
        raise RecursionError


_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]+|[\]}]+', re.DOTALL)


def depth(data: bytes) -> int:
    """The number of levels to which the arrays and objects of a JSON text are nested."""
    deepest = level = 0
    for token in _BRACKETS.finditer(data):
        first, width = token[0][0], token.end() - token.start()
        if first in b"[{":
            level += width
            deepest = max(deepest, level)
        elif first in b"]}":
            level -= width
    return deepest


_LINE_BREAKS = bytes.maketrans(b"\r\n", b"  ")


def payload_bytes(raw: Raw | bytes) -> bytes:
    """A payload as it is stored and sent: the client's bytes, with a space for each line break."""
    data = bytes(raw)
    return data.translate(_LINE_BREAKS) if b"\n" in data or b"\r" in data else data


def check_payload(data: bytes) -> bytes:
    """Check and normalize a payload that did not come in a `publish`. Raises `PeerError`."""
    try:
        _check_text(data)
        return payload_bytes(msgspec.json.decode(data, type=Raw))
    except UNDECODABLE as error:
        raise PeerError(ErrorCode.BAD_MESSAGE, f"the payload is not JSON: {decoding_error(error).message}") from None


def decode_payload(data: bytes | Raw) -> Any:
    """Decode a payload. A number that is too large becomes infinity, as in `JSON.parse`.

    An integer is exact up to the number of digits that Python reads (4,300, unless it was configured).
    """
    try:
        return msgspec.json.decode(data)
    except msgspec.ValidationError:
        return json.loads(bytes(data), parse_int=_read_integer)


def _read_integer(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def encode(message: Request | Reply, protocol: ProtocolVersion = ProtocolVersion.V1) -> bytes | None:
    """Encode a message as a line, with its line break. None if it must not be sent to a first-version client."""
    if protocol == ProtocolVersion.FIRST and isinstance(message, Reply):
        if isinstance(message, Revoked):
            message = SubscribeError(message.pattern, "the permission was withdrawn", ErrorCode.REVOKED)
        if message.fixed is None:
            return None
        known = {name: getattr(message, name) for name in message.fixed}
        return _encoder.encode({"type": type(message).__struct_config__.tag, **known}) + b"\n"
    return _encoder.encode(message) + b"\n"


def encode_message(
    channel: str, payload: bytes, pattern: str, seq: int | None, at: int, sender: str | None, retain: bool = False
) -> bytes:
    """Encode the `message` line of an entry for a pattern, like `encode`, but several times faster."""
    number = b"" if seq is None else b',"seq":%d' % seq
    name = b"" if sender is None else b',"sender":' + _encoder.encode(sender)
    return b'{"type":"message","channel":"%b","payload":%b,"pattern":"%b"%b,"at":%d%b%b}\n' % (
        channel.encode(),
        payload,
        pattern.encode(),
        number,
        at,
        name,
        b',"retain":true' if retain else b"",
    )


def encode_message_object(channel: str, payload: bytes, seq: int, at: int, sender: str | None, retain: bool) -> bytes:
    """Encode a `message` of the log without a pattern, as it is in an event or in a page, like `encode`."""
    name = b"" if sender is None else b',"sender":' + _encoder.encode(sender)
    return b'{"type":"message","channel":"%b","payload":%b,"seq":%d,"at":%d%b%b}' % (
        channel.encode(),
        payload,
        seq,
        at,
        name,
        b',"retain":true' if retain else b"",
    )


def encode_retained(pattern: str, messages: Iterable[bytes], complete: bool) -> bytes:
    """Encode a `retained` line of messages that are encoded already."""
    end = b"true" if complete else b"false"
    return b'{"type":"retained","pattern":"%b","messages":[%b],"complete":%b}\n' % (
        pattern.encode(),
        b",".join(messages),
        end,
    )


def encode_first_version_message(channel: str, payload: bytes) -> bytes:
    """Encode the `message` line of an entry for a first-version client."""
    return b'{"type":"message","channel":"%b","payload":%b}\n' % (channel.encode(), payload)


def to_json(value: Any) -> bytes:
    """Encode a Python value as JSON. Raises `TypeError` for a value without a JSON form."""
    return _encoder.encode(value)
