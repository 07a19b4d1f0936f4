"""Joining text frames changes nothing that the session, or the library, could see."""

from __future__ import annotations

import itertools
import time

from hypothesis import example, given
from hypothesis import strategies as st
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.utilities import RemoteProtocolError

from catbus.endpoints.coalesce import Coalescer
from tests.endpoints.peers import BINARY, CLOSE, PING, PONG, TEXT, masked

CONTINUATION = 0

small = [masked(TEXT, text) for text in (b"a", b"{}", b'{"b', b'"}', b"", "é".encode())]
odd = [
    masked(TEXT, b"x" * 126),
    masked(TEXT, b"frag", fin=False),
    masked(CONTINUATION, b"ment", fin=False),
    masked(CONTINUATION, b"s"),
    masked(BINARY, b"\0\1"),
    masked(PING, b"p"),
    masked(PONG, b""),
    masked(CLOSE, b""),
    masked(TEXT, b"\xc3") + masked(TEXT, b"\xa9"),
    b"\x81\x05hello",
    b"\x81\xfe\x00\x03\0\0\0\0abc",
    b"\x81\xff\0\0\0\0\0\0\0\x03\0\0\0\0abc",
    b"\xc1\x83\0\0\0\0abc",
    b"\x83\x80\0\0\0\0",
    b"\x89\xfe\x00\x7e\0\0\0\0",
]
frames = [*small, *odd, masked(BINARY, masked(BINARY, small[0] + small[1])[6:])]
"""The last one carries bytes that look like text frames on the wire: the mask, applied twice, is none."""


def seen(chunks: list[bytes]) -> list[object]:
    """What wsproto makes of a client's bytes: text as one stream, whatever its frames, and all else in its place."""
    connection = Connection(ConnectionType.SERVER)
    events: list[object] = []
    try:
        for chunk in chunks:
            if chunk:
                connection.receive_data(chunk)
            for event in connection.events():
                match event:
                    case TextMessage(data=text):
                        if events and isinstance(events[-1], str):
                            events[-1] += text
                        elif text:
                            events.append(text)
                    case BytesMessage(data=data):
                        events.append(bytes(data))
                    case Ping() | Pong() | CloseConnection():
                        events.append(event)
    except RemoteProtocolError as error:
        events.append(str(error))
    return events


def same(chunks: list[bytes]) -> bool:
    coalescer = Coalescer()
    return seen([coalescer.feed(chunk) for chunk in chunks]) == seen(chunks)


def test_the_library_sees_the_same_of_any_three_frames() -> None:
    for parts in itertools.product(frames, repeat=3):
        assert same([b"".join(parts)]), parts


def test_the_library_sees_the_same_of_any_two_frames_and_a_third_wherever_they_are_cut() -> None:
    for one, other in itertools.product(frames, repeat=2):
        data = one + other + small[0] + small[1]
        for cut in range(1, len(data)):
            assert same([data[:cut], data[cut:]]), (one, other, cut)


@given(st.lists(st.sampled_from(frames) | st.binary(max_size=6)), st.lists(st.integers(1, 100), min_size=1))
@example([masked(TEXT, b"a"), masked(TEXT, b"b"), masked(PING, b""), masked(TEXT, b"y" * 70_000)], [100_000])
def test_the_library_sees_the_same_of_anything(parts: list[bytes], cuts: list[int]) -> None:
    data = b"".join(parts)
    chunks, position = [], 0
    while position < len(data):
        size = cuts[len(chunks) % len(cuts)]
        chunks.append(data[position : position + size])
        position += size
    assert same(chunks)


def test_frames_that_arrive_together_become_one() -> None:
    lines = [b'{"n":%d}' % n for n in range(100)]
    joined = Coalescer().feed(b"".join(masked(TEXT, line) for line in lines))
    assert joined == b"\x81\xfe" + len(b"".join(lines)).to_bytes(2, "big") + b"\0\0\0\0" + b"".join(lines)


def test_what_it_makes_is_bounded() -> None:
    frame = masked(TEXT, b"x" * 94)
    joined = Coalescer(limit=1000).feed(frame * 25)
    assert [joined[:8], len(joined)] == [b"\x81\xfe" + (940).to_bytes(2, "big") + b"\0\0\0\0", 2 * 948 + 478]


def test_a_single_frame_passes_as_it_is() -> None:
    frame = masked(TEXT, b"hello")
    assert Coalescer().feed(frame) == frame


def test_what_has_not_come_whole_passes_as_it_comes_but_for_its_header() -> None:
    frame = masked(TEXT, b"x" * 200)
    coalescer = Coalescer()
    assert coalescer.feed(frame[:7]) == b""
    assert coalescer.feed(frame[7:50]) == frame[:50]
    assert coalescer.feed(frame[50:] + frame) == frame[50:] + frame


def test_it_takes_time_in_proportion() -> None:
    def cost(count: int) -> float:
        data = masked(TEXT, b"x" * 50) * count
        began = time.perf_counter()
        Coalescer().feed(data)
        return time.perf_counter() - began

    small = min(cost(1_000) for _ in range(5))
    assert min(cost(8_000) for _ in range(5)) < 40 * small
