"""What a broker says, as the client takes it in: a message is decoded straight into what the application gets."""

from __future__ import annotations

from functools import cached_property
from typing import Any, get_args

import msgspec
from msgspec import Raw, Struct

from ..errors import ErrorCode, PeerError
from ..protocol import wire_messages as wire
from ..protocol.wire_messages import Gap, GoAway, Head, Live, Reply
from .argument_checks import encode_cursor

__all__ = ["Gap", "GoAway", "Head", "Live", "Message", "Page", "ServerMessage", "decode", "encode_payload"]


class Message(Struct, tag="message", frozen=True, dict=True, rename={"raw": "payload"}):
    """One message of one subscription.

    `at` is in milliseconds since 1970 by the broker's clock. An ephemeral message has no `seq`. `sender` is the
    publisher's client_id, where it has one. `epoch` is that of the log in which it has its `seq`. `raw` may stand
    inside a payload that is published again.
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
        """The place after this message, as opaque text that `since` takes. An ephemeral message has none."""
        return None if self.seq is None else encode_cursor(self.seq, self.epoch)

    @cached_property
    def payload(self) -> Any:
        """The payload, decoded when it is first asked for.

        Integers are exact up to 4,300 digits. Of other numbers it is the nearest `float`, infinity beyond them.
        """
        return wire.decode_payload(self.raw)

    @property
    def data(self) -> bytes:
        """The payload as it was published: JSON in UTF-8."""
        return bytes(self.raw)

    def __repr__(self) -> str:
        return f"<Message {self.seq} on {self.channel}: {self.data.decode()}>"


class Page(Reply, tag="history"):
    """Messages from the log, oldest first, and whether there are more before them.

    `cursor` is the place after the newest of them, as opaque text that `since` takes.
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
    """Decode one whole object; None for one of a type that is not known here, which is to be ignored.

    A refusal with a code that is not known here comes as `internal`. Raises what `wire.UNDECODABLE` names.
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
    """The text under a name, if that is what stands there."""
    try:
        return _text.decode(pairs.get(name, b""))
    except msgspec.DecodeError:
        return None


def encode_payload(value: Any) -> Raw:
    """A value as JSON. A `msgspec.Raw` is taken to be JSON already, and checked. Raises `TypeError`."""
    try:
        if isinstance(value, Raw):
            return Raw(wire.check_payload(bytes(value)))
        return Raw(wire.to_json(value))
    except (TypeError, ValueError, OverflowError, RecursionError, PeerError) as error:
        raise TypeError(f"the payload has no JSON form: {error}") from error
