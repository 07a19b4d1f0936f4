"""What takes bytes from strangers, and what has to hold of it whatever the bytes are: one sentence for each.

A target is a function of bytes that raises when its sentence does not hold. `python -m tests.fuzz_bytes` has Atheris
look for bytes that make it, and `test_targets.py` plays the corpora that it left, and some bytes by chance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import h11
import msgspec
from aioquic.buffer import UINT_VAR_MAX

from catbus.auth.grants import Grants
from catbus.auth.tokens import Authenticator, sign
from catbus.endpoints.http.http_response import HttpResponse
from catbus.endpoints.http.request_head import read_request_head
from catbus.endpoints.websocket.inbound_frame_limits import InboundFrames
from catbus.errors import PeerError
from catbus.protocol import channels
from catbus.protocol import wire_messages as wire
from catbus.protocol.json_splitter import JsonSplitter
from catbus.protocol.wire_messages import UNDECODABLE
from catbus.webtransport import WebTransportConnection
from catbus.webtransport.capsules import CapsuleError, CapsuleReader
from catbus.webtransport.connectionless_packets import ID_LENGTH, read_header
from tests.endpoints.test_inbound_frame_limits import seen
from tests.webtransport.simulated_link import CLIENT, Link, server_config
from tests.webtransport.test_hostile_peers import packet, raw

Target = Callable[[bytes], None]

CORPORA = Path(__file__).with_name("corpora")
VECTORS = Path(__file__).parents[2] / "protocol" / "vectors"


def cut(data: bytes) -> tuple[list[bytes], bytes]:
    """The rest of the bytes in pieces, whose lengths the first bytes say; and the rest whole."""
    count, lengths = (data[0] & 0x0F, data[1 : 1 + (data[0] & 0x0F)]) if data else (0, b"")
    whole = data[1 + count :]
    pieces, position = [], 0
    for length in lengths:
        pieces.append(whole[position : position + length])
        position += length
    return [*pieces, whole[position:]], whole


def messages(data: bytes) -> None:
    """Bytes are a message, which means the same when it is encoded and decoded again, or they are refused."""
    for decode in (wire.decode_client, wire.decode_publish, wire.decode_server):
        try:
            message = decode(data)
        except UNDECODABLE:
            continue
        line = msgspec.json.encode(message)
        assert decode(line) == message
        json.loads(data)


def framing(data: bytes) -> None:
    """A stream is the same messages, and ends with the same error, wherever it is cut."""

    def read(pieces: list[bytes]) -> Iterator[object]:
        framer = JsonSplitter(msgspec.json.Decoder(dict[str, msgspec.Raw]).decode, 64)
        for piece in pieces:
            try:
                for found in framer.feed(piece):
                    yield found.code if isinstance(found, PeerError) else sorted(found)
            except PeerError as error:
                yield error.code
                return
            assert len(framer._begun) <= 64

    pieces, whole = cut(data)
    assert list(read(pieces)) == list(read([bytes([byte]) for byte in whole]))


def heads(data: bytes) -> None:
    """What is taken for the head of a request says once how long its body is, and for which host it is."""
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=16_384)
    try:
        http.receive_data(data)
        event = http.next_event()
    except h11.RemoteProtocolError as error:
        assert 400 <= error.error_status_hint < 600
        return
    if not isinstance(event, h11.Request):
        return
    request = read_request_head(event)
    if isinstance(request, HttpResponse):
        assert 400 <= request.status < 600
        return
    names = [name for name, _ in request.headers]
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert names.count(b"host") <= 1
    assert names.count(b"authorization") <= 1
    assert request.path.startswith("/") or request.path == "*"
    assert not re.search(r"[\x00-\x20\x7f]", request.path + request.host)


def capsules(data: bytes) -> None:
    """Capsules say the same wherever they are cut, and little of them is kept."""

    def read(pieces: list[bytes]) -> object:
        reader = CapsuleReader()
        for piece in pieces:
            try:
                found = reader.feed(piece)
            except CapsuleError as error:
                return str(error)
            if found is not None:
                assert 0 <= found.code < 1 << 32
                assert len(found.reason.encode()) <= 1024
                return found
            assert len(reader._buffer) <= 1024 + 4 + 16
        return reader.at_boundary

    pieces, whole = cut(data)
    assert read(pieces) == read([bytes([byte]) for byte in whole])


def patterns(data: bytes) -> None:
    """Text is a channel or a pattern where the specification's grammar says so, and matching is by prefix."""
    texts = [text.decode(errors="replace") for text in data.split(b"\n")[:3]]
    valid = []
    for text in texts:
        for check, grammar in ((channels.check_channel, CHANNEL), (channels.check_pattern, PATTERN)):
            right = bool(grammar.fullmatch(text)) and len(text) <= 255 and text.count(".") < 32
            try:
                check(text)
            except PeerError as error:
                assert not right
                assert len(error.message) < 400
            else:
                assert right
                valid.append((text, check is channels.check_channel))
    for pattern, _ in valid:
        for channel, is_channel in valid:
            if is_channel:
                expected = (
                    channel == pattern
                    or (pattern == "*" and channel[0] != "_")
                    or (pattern[-2:] == ".*" and channel.startswith(pattern[:-1]))
                )
                assert channels.matches(pattern, channel) == expected
                assert (pattern in channels.selectors(channel)) == expected


