"""Decoding of server messages, and encoding of payloads, by the client."""

from __future__ import annotations

import datetime
from typing import Any

import msgspec
import pytest

from catbus.client.server_messages import Message, Page, decode, encode_payload
from catbus.error_codes import ErrorCode
from catbus.protocol import wire_messages as wire
from catbus.protocol.wire_messages import UNDECODABLE


def test_message_keeps_its_payload_as_published() -> None:
    item = decode(
        b'{"type":"message","channel":"a.b","payload":{"n": 1.50},"pattern":"a.*","seq":7,"at":5,"sender":"bob"}'
    )
    assert isinstance(item, Message)
    assert item.data == b'{"n": 1.50}'
    assert item.payload == {"n": 1.5}
    assert (item.channel, item.pattern, item.seq, item.at, item.sender) == ("a.b", "a.*", 7, 5, "bob")
    assert repr(item) == '<Message 7 on a.b: {"n": 1.50}>'


def test_payload_is_decoded_once() -> None:
    item = decode(b'{"type":"message","channel":"a","payload":[1]}')
    assert isinstance(item, Message)
    assert item.payload is item.payload


def test_ephemeral_message_has_no_seq() -> None:
    item = decode(b'{"type":"message","channel":"a","payload":1,"pattern":"a","at":5}')
    assert isinstance(item, Message)
    assert item.seq is None
    assert item.sender is None


def test_every_server_message_is_decoded() -> None:
    raw = msgspec.Raw(b"1")
    spoken: list[wire.Reply] = [
        wire.AuthOk("alice", "p", "e", 1, 1, {"message_size": 5}),
        wire.AuthError("no", ErrorCode.UNAUTHENTICATED),
        wire.Subscribed("a", 1),
        wire.Unsubscribed("a", 1),
        wire.SubscribeError("a", "no", ErrorCode.UNAUTHORIZED),
        wire.Published("a", 1, 2, True),
        wire.PublishError("a", "no", ErrorCode.RATE_LIMITED, 1, 2.5),
        wire.Live("a", 1),
        wire.Head(1, "e", 2),
        wire.Gap("a", 1, 2, "e", "retention"),
        wire.Revoked("a", 1),
        wire.GoAway("bye", 1.5),
        wire.Pong(1),
        wire.Error("no", ErrorCode.INTERNAL, 3),
    ]
    for reply in spoken:
        line = wire.encode(reply)
        assert line is not None
        assert decode(line) == reply
    line = wire.encode(wire.ChannelMessage("a", raw, "a", 1, 2, "bob"))
    assert line is not None
    assert decode(line) == Message("a", raw, "a", 1, 2, "bob")
    line = wire.encode(wire.HistoryPage([wire.ChannelMessage("a", raw, "a", 1, 2)], True, 4))
    assert line is not None
    assert decode(line) == Page([Message("a", raw, "a", 1, 2)], True, 4)


def test_unknown_type_is_ignored() -> None:
    assert decode(b'{"type":"weather","code":"sunny"}') is None
    assert decode(b'{"no":"type"}') is None


def test_unknown_field_is_ignored() -> None:
    assert decode(b'{"type":"pong","seq":1,"colour":"red"}') == wire.Pong(1)


def test_unknown_error_code_is_still_an_error() -> None:
    assert decode(
        b'{"type":"publish_error","channel":"a","message":"no","code":"too_loud","id":3}'
    ) == wire.PublishError("a", "no", ErrorCode.INTERNAL, 3)


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"published","channel":"a","id":"seven"}',
        b'{"type":"pong"}',
        b'{"type":"auth_error","message":5,"code":"internal"}',
        b'{"type":"message","channel":"a","payload":"\xff"}',
        b'{"type":"pong"',
        b"[]",
    ],
)
def test_invalid_message_is_an_error(line: bytes) -> None:
    with pytest.raises(UNDECODABLE):
        decode(line)


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ({"a": [1, None]}, b'{"a":[1,null]}'),
        ("ü", '"ü"'.encode()),
        (datetime.date(2026, 1, 2), b'"2026-01-02"'),
        (msgspec.Raw(b'{"a": 1.0,\n"a": 2}'), b'{"a": 1.0, "a": 2}'),
    ],
)
def test_payload_is_encoded_by_msgspec(value: Any, data: bytes) -> None:
    assert bytes(encode_payload(value)) == data


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, object()},
        "\ud800",
        {"a": object()},
        {(1, 2): 3},
        msgspec.Raw(b'1}{"type":"auth"'),
        msgspec.Raw(b"\xff"),
    ],
)
def test_payload_without_a_json_form_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="no JSON form"):
        encode_payload(value)


def test_payload_that_contains_itself_is_a_type_error() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(TypeError, match="no JSON form"):
        encode_payload(value)
