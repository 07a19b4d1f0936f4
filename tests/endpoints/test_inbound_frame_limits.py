"""Joined text frames are the same to the session and to the library."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.utilities import RemoteProtocolError

from catbus.endpoints.websocket.inbound_frame_limits import (
    BYTES_PER_EXTRA_FRAGMENT,
    FRAMES_PER_CALL,
    FRAMES_PER_TURN,
    MAX_FRAGMENTS,
    TOO_LARGE,
    TOO_MANY_FRAGMENTS,
    InboundFrames,
)
from tests.endpoints.raw_peer import BINARY, CLOSE, PING, PONG, TEXT, masked

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
"""The last one contains bytes that look like text frames when masked: the mask, applied twice, is none."""


def seen(chunks: list[bytes]) -> list[object]:
    """Parse a client's bytes with wsproto: text as one stream without frames, and everything else in its place."""
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


def passed(coalescer: InboundFrames, data: bytes) -> list[bytes]:
    """Return the bytes that are passed on, in portions."""
    coalescer.feed(data)
    return list(iter(coalescer.take, b""))


def same(chunks: list[bytes]) -> bool:
    coalescer = InboundFrames()
    return seen([portion for chunk in chunks for portion in passed(coalescer, chunk)]) == seen(chunks)


def test_library_reads_the_same_from_any_three_frames() -> None:
    for parts in itertools.product(frames, repeat=3):
        assert same([b"".join(parts)]), parts


def test_library_reads_the_same_from_three_frames_split_anywhere() -> None:
    for one, other in itertools.product(frames, repeat=2):
        data = one + other + small[0] + small[1]
        for cut in range(1, len(data)):
            assert same([data[:cut], data[cut:]]), (one, other, cut)


@given(st.lists(st.sampled_from(frames) | st.binary(max_size=6)), st.lists(st.integers(1, 100), min_size=1))
@example([masked(TEXT, b"a"), masked(TEXT, b"b"), masked(PING, b""), masked(TEXT, b"y" * 70_000)], [100_000])
def test_library_reads_the_same_from_any_bytes(parts: list[bytes], cuts: list[int]) -> None:
    data = b"".join(parts)
    chunks: list[bytes] = []
    position = 0
    while position < len(data):
        size = cuts[len(chunks) % len(cuts)]
        chunks.append(data[position : position + size])
        position += size
    assert same(chunks)


def test_frames_that_arrive_together_are_joined() -> None:
    lines = [b'{"n":%d}' % n for n in range(100)]
    joined = b"".join(passed(InboundFrames(), b"".join(masked(TEXT, line) for line in lines)))
    assert joined == b"\x81\xfe" + len(b"".join(lines)).to_bytes(2, "big") + b"\0\0\0\0" + b"".join(lines)


def test_joined_frames_are_bounded() -> None:
    frame = masked(TEXT, b"x" * 94)
    joined = b"".join(passed(InboundFrames(limit=1000), frame * 25))
    assert [joined[:8], len(joined)] == [b"\x81\xfe" + (940).to_bytes(2, "big") + b"\0\0\0\0", 2 * 948 + 478]


def test_single_frame_passes_unchanged() -> None:
    frame = masked(TEXT, b"hello")
    assert passed(InboundFrames(), frame) == [frame]


def test_incomplete_frame_passes_except_for_an_incomplete_header() -> None:
    frame = masked(TEXT, b"x" * 200)
    coalescer = InboundFrames()
    assert passed(coalescer, frame[:7]) == []
    assert passed(coalescer, frame[7:50]) == [frame[:50]]
    assert b"".join(passed(coalescer, frame[50:] + frame)) == frame[50:] + frame


def test_joining_takes_linear_time() -> None:
    def cost(count: int) -> float:
        data = masked(TEXT, b"x" * 50) * count
        began = time.perf_counter()
        passed(InboundFrames(), data)
        return time.perf_counter() - began

    small = min(cost(1_000) for _ in range(5))
    assert min(cost(8_000) for _ in range(5)) < 40 * small


@given(st.lists(st.sampled_from([b"", b"a", b"\xc3\xa9" * 30]), min_size=200, max_size=2000), st.integers(1, 3000))
def test_few_frames_are_passed_on_at_a_time(payloads: list[bytes], cut: int) -> None:
    data = b"".join(masked(BINARY, payload) for payload in payloads)
    coalescer = InboundFrames()
    for chunk in (data[:cut], data[cut:]):
        for portion in passed(coalescer, chunk):
            assert len(portion) <= (FRAMES_PER_CALL + 1) * 66


