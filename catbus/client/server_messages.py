"""The messages of a broker, decoded directly into the objects that the application receives."""

from __future__ import annotations

from functools import cached_property
from typing import Any, get_args

import msgspec
from msgspec import Raw, Struct

from ..error_codes import ErrorCode
from ..errors import PeerError
from ..protocol import wire_messages as wire
from ..protocol.wire_messages import Gap, GoAway, Head, Live, Reply
from .argument_checks import encode_cursor

__all__ = ["Gap", "GoAway", "Head", "Live", "Message", "Page", "ServerMessage", "decode", "encode_payload"]


class Message(Struct, tag="message", frozen=True, dict=True, rename={"raw": "payload"}):
    """One message of one subscription.

    `at` is in milliseconds since 1970 by the clock of the broker. An ephemeral message has no `seq`. `sender` is the
    client_id of the publisher, or None. `epoch` is the epoch of the log in which it has its `seq`. `raw` is the payload
    as JSON, and may be part of a payload that is published again.
    """

    channel: str
    raw: Raw
    pattern: str | None = None
    seq: int | None = None
    at: int | None = None
    sender: str | None = None
    epoch: str = ""

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
