"""The parser of event streams against the rules and examples of WHATWG HTML, section 9.2.6."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.protocol.event_stream_parser import EventStreamParser, EventTooLarge, ServerSentEvent


def parse(*pieces: bytes) -> list[tuple[str, str, str]]:
    parser = EventStreamParser()
    return [(event.name, event.data, event.id) for piece in pieces for event in parser.feed(piece)]


def feed_bytewise(parser: EventStreamParser, stream: bytes) -> None:
    for byte in stream:
        list(parser.feed(bytes([byte])))


VECTORS = {
    "the first example of the standard": (
        b"data: YHOO\ndata: +2\ndata: 10\n\n",
        [("message", "YHOO\n+2\n10", "")],
    ),
    "a comment, an id that stays, one that is reset, and a space that is kept": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [("message", "first event", "1"), ("message", "second event", ""), ("message", " third event", "")],
    ),
    "empty data is an event, and an incomplete block is none": (
        b"data\n\ndata\ndata\n\ndata:",
        [("message", "", ""), ("message", "\n", "")],
    ),
    "one space after the colon is no part of the value": (
        b"data:test\n\ndata: test\n\n",
        [("message", "test", ""), ("message", "test", "")],
    ),
    "every kind of line end": (b"data: a\rdata: b\r\ndata: c\n\r\n", [("message", "a\nb\nc", "")]),
    "no other character ends a line": (
        "data: a\u2028b\u0085c\x0bd\n\n".encode(),
        [("message", "a\u2028b\u0085c\x0bd", "")],
    ),
    "a name is of one event": (b"event: gap\ndata: 1\n\ndata: 2\n\n", [("gap", "1", ""), ("message", "2", "")]),
    "a block without data resets its name, and sets the id": (
        b"event: gap\nid: 7.e\n\ndata: 1\n\n",
        [("message", "1", "7.e")],
    ),
    "an id with U+0000 is ignored": (b"id: 1\nid: 2\x00\ndata: a\n\n", [("message", "a", "1")]),
    "an unknown field is ignored": (b"data: a\nretries: 3\nDATA: b\nda ta: c\n\n", [("message", "a", "")]),
    "one byte order mark is skipped": (
        b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n",
        [("message", "a", "")],
    ),
    "bytes that are not UTF-8 are replaced": (b"data: \xff\n\n", [("message", "\ufffd", "")]),
}


@pytest.mark.parametrize("name", VECTORS)
def test_stream_is_parsed_as_the_standard_says(name: str) -> None:
    stream, events = VECTORS[name]
    assert parse(stream) == events
    assert parse(*(bytes([byte]) for byte in stream)) == events, "byte by byte"


@given(st.lists(st.sampled_from([b"data: a", b"id: 1", b"event: x", b":c", b"\r", b"\n", b"\r\n", b"\n\n"])), st.data())
def test_stream_in_any_pieces_is_the_same(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    assert parse(*(stream[a:b] for a, b in pairwise([0, *cuts, len(stream)]))) == parse(stream)


def test_last_id_moves_with_complete_blocks_only() -> None:
    parser = EventStreamParser()
    assert list(parser.feed(b"id: 5.e\n\nid: 6.e\n")) == []
    assert parser.last_id == "5.e"
    assert list(parser.feed(b"\n")) == []
    assert parser.last_id == "6.e"
    assert list(parser.feed(b"data: x\n\n")) == [ServerSentEvent("message", "x", "6.e")]


@pytest.mark.parametrize(
    ("line", "retry"), [(b"retry: 1500", 1500), (b"retry:0", 0), (b"retry: 1.5", None), (b"retry: -1", None),
                        (b"retry", None), ("retry: ٣".encode(), None), (b"retry: " + b"9" * 5000, 999_999_999)]
)  # fmt: skip
def test_retry_is_digits(line: bytes, retry: int | None) -> None:
    parser = EventStreamParser()
    assert list(parser.feed(line + b"\n")) == []
    assert parser.retry == retry


@pytest.mark.parametrize("stream", [b"data: " + b"x" * 200, b"data: x\n" * 20, b":" * 200, b"id: x\n" * 50])
def test_size_of_an_event_is_limited(stream: bytes) -> None:
    with pytest.raises(EventTooLarge):
        list(EventStreamParser(100).feed(stream))
    with pytest.raises(EventTooLarge):
        feed_bytewise(EventStreamParser(100), stream)


def test_limit_counts_each_event_anew() -> None:
    stream = b"data: " + b"x" * 80 + b"\n\n"
    assert len(list(EventStreamParser(100).feed(stream * 2))) == 2
