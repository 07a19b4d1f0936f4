"""catbus.webtransport.capsules"""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.webtransport import varint
from catbus.webtransport.capsules import CLOSE_SESSION, CapsuleError, CapsuleReader, CloseCapsule, encode_close

GREASE = [0x17 + 0x29 * n for n in (0, 1, 1000, 10**15)]


def capsule(kind: int, value: bytes) -> bytes:
    return varint.encode(kind) + varint.encode(len(value)) + value


def read(*chunks: bytes) -> CloseCapsule | None:
    reader = CapsuleReader()
    for chunk in chunks:
        close = reader.feed(chunk)
        if close is not None:
            return close
    return None


unknown = st.builds(capsule, st.sampled_from([0, 1, 0x78AE, *GREASE]), st.binary(max_size=40))


@given(st.lists(unknown, max_size=3), st.integers(0, 2**32 - 1), st.text(max_size=20))
def test_close_capsule_is_decoded_wherever_the_stream_is_split(before: list[bytes], code: int, reason: str) -> None:
    stream = b"".join(before) + encode_close(code, reason) + b"what follows"
    expected = CloseCapsule(code, reason)
    assert read(stream) == expected
    assert read(*[stream[i : i + 1] for i in range(len(stream))]) == expected
    for cut in range(len(stream)):
        assert read(stream[:cut], stream[cut:]) == expected


@given(st.lists(unknown, max_size=4))
def test_stream_may_end_only_between_capsules(capsules: list[bytes]) -> None:
    ends = {0}
    for one in capsules:
        ends.add(max(ends) + len(one))
    stream = b"".join(capsules)
    reader = CapsuleReader()
    for position in range(len(stream) + 1):
        assert reader.at_boundary == (position in ends)
        assert reader.feed(stream[position : position + 1]) is None


def test_large_unknown_capsule_is_not_buffered() -> None:
    reader = CapsuleReader()
    reader.feed(varint.encode(GREASE[2]) + varint.encode(2**40))
    for _ in range(100):
        assert reader.feed(bytes(100_000)) is None
        assert sys.getsizeof(reader._buffer) < 200
    assert not reader.at_boundary


@pytest.mark.parametrize("length", [0, 3, 1029, 2**30, 2**62 - 1])
def test_close_capsule_of_invalid_length_is_rejected(length: int) -> None:
    with pytest.raises(CapsuleError):
        read(varint.encode(CLOSE_SESSION) + varint.encode(length))


def test_close_capsule_may_have_no_reason() -> None:
    assert read(capsule(CLOSE_SESSION, b"\0\0\x11\x31")) == CloseCapsule(4401, "")


def test_longest_reason_is_accepted() -> None:
    assert read(capsule(CLOSE_SESSION, bytes(4) + b"x" * 1024)) == CloseCapsule(0, "x" * 1024)


def test_reason_that_is_not_utf8_is_rejected() -> None:
    with pytest.raises(CapsuleError):
        read(capsule(CLOSE_SESSION, bytes(4) + b"a\xff"))


@pytest.mark.parametrize("kind", [0x190B4D3D, 0x190B4D3F, 0x190B4D40, 0x190B4D41, 0x190B4D43, 0x190B4D44])
def test_flow_control_capsules_are_ignored(kind: int) -> None:
    assert read(capsule(kind, varint.encode(2**62 - 1)) + encode_close(1, "x")) == CloseCapsule(1, "x")


@pytest.mark.parametrize("kind", [0x190B4D3E, 0x190B4D42])
def test_stream_limit_capsules_are_rejected(kind: int) -> None:
    with pytest.raises(CapsuleError):
        read(capsule(kind, varint.encode(4) + varint.encode(2**62 - 1)))


def test_long_reason_is_truncated_between_characters() -> None:
    close = read(encode_close(1, "x" + "€" * 1000))
    assert close == CloseCapsule(1, "x" + "€" * 341)
    assert read(encode_close(1, "\ud800")) == CloseCapsule(1, "?")
