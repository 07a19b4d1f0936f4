"""catbus.protocol.wire_messages: encoding, decoding, first-version clients and rejected messages."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from catbus.error_codes import ErrorCode
from catbus.errors import PeerError
from catbus.protocol import wire_messages as wire
from catbus.protocol.wire_messages import MAX_DEPTH, ProtocolVersion, Reply, Request
from catbus.testing.strategies import JSON, channels, client_messages, messages, patterns, payloads, server_messages

REQUESTS: list[type[Request]] = list(get_args(wire.ClientMessage))
REPLIES: list[type[Reply]] = list(get_args(wire.ServerMessage))


def tag(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)


def encoded(message: Request | Reply, protocol: ProtocolVersion = ProtocolVersion.V1) -> bytes:
    line = wire.encode(message, protocol)
    assert line is not None
    return line


# Round trips


@given(client_messages())
def test_client_messages_survive_encoding_and_decoding(message: Request) -> None:
    assert wire.decode_client(encoded(message)) == message


@given(server_messages())
def test_server_messages_survive_encoding_and_decoding(message: Reply) -> None:
    assert wire.decode_server(encoded(message)) == message


@given(client_messages() | server_messages())
def test_encoded_message_is_one_line(message: Request | Reply) -> None:
    line = encoded(message)
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    assert json.loads(line)["type"] == tag(type(message))


@pytest.mark.parametrize("kind", [*REQUESTS, *REPLIES])
def test_unknown_fields_are_ignored(kind: type[Request | Reply]) -> None:
    decode: Any = wire.decode_client if issubclass(kind, Request) else wire.decode_server

    @given(messages(kind))
    def check(message: Request | Reply) -> None:
        extended = encoded(message).rstrip()[:-1] + b',"not_yet":[{"known":1}]}'
        assert decode(extended) == message

    check()


def test_gap_has_the_field_names_of_the_specification() -> None:
    line = encoded(wire.Gap("a.*", 3, 9, "e1", "retention"))
    assert json.loads(line) == {
        "type": "gap", "pattern": "a.*", "from": 3, "to": 9, "epoch": "e1", "reason": "retention",
    }  # fmt: skip


# Messages, encoded once for all who get them


@given(
    channel=channels(),
    payload=payloads(),
    pattern=patterns(),
    seq=st.none() | st.integers(1, 2**63 - 1),
    at=st.integers(0, 2**53),
    sender=st.none() | st.text(),
)
def test_fast_encoding_of_an_entry_equals_the_general_one(
    channel: str, payload: bytes, pattern: str, seq: int | None, at: int, sender: str | None
) -> None:
    message = wire.ChannelMessage(channel, Raw(payload), pattern=pattern, seq=seq, at=at, sender=sender)
    assert wire.encode_message(channel, payload, pattern, seq, at, sender) == encoded(message)
    assert wire.encode_first_version_message(channel, payload) == encoded(message, ProtocolVersion.FIRST)


# First-version clients

FIXED = {
    "auth_ok": {"client_id"},
    "auth_error": {"message"},
    "subscribed": {"pattern"},
    "unsubscribed": {"pattern"},
    "subscribe_error": {"pattern", "message"},
    "published": {"channel"},
    "publish_error": {"channel", "message"},
    "message": {"channel", "payload"},
    "pong": {"seq"},
    "error": {"message"},
}


@given(server_messages())
def test_first_version_client_receives_only_known_messages_and_fields(message: Reply) -> None:
    line = wire.encode(message, ProtocolVersion.FIRST)
    kind = tag(type(message))
    if isinstance(message, wire.Revoked):
        assert line is not None
        heard = json.loads(line)
        assert (heard.pop("type"), heard.pop("pattern")) == ("subscribe_error", message.pattern)
        assert set(heard) == {"message"}
    elif kind in FIXED:
        assert line is not None
        full = json.loads(encoded(message))
        assert json.loads(line) == {name: full[name] for name in ("type", *FIXED[kind])}
    else:
        assert line is None


def test_first_version_client_receives_a_null_client_id() -> None:
    assert encoded(wire.AuthOk(None), ProtocolVersion.FIRST) == b'{"type":"auth_ok","client_id":null}\n'
    assert json.loads(encoded(wire.AuthOk(None))) == {"type": "auth_ok", "client_id": None}


FIRST_VERSION_REQUESTS = {
    b'{"type": "auth", "token": "t"}': wire.Auth("t"),
    b'{"type": "subscribe", "pattern": "a.*"}': wire.Subscribe("a.*"),
    b'{"type": "unsubscribe", "pattern": "a.*"}': wire.Unsubscribe("a.*"),
    b'{"type": "publish", "channel": "a", "payload": {"x": 1}}': wire.Publish("a", Raw(b'{"x": 1}')),
    b'{"type": "ping", "seq": 7}': wire.Ping(7),
}


@pytest.mark.parametrize(("line", "message"), FIRST_VERSION_REQUESTS.items())
def test_messages_of_a_first_version_client_decode(line: bytes, message: Request) -> None:
    assert wire.decode_client(line) == message


# What is refused


def publish(payload: bytes) -> bytes:
    return b'{"type":"publish","channel":"a","payload":' + payload + b"}"


INVALID_UTF8 = {
    "a stray byte": b'"\xff"',
    "cut short": b'"\xe2\x82"',
    "overlong": b'"\xc0\xaf"',
    "a surrogate": b'"\xed\xa0\x80"',
    "beyond the last": b'"\xf4\x90\x80\x80"',
    "in a name": b'{"\xff":1}',
    "deep down": b'[[["\x80"]]]',
}


@pytest.mark.parametrize("payload", INVALID_UTF8.values(), ids=INVALID_UTF8)
def test_payload_that_is_not_utf8_is_rejected(payload: bytes) -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        wire.decode_client(publish(payload))
    assert wire.decoding_error(caught.value).message == "not valid UTF-8"
    with pytest.raises(PeerError, match="UTF-8"):
        wire.check_payload(payload)


NOT_JSON = [b"", b"nul", b"01", b"1 2", b"'a'", b"[1,]", b"{1:2}", b'"', b'"\n"', b'"\\x"', b'"\\ud800"', b"NaN", b"-"]


@pytest.mark.parametrize("payload", NOT_JSON)
def test_payload_that_is_not_json_is_rejected(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        wire.decode_client(publish(payload))
    with pytest.raises(PeerError, match="not JSON") as caught:
        wire.check_payload(payload)
    assert (caught.value.code, caught.value.close) == (ErrorCode.BAD_MESSAGE, None)


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"[]",
        b"null",
        b'{"type":"nonsense"}',
        b'{"type":"message","channel":"a","payload":1}',
        b'{"type":1}',
        b'{"type":"publish","channel":"a"}',
        b'{"type":"publish","payload":1}',
        b'{"type":"publish","channel":7,"payload":1}',
        b'{"type":"subscribe","pattern":"a","since":-1}',
        b'{"type":"subscribe","pattern":"a","since":1.5}',
        b'{"type":"subscribe","pattern":"a","since":9223372036854775808}',
        b'{"type":"publish","channel":"a","payload":1,"id":"1"}',
        b'{"type":"history","pattern":"a","limit":0}',
        b'{"type":"ping"}',
        b'{"type":"auth"}',
    ],
)
def test_invalid_requests_are_rejected(line: bytes) -> None:
    with pytest.raises(wire.UNDECODABLE) as caught:
        wire.decode_client(line)
    error = wire.decoding_error(caught.value)
    assert (error.code, error.close) == (ErrorCode.BAD_MESSAGE, None)
    assert error.message


@given(st.binary(max_size=60) | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_decode_or_raise_one_of_the_undecodable_errors(data: bytes) -> None:
    for decode in (wire.decode_client, wire.decode_server, lambda data: wire.decode_client(publish(data))):
        try:
            decode(data)
        except wire.UNDECODABLE as error:
            refused = wire.decoding_error(error)
        else:
            continue
        assert refused.code == ErrorCode.BAD_MESSAGE


@given(st.binary(max_size=20) | payloads())
def test_check_payload_accepts_exactly_the_payloads_of_a_publish(data: bytes) -> None:
    try:
        message = wire.decode_client(publish(data))
    except wire.UNDECODABLE:
        with pytest.raises(PeerError):
            wire.check_payload(data)
    else:
        assert isinstance(message, wire.Publish)
        assert wire.check_payload(data) == wire.payload_bytes(message.payload)


@given(messages(wire.Publish))
def test_decode_publish_does_not_require_a_type(message: wire.Publish) -> None:
    line = encoded(message)
    assert wire.decode_publish(line) == message
    assert wire.decode_publish(line.replace(b'"type":"publish",', b"", 1)) == message


@pytest.mark.parametrize(
    "line", [b'{"type":"ping","channel":"a","payload":1}', b'{"channel":"a"}', b'{"channel":"a","payload":"\xff"}']
)
def test_decode_publish_rejects_other_messages(line: bytes) -> None:
    with pytest.raises(wire.UNDECODABLE):
        wire.decode_publish(line)


# Payloads


@given(JSON, st.sampled_from([None, 0, 2]), st.sampled_from(["\n", "\r\n", "\r"]))
def test_stored_payload_is_one_line_with_the_same_value(value: Any, indent: int | None, line_end: str) -> None:
    text = json.dumps(value, indent=indent).replace("\n", line_end).encode()
    kept = wire.check_payload(text)
    assert b"\n" not in kept
    assert b"\r" not in kept
    assert len(kept) == len(text)
    assert json.loads(kept) == value


def test_payload_keeps_its_spelling() -> None:
    for text in (b"1.0", b"1e2", b'"\\u00e9"', b'{"b":1, "a":2,"a":3}', b"[ ]", b"123456789012345678901234567890"):
        message = wire.decode_client(publish(text))
        assert isinstance(message, wire.Publish)
        assert wire.payload_bytes(message.payload) == text


# Nesting


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def depth_of(value: Any) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 0


bracketed = st.text(alphabet='[]{}"\\a', max_size=5)
deep_values = st.recursive(
    bracketed | st.just(0),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(bracketed, inner, max_size=3),
    max_leaves=20,
)


@given(deep_values, st.sampled_from([None, 1]))
def test_depth_is_the_nesting_depth_of_the_value(value: Any, indent: int | None) -> None:
    assert wire.depth(json.dumps(value, indent=indent).encode()) == depth_of(value)


def test_message_is_accepted_up_to_the_nesting_limit() -> None:
    wire.decode_client(publish(nested(MAX_DEPTH - 1)))
    with pytest.raises(RecursionError) as caught:
        wire.decode_client(publish(nested(MAX_DEPTH)))
    assert str(MAX_DEPTH) in wire.decoding_error(caught.value).message
    with pytest.raises(PeerError, match=str(MAX_DEPTH)):
        wire.check_payload(nested(MAX_DEPTH + 1))


def test_wide_message_is_accepted() -> None:
    wide = b"[" + b",".join([b'{"[":[]}'] * 1000) + b"]"
    wire.decode_client(publish(wide))


@pytest.mark.parametrize("bomb", [b"[" * 60000, b'{"a":' * 12000, b"[{" * 30000, nested(30000), b'["]' * 20000])
def test_deeply_nested_message_is_rejected(bomb: bytes) -> None:
    with pytest.raises(wire.UNDECODABLE):
        wire.decode_client(publish(bomb))


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (b'{"type":"publish","channel":7,"id":3}', 3),
        (b'{"id":3,"type":"history","limit":0}', 3),
        (rb'{"payload":"\ud83d","id":3}', 3),
        (b'{"payload":"\xff","id":3}', 3),
        (b'{"payload":' + b"[" * 100 + b"]" * 100 + b',"id":3}', 3),
        (b'{"id":1,"id":3}', 3),
        (b'{"id":9223372036854775807}', 2**63 - 1),
        (b'{"id":9223372036854775808}', None),
        (b'{"id":-1}', None),
        (b'{"id":true}', None),
        (b'{"id":1.0}', None),
        (b'{"id":"3"}', None),
        (b'{"nested":{"id":3}}', None),
        (b'{"channel":undefined,"id":3}', None),
        (b'{"payload":' + b"[" * 60_000, None),
        (b'{"payload":' + b"9" * 5000 + b"}", None),
    ],
)
def test_error_of_an_undecodable_request_has_its_id(data: bytes, number: int | None) -> None:
    assert wire.decoding_error(msgspec.DecodeError("no"), data).id == number
