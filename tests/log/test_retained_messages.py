"""Retained messages in memory, compared with a dict."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from catbus.error_codes import ErrorCode
from catbus.log import Append, Entry, RetainedMessages
from catbus.log.interface import RETAINED_FULL
from catbus.protocol.channels import matches

CHANNELS = ["-", "Z", "_a.b", "a", "a-b", "a.b", "a.b.c", "a.c", "ab", "b"]
PATTERNS = ["*", "_a.*", "a", "a.*", "a.b", "a.b.*", "b", "c.*", "z"]


def append(channel: str, payload: bytes, expect: int | None = None) -> Append:
    return Append(channel, payload, lambda *_: None, retain=True, expect=expect)


def read(retained: RetainedMessages, pattern: str, until: int, rows: int, size: int = 1 << 20) -> list[Entry]:
    entries: list[Entry] = []
    after = None
    while True:
        page = retained.page(pattern, after, until, rows, size, until)
        entries += page.entries
        if page.complete:
            return entries
        assert page.last is not None
        assert after is None or page.last > after, "a page made no progress"
        after = page.last


@given(
    st.lists(st.tuples(st.sampled_from(CHANNELS), st.sampled_from([b"null", b"1", b"22", b"333"])), max_size=30),
    st.sampled_from(PATTERNS),
    st.integers(0, 31),
    st.integers(1, 3),
    st.integers(1, 20),
)
def test_pages_are_those_of_a_dict(
    published: list[tuple[str, bytes]], pattern: str, until: int, rows: int, size: int
) -> None:
    retained, model = RetainedMessages(), dict[str, Entry]()
    for seq, (channel, payload) in enumerate(published, 1):
        entry = Entry(seq, 0, channel, payload, retain=True)
        retained.replace(entry, None)
        model[channel] = entry
    kept = {channel: entry for channel, entry in model.items() if entry.payload != b"null"}
    assert len(retained) == len(kept)
    assert retained.size == sum(entry.size for entry in kept.values())
    expected = [kept[c] for c in sorted(kept) if matches(pattern, c) and kept[c].seq <= until]
    assert read(retained, pattern, until, rows, size) == expected
    first = retained.page(pattern, None, until, rows, size, until)
    assert len(first.entries) <= rows
    assert sum(entry.size for entry in first.entries[1:]) < size


def test_message_is_compared_with_the_retained_one() -> None:
    retained = RetainedMessages()
    assert retained.check(append("a", b"1", expect=0)) is None
    rejected = retained.check(append("a", b"1", expect=1))
    assert rejected is not None
    assert (rejected.code, rejected.retained_seq) == (ErrorCode.CONFLICT, 0)
    retained.replace(Entry(7, 0, "a", b"1", retain=True), None)
    for expect in (None, 7):
        assert retained.check(append("a", b"2", expect)) is None
    for expect in (0, 6, 8):
        rejected = retained.check(append("a", b"2", expect))
        assert rejected is not None
        assert rejected.retained_seq == 7
    retained.replace(Entry(8, 0, "a", b"null", retain=True), None)
    assert retained.check(append("a", b"1", expect=0)) is None


def test_bytes_are_limited_exactly_and_removing_is_always_allowed() -> None:
    retained = RetainedMessages(10)
    retained.replace(Entry(1, 0, "a", b"1234", retain=True), None)
    assert retained.check(append("b", b"1234")) is None
    assert retained.check(append("b", b"12345")) is RETAINED_FULL
    retained.replace(Entry(2, 0, "b", b"1234", retain=True), None)
    assert retained.check(append("c", b"1")) is RETAINED_FULL
    assert retained.check(append("a", b"4321")) is None
    assert retained.check(append("a", b"54321")) is RETAINED_FULL
    conflict = retained.check(append("a", b"54321", expect=9))
    assert conflict is not None
    assert conflict.code is ErrorCode.CONFLICT
    for channel in ("a", "c"):
        assert retained.check(append(channel, b"null")) is None
    retained.replace(Entry(3, 0, "a", b"null", retain=True), None)
    assert (retained.size, len(retained)) == (5, 1)
    assert retained.check(append("c", b"1234")) is None
