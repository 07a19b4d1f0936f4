"""The grammar of channels and patterns, which patterns match a channel, and which patterns a grant covers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.error_codes import ErrorCode
from catbus.errors import PeerError
from catbus.protocol.channels import check_channel, check_pattern, covers, is_reserved, matches, prefix_range, selectors

segments = st.sampled_from(["a", "b", "ab", "_", "A-0"])
channels = st.lists(segments, min_size=1, max_size=4).map(".".join)
patterns = st.one_of(channels, channels.map(lambda channel: channel + ".*"), st.just("*"))


# The grammar

LONGEST = ".".join(["x" * 63] * 4)
DEEPEST = ".".join(["x"] * 32)

CHANNELS = ["a", "project.abc123.updates", "A-z_0.9", "-", "_", "0", LONGEST, DEEPEST]

MALFORMED = {
    "": "empty",
    ".": "segment is empty",
    "a.": "segment is empty",
    ".a": "segment is empty",
    "a..b": "segment is empty",
    "a b": "' '",
    "a\n": r"'\\n'",
    "a.b\n": r"'\\n'",
    "a/b": "'/'",
    "é": "'\\\\xe9'",
    "a.٣": "u0663",
    "a.²": "xb2",
    "\uff41": "uff41",
    "a\0": "x00",
    "a.\ud800": "ud800",
    "a.*.b": "wildcard",
    "*.a": "wildcard",
    "a*": "wildcard",
    "a.**": "wildcard",
    "*.*": "wildcard",
    "**": "wildcard",
    "a.*.*": "wildcard",
    LONGEST + "x": "255",
    DEEPEST + ".x": "32",
}

# Every channel that these patterns match exceeds the limit of length or depth.
PATTERNS_WITHOUT_CHANNELS = [LONGEST + ".*", DEEPEST + ".*"]


def fault(check: Callable[[str], None], text: str) -> PeerError | None:
    try:
        check(text)
    except PeerError as error:
        return error
    return None


@pytest.mark.parametrize("text", CHANNELS)
def test_channel_is_a_pattern(text: str) -> None:
    check_channel(text)
    check_pattern(text)


@pytest.mark.parametrize("text", ["*", "a.*", "project.abc123.*", LONGEST[:253] + ".*"])
def test_wildcard_is_the_last_segment_of_a_pattern(text: str) -> None:
    check_pattern(text)


@pytest.mark.parametrize("text", ["*", "a.*"])
def test_channel_has_no_wildcard(text: str) -> None:
    with pytest.raises(PeerError, match="wildcard") as caught:
        check_channel(text)
    assert caught.value.code == ErrorCode.INVALID_CHANNEL
    assert caught.value.close is None


@pytest.mark.parametrize(("text", "wrong"), MALFORMED.items())
def test_error_names_the_fault(text: str, wrong: str) -> None:
    with pytest.raises(PeerError, match=wrong) as channel:
        check_channel(text)
    with pytest.raises(PeerError, match=wrong) as pattern:
        check_pattern(text)
    assert (channel.value.code, channel.value.close) == (ErrorCode.INVALID_CHANNEL, None)
    assert (pattern.value.code, pattern.value.close) == (ErrorCode.INVALID_PATTERN, None)


@pytest.mark.parametrize("text", PATTERNS_WITHOUT_CHANNELS)
def test_pattern_has_room_for_a_matching_channel(text: str) -> None:
    with pytest.raises(PeerError):
        check_pattern(text)


@given(st.text() | st.text(max_size=3).map(lambda text: text * 200))
def test_error_is_short_and_ascii(text: str) -> None:
    for error in (fault(check_channel, text), fault(check_pattern, text)):
        if error is not None:
            assert len(error.message) < 800
            assert error.message.isascii()
            assert error.message.isprintable()


@given(st.text(alphabet="aZ5_-.*\n é٣", max_size=8))
def test_grammar_is_that_of_the_specification(text: str) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")

    def is_channel(text: str) -> bool:
        return all(segment and set(segment) <= allowed for segment in text.split("."))

    is_pattern = is_channel(text) or text == "*" or (text.endswith(".*") and is_channel(text[:-2]))
    assert (fault(check_channel, text) is None) == is_channel(text)
    assert (fault(check_pattern, text) is None) == is_pattern


# Matching and covering

ALL_CHANNELS = [".".join(path) for depth in (1, 2, 3, 4) for path in product("ab_", repeat=depth)]
ALL_PATTERNS = [
    "*",
    *(".".join(path) + end for depth in (1, 2, 3) for path in product("a_", repeat=depth) for end in ("", ".*")),
]


def matches_by_specification(pattern: str, channel: str) -> bool:
    """Whether a pattern matches a channel, in the words of the specification."""
    *above, last = pattern.split(".")
    path = channel.split(".")
    if pattern == "*":
        return not path[0].startswith("_")
    if last == "*":
        return len(path) > len(above) and path[: len(above)] == above
    return path == [*above, last]


def test_pattern_matches_its_channels() -> None:
    for pattern, channel in product(ALL_PATTERNS, ALL_CHANNELS):
        assert matches(pattern, channel) == matches_by_specification(pattern, channel), (pattern, channel)


def test_grant_covers_a_pattern_if_it_matches_all_its_channels() -> None:
    matched = {pattern: {channel for channel in ALL_CHANNELS if matches(pattern, channel)} for pattern in ALL_PATTERNS}
    for grant, pattern in product(ALL_PATTERNS, repeat=2):
        assert covers(grant, pattern) == (matched[pattern] <= matched[grant]), (grant, pattern)


@pytest.mark.parametrize("channel", ["_", "_catbus", "_catbus.sessions.alice", "__a", "_erased"])
def test_only_a_pattern_that_names_a_reserved_channel_matches_it(channel: str) -> None:
    first = channel.split(".", maxsplit=1)[0]
    assert is_reserved(channel)
    assert is_reserved(first + ".*")
    assert [matches(pattern, channel) for pattern in ("*", "a.*", channel)] == [False, False, True]
    assert [covers("*", pattern) for pattern in (channel, channel + ".*", first + ".*")] == [False] * 3
    assert [covers(channel + ".*", pattern) for pattern in (channel + ".*", channel + ".a")] == [True] * 2
    assert "*" not in selectors(channel)


@pytest.mark.parametrize("text", ["a", "a._b", "a_", "-_", "0._", "*", "a.*", "a._.*"])
def test_only_texts_that_begin_with_an_underscore_are_reserved(text: str) -> None:
    assert not is_reserved(text)
    assert matches("*", text)


@given(patterns, patterns, channels)
def test_grant_matches_every_channel_of_a_covered_pattern(grant: str, pattern: str, channel: str) -> None:
    if covers(grant, pattern) and matches(pattern, channel):
        assert matches(grant, channel)


@given(patterns, channels)
def test_prefix_range_contains_the_matching_channels(pattern: str, channel: str) -> None:
    bounds = prefix_range(pattern)
    if bounds is None:
        assert pattern == "*" or not pattern.endswith(".*")
    else:
        assert (bounds[0] <= channel < bounds[1]) == matches(pattern, channel)


def test_prefix_range_is_a_prefix_and_its_successor() -> None:
    assert prefix_range("a.b.*") == ("a.b.", "a.b/")
    assert prefix_range("a.b") is None
    assert prefix_range("*") is None


@given(patterns, patterns)
def test_selectors_are_the_patterns_that_cover_a_text(grant: str, text: str) -> None:
    assert (grant in selectors(text)) == covers(grant, text)
    assert len(list(selectors(text))) == len(set(selectors(text)))
