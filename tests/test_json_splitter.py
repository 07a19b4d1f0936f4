"""catbus.protocol.json_splitter against a simple scanner, which reads all input again for each byte."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.close_codes import CloseCode
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError
from catbus.protocol import wire_messages as wire
from catbus.protocol.json_splitter import JsonSplitter

LIMIT = 65536

decode_object: Callable[[bytes], dict[str, Any]] = msgspec.json.Decoder(dict[str, Any]).decode

Seen = dict[str, Any] | tuple[str, str]
"""What came out: an object, or why there was none."""


def feed(chunks: Iterable[bytes], limit: int = LIMIT) -> list[Seen]:
    """All that a framer makes of these chunks, up to the first error that it raises."""
    return list(results(JsonSplitter(decode_object, limit), chunks))


def results(framer: JsonSplitter[dict[str, Any]], chunks: Iterable[bytes]) -> Iterator[Seen]:
    try:
        for chunk in chunks:
            for item in framer.feed(chunk):
                yield refused(item) if isinstance(item, PeerError) else item
    except PeerError as error:
        yield ("close", error.close.name if error.close else "not at all")


def refused(error: PeerError) -> Seen:
    assert (error.code, error.close) == (ErrorCode.BAD_MESSAGE, None)
    return ("refused", error.message)


def plain(data: bytes, limit: int = LIMIT) -> list[Seen]:
    """What `feed` should give, however the data is cut."""
    seen: list[Seen] = []
    start, level, in_string, escaped = 0, 0, False, False
    for position, byte in enumerate(data):
        character = chr(byte)
        if level == 0:
            if character == "{":
                start, level = position, 1
            elif character not in " \t\r\n":
                return [*seen, ("close", "BAD_MESSAGE")]
        elif in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character == "{":
            level += 1
        elif character == "}":
            level -= 1
        if level or character == "}":
            text = data[start : position + 1]
            if len(text) > limit:
                return [*seen, ("close", "TOO_LARGE")]
            if level == 0:
                try:
                    seen.append(decode_object(text))
                except wire.UNDECODABLE as error:
                    seen.append(refused(wire.decoding_error(error)))
    return seen


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    return [data[a:b] for a, b in pairwise([0, *sorted(places), len(data)])]


NASTY = b"".join(
    [
        b'{"a":1}\n{"b":"}{"}{"c":{"d":{}}}\r\n \t',
        b'{"e":"\\"","f":"\\\\"}\n\n{"g":"\\\\\\"}"}',
        b'{"payload":\n{"channel":"evil"}\n}\n',
        b'{"h":\xff}\n{"i":[}\n{"j":"\xc3\xa9\n',
        b'"}\n{}{"k":[{"l":"{"}, {"m":"\\u007d"}]}\n',
        b'{"n":"',
        b'"} x',
    ]
)


def test_sample_contains_the_hard_cases() -> None:
    seen = plain(NASTY)
    assert len([item for item in seen if isinstance(item, dict)]) == 9
    assert len([item for item in seen if isinstance(item, tuple)]) == 4


def test_stream_in_one_piece_is_split() -> None:
    assert feed([NASTY]) == plain(NASTY)


def test_stream_in_single_bytes_is_split() -> None:
    assert feed(cut(NASTY, range(1, len(NASTY)))) == plain(NASTY)


def test_stream_in_any_two_pieces_is_split() -> None:
    expected = plain(NASTY)
    for place in range(len(NASTY) + 1):
        assert feed(cut(NASTY, [place])) == expected, place


def test_stream_in_any_three_pieces_is_split() -> None:
    expected = plain(NASTY)
    for first in range(len(NASTY) + 1):
        for second in range(first, len(NASTY) + 1):
            assert feed(cut(NASTY, [first, second])) == expected, (first, second)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(alphabet='{}[]"\\ \n,:é\u2028a', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(alphabet='{}"\\\na', max_size=3), json_values, max_size=3)
white_space = st.text(alphabet=" \t\r\n", max_size=3).map(str.encode)


@st.composite
def written(draw: st.DrawFn, value: dict[str, Any]) -> bytes:
    """The object as JSON in one of the ways in which it may be written, with white space behind it."""
    text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 0, 1])))
    return text.encode() + draw(white_space)


@given(data=st.data(), values=st.lists(objects, max_size=6), before=white_space)
def test_objects_in_any_pieces_are_split_unchanged(
    data: st.DataObject, values: list[dict[str, Any]], before: bytes
) -> None:
    text = before + b"".join([data.draw(written(value)) for value in values])
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert feed(cut(text, places)) == values
    assert feed([text]) == values
    assert feed(cut(text, range(1, len(text)))) == values


SMALL = [
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\n",
    b" ",
    b"\r\n",
    b"[",
    b"]",
    b",",
    b":",
    b"1",
    b"\xff",
    b"\xc3\xa9",
    b"\0",
    b"\x0b",
]
LARGE = [b'{"a":1}', b'{"a":{"b":"}"}}' + b"\n", b'{"a":\n{"b":2}\n}\n', b'{"\\"":"\\\\"}', b"{}\n", b"\xef\xbb\xbf"]
pieces = st.sampled_from(SMALL + LARGE)


@given(
    data=st.lists(pieces, max_size=30).map(b"".join),
    places=st.lists(st.integers(0, 200), max_size=5),
    limit=st.sampled_from([1, 2, 7, 15, 40, LIMIT]),
)
def test_any_bytes_give_the_same_results_in_any_pieces(data: bytes, places: list[int], limit: int) -> None:
    expected = plain(data, limit)
    assert feed([data], limit) == expected
    assert feed(cut(data, [min(place, len(data)) for place in places]), limit) == expected
    assert feed(cut(data, range(1, len(data))), limit) == expected


@given(data=st.binary(max_size=40))
def test_any_bytes_raise_only_peer_errors(data: bytes) -> None:
    assert feed([b'{"a":1}' + data]) == plain(b'{"a":1}' + data)


# One sentence each


def test_line_inside_a_payload_is_not_a_message() -> None:
    data = b'{"type":"publish","channel":"good","payload":\n{"type":"publish","channel":"evil","payload":1}\n}\n'
    framer = JsonSplitter(wire.decode_client)
    for chunks in ([data], data.splitlines(keepends=True), cut(data, range(1, len(data)))):
        messages = [message for chunk in chunks for message in framer.feed(chunk)]
        assert [message.channel for message in messages if isinstance(message, wire.Publish)] == ["good"]


def test_undecodable_object_is_reported_and_the_next_one_is_read() -> None:
    framer = JsonSplitter(wire.decode_client)
    data = b'{"type":"ping","seq":1}\n{"type":"nonsense"}\n{"type":"ping"}{"type":"ping","seq":2}'
    first, second, third, fourth = framer.feed(data)
    assert (first, fourth) == (wire.Ping(1), wire.Ping(2))
    for error in (second, third):
        assert isinstance(error, PeerError)
        assert (error.code, error.close) == (ErrorCode.BAD_MESSAGE, None)


@pytest.mark.parametrize(
    "junk", [b"x", b"1\n", b"[]\n", b'"a"\n', b"null\n", b"}", b"\0", b"\x0b\n", b"\x85", b"\xef\xbb\xbf{}"]
)
def test_other_bytes_between_objects_close_after_the_objects_before(junk: bytes) -> None:
    messages = JsonSplitter(decode_object).feed(b'{"a":1}\n{"b":2} ' + junk)
    assert next(messages) == {"a": 1}
    assert next(messages) == {"b": 2}
    with pytest.raises(PeerError) as caught:
        next(messages)
    assert (caught.value.code, caught.value.close) == (ErrorCode.BAD_MESSAGE, CloseCode.BAD_MESSAGE)


@pytest.mark.parametrize("end", [b"", b"\n", b" ", b"{}"])
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_object_is_accepted_up_to_the_size_limit(step: int, end: bytes) -> None:
    limit = 100
    for size in (limit - 1, limit, limit + 1):
        data = b'{"a":"' + b"x" * (size - 8) + b'"}'
        assert len(data) == size
        seen = feed(cut(data + end, range(step, len(data + end), step)), limit)
        assert seen[0] == (("close", "TOO_LARGE") if size > limit else json.loads(data))


def test_white_space_does_not_count_as_size() -> None:
    assert feed([b" " * 50 + b'{"a":1}' + b" " * 50 + b"\n" + b'{"b":2}'], limit=10) == [{"a": 1}, {"b": 2}]


def test_object_over_the_limit_closes_after_the_objects_before() -> None:
    messages = JsonSplitter(decode_object, limit=10).feed(b'{"a":1}\n{"a":"12345"}\n{"b":2}\n')
    assert next(messages) == {"a": 1}
    with pytest.raises(PeerError) as caught:
        next(messages)
    assert (caught.value.code, caught.value.close) == (ErrorCode.TOO_LARGE, CloseCode.TOO_LARGE)


def test_incomplete_object_over_the_limit_is_rejected_at_once() -> None:
    framer = JsonSplitter(decode_object, limit=10)
    for byte in b'{"a":"1234':
        assert list(framer.feed(bytes([byte]))) == []
    with pytest.raises(PeerError, match="10"):
        list(framer.feed(b"5"))


def test_messages_are_decoded_lazily() -> None:
    decoded: list[bytes] = []

    def decode(data: bytes) -> int:
        decoded.append(data)
        return len(decoded)

    messages = JsonSplitter(decode).feed(b"{}\n{}\n{}\n")
    assert decoded == []
    assert next(messages) == 1
    assert len(decoded) == 1


# Hostile input costs in proportion to its length

STRETCHES: dict[str, Callable[[int], list[bytes]]] = {
    "a string, a byte at a time": lambda n: [b'{"a":"', *[b"x"] * n],
    "a long string, then a byte at a time": lambda n: [b'{"a":"' + b"x" * 64 * n, *[b"x"] * n],
    "braces in a string, a byte at a time": lambda n: [b'{"a":"', *[b"}"] * n],
    "escapes, three bytes at a time": lambda n: [b'{"a":"', *[b"\\\\\\"] * n],
    "quotes, a byte at a time": lambda n: [b"{", *[b'"'] * n],
    "nested, a byte at a time": lambda n: [b"{"] * n,
    "lines within an object": lambda n: [b"{", *[b"[1,\n"] * n],
    "lines within an object at once": lambda n: [b'{"a":[' + b"1,\n" * 10 * n],
    "a string without an end": lambda n: [b'{"a":"' + b"x" * 50 * n],
    "a string of escapes without an end": lambda n: [b'{"a":"' + b"\\\\" * 30 * n],
    "strings": lambda n: [b"{" + b'""' * 10 * n],
    "nested at once": lambda n: [b"{" * n + b"}" * n],
    "small objects back to back": lambda n: [b'{"a":1}' * n],
    "small objects cut anywhere": lambda n: cut(b'{"a":1}' * n, range(5, 7 * n, 5)),
    "undecodable objects": lambda n: [b"{1}" * n],
    "undecodable lines": lambda n: [b"{1}\n" * n],
    "objects, each over two lines": lambda n: [b"{\n}\n" * n],
    "empty lines": lambda n: [b"\n" * 30 * n],
    "spaces": lambda n: [b" " * 30 * n + b"{}"],
    "spaces, a byte at a time": lambda n: [b" "] * n,
}


@pytest.mark.parametrize("stretch", STRETCHES.values(), ids=STRETCHES)
def test_work_is_linear_in_the_input(stretch: Callable[[int], list[bytes]]) -> None:
    """Sixteen times as much takes sixteen times as long, or 256 times if it goes wrong."""

    def cost(n: int) -> float:
        chunks = stretch(n)
        best = float("inf")
        for _ in range(3):
            framer = JsonSplitter(decode_object, limit=1 << 30)
            start = time.thread_time()
            for chunk in chunks:
                for _ in framer.feed(chunk):
                    pass
            best = min(best, time.thread_time() - start)
        return best

    assert cost(16 * 1024) < 60 * cost(1024)


def test_each_byte_is_decoded_at_most_twice() -> None:
    given_to_decode = 0

    def decode(data: bytes) -> dict[str, Any]:
        nonlocal given_to_decode
        given_to_decode += len(data)
        return decode_object(data)

    data = (b'{"a":1}\n' * 5 + b'{"a":1}{"b":2}\n' + b'{"a":\n{}}\n{1}\n\n') * 100
    for step in (1, 10, 100, len(data)):
        given_to_decode = 0
        framer = JsonSplitter(decode)
        for chunk in cut(data, range(step, len(data), step)):
            for _ in framer.feed(chunk):
                pass
        assert given_to_decode <= 2 * len(data)


def test_few_lines_are_split_ahead_of_decoding() -> None:
    data = b'{"type":"ping","seq":1}\n' * 40_000
    results = JsonSplitter(decode_object).feed(data)
    tracemalloc.start()
    try:
        for _ in range(1001):
            next(results)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert sum(1 for _ in results) == 40_000 - 1001