@pytest.mark.parametrize(
    "frames",
    [masked(TEXT, b"x"), masked(PING, b"x"), masked(TEXT, b"x", fin=False) + masked(CONTINUATION, b"")],
    ids=["whole", "control", "fragments"],
)
def test_few_frames_are_examined_at_a_time(frames: bytes) -> None:
    """This holds for frames of any size, joined or not."""
    portions = passed(InboundFrames(), frames * 5000)
    assert len(portions) >= 5000 // FRAMES_PER_TURN
    assert all(len(portion) <= FRAMES_PER_TURN * len(frames) for portion in portions)


def fragments(count: int, size: int) -> bytes:
    return masked(TEXT, b"", fin=False) + masked(CONTINUATION, b"x" * size, fin=False) * (count - 1)


@pytest.mark.parametrize("size", [0, 1, BYTES_PER_EXTRA_FRAGMENT - 1])
def test_message_with_too_many_fragments_is_rejected(size: int) -> None:
    coalescer = InboundFrames()
    most = 1 + max(n for n in range(10_000) if n + 1 <= MAX_FRAGMENTS + n * size // BYTES_PER_EXTRA_FRAGMENT)
    assert b"".join(passed(coalescer, fragments(most, size))) == fragments(most, size)
    assert coalescer.close_reason is None
    passed(coalescer, fragments(2, size)[6:])
    assert coalescer.close_reason == TOO_MANY_FRAGMENTS
    assert passed(coalescer, masked(TEXT, b"a")) == []


def test_large_fragments_may_be_many_and_each_message_is_counted_anew() -> None:
    coalescer = InboundFrames()
    for _ in range(3):
        message = fragments(MAX_FRAGMENTS, 1) + masked(PING, b"") + masked(CONTINUATION, b"x")
        assert b"".join(passed(coalescer, message)) == message
    passed(coalescer, fragments(20_000, BYTES_PER_EXTRA_FRAGMENT))
    assert coalescer.close_reason is None


@pytest.mark.parametrize(
    "frames",
    [
        [masked(TEXT, b"x" * 1001)],
        [masked(BINARY, b"x" * 1001)[:8]],
        [masked(TEXT, b"x" * 500, fin=False), masked(PING, b"p"), masked(CONTINUATION, b"x" * 501)[:8]],
    ],
    ids=["whole", "only its header", "in fragments"],
)
def test_too_large_message_is_rejected_by_its_frame_headers(frames: list[bytes]) -> None:
    coalescer = InboundFrames(max_message_size=1000)
    for frame in frames[:-1]:
        assert passed(coalescer, frame) == [frame]
    assert passed(coalescer, frames[-1]) == []
    assert coalescer.close_reason == TOO_LARGE


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
@pytest.mark.parametrize("refused", [False, True])
def test_close_frame_is_found_after_any_bytes(size: int, refused: bool) -> None:
    coalescer = InboundFrames(max_message_size=1000 if refused else 10_000)
    before = masked(TEXT, b"\x88\x80" * 1000) + masked(PING, b"\x88\x80")
    for start in range(0, len(before), size):
        passed(coalescer, before[start : start + size])
        assert not coalescer.close_received
    assert (coalescer.close_reason is not None) == refused
    for start in range(0, 8, size):
        passed(coalescer, masked(CLOSE, b"\x03\xe8")[start : start + size])
    assert coalescer.close_received


def test_discarded_bytes_are_examined_from_the_last_frame() -> None:
    coalescer = InboundFrames()
    whole = masked(TEXT, b"\x88\x80" * 100, fin=False)
    passed(coalescer, whole[:150])
    coalescer.discard(whole[150:])
    assert not coalescer.close_received
    coalescer.discard(masked(CONTINUATION, b"x") + masked(CLOSE, b""))
    assert coalescer.close_received


def test_few_discarded_frames_are_examined_at_a_time() -> None:
    coalescer = InboundFrames()
    more = coalescer.discard(masked(PING, b"") * 2 * FRAMES_PER_TURN + masked(CLOSE, b""))
    for _ in range(2):
        assert more
        assert not coalescer.close_received
        more = coalescer.discard(b"")
    assert coalescer.close_received


def test_invalid_bytes_end_the_search_for_a_close_frame() -> None:
    coalescer = InboundFrames()
    coalescer.discard(b"\x83\x80\0\0\0\0")
    assert coalescer.close_received