CHANNEL = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
PATTERN = re.compile(r"\*|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(\.\*)?")
SECRET = "0123456789abcdef" * 4
NOW = 1_800_000_000.0


@cache
def _authenticator() -> Authenticator:
    return Authenticator([SECRET], admin_key="fedcba9876543210" * 4)


def tokens(data: bytes) -> None:
    """Nothing but what was signed with the secret is a token, and what is none is refused for a reason."""
    text = data.decode("latin-1")
    signed = sign(SECRET, client_id="a", grants=Grants(("a.*",), ("b",)))
    for token in (text, text + signed[max(0, len(signed) - len(text)) :], signed[: -len(text) or None] + text):
        if token == signed:
            continue
        try:
            identity = _authenticator().verify(token, NOW)
        except PeerError as error:
            assert error.close is not None
            assert SECRET not in error.message
        else:
            # Base64 can be written in several ways: what is said is the same.
            assert (identity.client_id, identity.admin) == ("a", False)


def websockets(data: bytes) -> None:
    """The library sees the same messages whether what a client sends is joined first or not."""

    pieces, _ = cut(data)
    coalescer = InboundFrames(64, 1 << 62)
    passed: list[bytes] = []
    for piece in pieces:
        coalescer.feed(piece)
        passed += iter(coalescer.take, b"")
    if coalescer.close_reason is None:
        assert seen(passed) == seen(pieces)


def datagrams(data: bytes) -> None:
    """A datagram makes no connection fail but the one that it is for, and raises nothing."""
    header = read_header(data)
    if header is None:
        return
    connection = WebTransportConnection.server(server_config(), header.destination[:20].ljust(8, b"x"))
    connection.receive_datagram(data, CLIENT, 0.0)
    sent = connection.datagrams_to_send(0.0)
    assert sum(len(one) for one, _ in sent) <= 3 * len(data)
    deque_of_events = list(connection.events())
    assert len(deque_of_events) < 100


_link: Link | None = None


def frames(data: bytes) -> None:
    """Frames of an authenticated peer end its connection at the most, and are answered with little."""
    global _link
    if not data or not data[0] & 0x3F:
        return
    if _link is None or _link.server.lost is not None or _link.client.lost is not None:
        _link = Link().open()
    _link.server.it.receive_datagram(packet(raw(_link.client.it), data[:1100]), CLIENT, _link.now)
    _link.now += 0.001
    sent = _link.server.it.datagrams_to_send(_link.now)
    _link.server.take(_link.now)
    _link.server.events.clear()
    assert len(sent) < 100
    assert len(_link.server.it.connection_ids) <= 16
    assert _link.server.it.unconsumed <= UINT_VAR_MAX
    if _link.server.it._lost:
        _link = None


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (messages, framing, heads, capsules, patterns, tokens, websockets, datagrams, frames)
}


def seeds(name: str) -> list[bytes]:
    """Bytes to begin with."""
    found = [path.read_bytes() for path in sorted((CORPORA / name).glob("*"))]
    match name:
        case "messages":
            sessions = json.loads((VECTORS / "sessions.json").read_text("utf-8"))
            found += dict.fromkeys(json.dumps(step).encode() for step in _steps(sessions) if "type" in step)
        case "framing":
            found += [b"\x03\x01\x02\x09" + b'{"a":"}\\""} {"b":{}}\n', b"\x00" + b"{" * 70]
        case "heads":
            found += [
                b"GET /health HTTP/1.1\r\nHost: a.example:8080\r\n\r\n",
                b"POST http://a/publish?x HTTP/1.0\r\nContent-Length: 2\r\nHost: [::1]\r\n\r\n{}",
                b"POST /publish HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
                b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
            ]
        case "capsules":
            found += [b"\x02\x01\x01\x68\x43\x06\x00\x00\x00\x07ok", b"\x00\x00\x03abc\x68\x43\x04\x00\x00\x00\x01"]
        case "patterns":
            found += [b"a.b.*\na.b.c\n*", b"A-z_0.9\n*.a\na..b"]
        case "tokens":
            found += [b"sub-eyJ", b"role-abc", sign("another secret", client_id=None, grants=Grants(("*",))).encode()]
        case "websockets":
            found += [b"\x01\x03\x81\x82\0\0\0\0{}\x01\x81\0\0\0\0a\x80\x80\0\0\0\0\x89\x80\0\0\0\0\x88\x80\0\0\0\0"]
        case "datagrams":
            found += [data for data, _ in Link().client.it.datagrams_to_send(1000.0)]
            found += [b"\x40" + bytes(ID_LENGTH) + b"x" * 40]
        case "frames":
            found += [
                b"\x08\x00abc",
                b"\x02\x00\x00\x00\x00",
                b"\x18\x02\x00\x08" + bytes(24),
                b"\x1a12345678",
                b"\x06\x00\x01x",
            ]
    return found


def _steps(value: object) -> Iterator[dict[str, object]]:
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from _steps(part)
    elif isinstance(value, list):
        for part in value:
            yield from _steps(part)
