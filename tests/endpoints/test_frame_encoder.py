"""catbus.endpoints.websocket.frame_encoder"""

from __future__ import annotations

import pytest

from catbus.delivery.encoded_messages import EncodedMessages
from catbus.endpoints.websocket.frame_encoder import (
    FRAME_SIZE,
    PING,
    close_frame,
    is_close,
    make_frame_encoder,
    text_header,
)
from catbus.log import Entry
from catbus.protocol.wire_messages import ProtocolVersion
from tests.endpoints import raw_peer
from tests.endpoints.raw_peer import FrameParser


def run(*payloads: bytes) -> EncodedMessages:
    return EncodedMessages("a.*", [Entry(seq, 0, "a.b", payload) for seq, payload in enumerate(payloads, 1)])


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 200_000])
def test_header_is_readable_by_a_peer(size: int) -> None:
    text = b"x" * size
    assert FrameParser().feed(text_header(size) + text) == [(raw_peer.TEXT, text)]


def test_ping_has_no_payload() -> None:
    assert FrameParser().feed(PING) == [(raw_peer.PING, b"")]


def test_close_frame_has_code_and_reason() -> None:
    [frame] = FrameParser().feed(close_frame(4508, "too quiet"))
    assert frame.opcode == raw_peer.CLOSE
    assert frame.payload == b"\x11\x9ctoo quiet"
    assert is_close(close_frame(1000, ""))
    assert not is_close(PING)


@pytest.mark.parametrize(
    ("reason", "kept"), [("x" * 123, 123), ("x" * 124, 123), ("x" + "é" * 80, 123), ("é" * 80, 122)]
)
def test_long_reason_is_cut_between_characters(reason: str, kept: int) -> None:
    [frame] = FrameParser().feed(close_frame(4000, reason))
    text = frame.payload[2:].decode()
    assert reason.startswith(text)
    assert len(text.encode()) == kept


def test_lines_share_a_frame() -> None:
    reply, messages = b'{"type":"pong","seq":1}\n', run(b"1", b"2")
    [frame] = FrameParser().feed(make_frame_encoder().encode_items([reply, messages], ProtocolVersion.V1))
    assert frame.payload == reply + messages.lines


def test_frame_has_about_64_kib_and_no_item_is_split() -> None:
    items = [bytes([65 + index]) * 30_000 for index in range(5)] + [b"z" * 300_000, b"y" * 10]
    frames = FrameParser().feed(make_frame_encoder().encode_items(items, ProtocolVersion.V1))
    assert [len(frame.payload) for frame in frames] == [60_000, 60_000, 30_000, 300_000, 10]
    assert b"".join(frame.payload for frame in frames) == b"".join(items)
    assert max(len(frame.payload) for frame in frames[:3]) <= FRAME_SIZE


def test_first_version_client_gets_a_frame_for_each_line() -> None:
    reply, messages = b'{"type":"pong","seq":1}\n', run(b"1", b"2")
    frames = FrameParser().feed(make_frame_encoder().encode_items([reply, messages], ProtocolVersion.FIRST))
    assert [frame.payload for frame in frames] == [
        b'{"type":"pong","seq":1}',
        b'{"type":"message","channel":"a.b","payload":1}',
        b'{"type":"message","channel":"a.b","payload":2}',
    ]


def test_same_items_are_encoded_once() -> None:
    packer, shared = make_frame_encoder(), run(b"1")
    first = packer.encode_items([shared], ProtocolVersion.V1)
    assert packer.encode_items([shared], ProtocolVersion.V1) is first
    assert packer.encode_items([shared], ProtocolVersion.FIRST) != first
    assert packer.encode_items([shared], ProtocolVersion.V1) == first


def test_other_items_are_encoded_again() -> None:
    packer = make_frame_encoder()
    assert packer.encode_items([run(b"1")], ProtocolVersion.V1) == packer.encode_items([run(b"1")], ProtocolVersion.V1)
    assert packer.encode_items([run(b"1")], ProtocolVersion.V1) != packer.encode_items([run(b"2")], ProtocolVersion.V1)
    assert packer.encode_items([b"a\n"], ProtocolVersion.V1) != packer.encode_items(
        [b"a\n", b"a\n"], ProtocolVersion.V1
    )


def test_no_items_make_no_frame() -> None:
    assert make_frame_encoder().encode_items([], ProtocolVersion.V1) == b""
    assert make_frame_encoder().encode_items([], ProtocolVersion.FIRST) == b""
