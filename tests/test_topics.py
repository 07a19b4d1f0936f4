"""The grammar of channels and patterns, and the tree against a plain list of pairs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from catbus.delivery import topic_tree
from catbus.delivery.topic_tree import Group, TopicTree
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError
from catbus.protocol.channels import check_channel, check_pattern, covers, matches, prefix_range, selectors

segments = st.sampled_from(["a", "b", "ab", "_", "A-0"])
channels = st.lists(segments, min_size=1, max_size=4).map(".".join)
patterns = st.one_of(channels, channels.map(lambda channel: channel + ".*"), st.just("*"))


# The grammar

LONGEST = ".".join(["x" * 63] * 4)
DEEPEST = ".".join(["x"] * 32)

CHANNELS = ["a", "project.abc123.updates", "A-z_0.9", "-", "_", "0", LONGEST, DEEPEST]

NEITHER = {
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

# Nothing that they match would be short enough.
MATCHES_NOTHING = [LONGEST + ".*", DEEPEST + ".*"]


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


@pytest.mark.parametrize(("text", "wrong"), NEITHER.items())
def test_error_names_the_fault(text: str, wrong: str) -> None:
    with pytest.raises(PeerError, match=wrong) as channel:
        check_channel(text)
    with pytest.raises(PeerError, match=wrong) as pattern:
        check_pattern(text)
    assert (channel.value.code, channel.value.close) == (ErrorCode.INVALID_CHANNEL, None)
    assert (pattern.value.code, pattern.value.close) == (ErrorCode.INVALID_PATTERN, None)


@pytest.mark.parametrize("text", MATCHES_NOTHING)
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

ALL_CHANNELS = [".".join(path) for depth in (1, 2, 3, 4) for path in product("abc", repeat=depth)]
ALL_PATTERNS = [
    "*",
    *(".".join(path) + end for depth in (1, 2, 3) for path in product("ab", repeat=depth) for end in ("", ".*")),
]


def selects(pattern: str, channel: str) -> bool:
    """What a pattern selects, in the words of the specification."""
    *above, last = pattern.split(".")
    path = channel.split(".")
    if last == "*":
        return len(path) > len(above) and path[: len(above)] == above
    return path == [*above, last]


def test_pattern_matches_its_channels() -> None:
    for pattern, channel in product(ALL_PATTERNS, ALL_CHANNELS):
        assert matches(pattern, channel) == selects(pattern, channel), (pattern, channel)


def test_grant_covers_a_pattern_if_it_matches_all_its_channels() -> None:
    matched = {pattern: {channel for channel in ALL_CHANNELS if matches(pattern, channel)} for pattern in ALL_PATTERNS}
    for grant, pattern in product(ALL_PATTERNS, repeat=2):
        assert covers(grant, pattern) == (matched[pattern] <= matched[grant]), (grant, pattern)


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


# The tree


def patterns_of(groups: tuple[Group[int], ...]) -> list[str]:
    return [group.pattern for group in groups]


class TreeAgainstPairs(RuleBasedStateMachine):
    """The tree says what a list of (pattern, member) pairs would say."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: TopicTree[int] = TopicTree()
        self.pairs: list[tuple[str, int]] = []

    @rule(pattern=patterns, member=st.integers(0, 3))
    def add(self, pattern: str, member: int) -> None:
        self.tree.add(pattern, member)
        if (pattern, member) not in self.pairs:
            self.pairs.append((pattern, member))

    @rule(pattern=patterns, member=st.integers(0, 3))
    def remove(self, pattern: str, member: int) -> None:
        assert self.tree.remove(pattern, member) == ((pattern, member) in self.pairs)
        if (pattern, member) in self.pairs:
            self.pairs.remove((pattern, member))

    @rule(data=st.data())
    def remove_what_is_there(self, data: st.DataObject) -> None:
        if self.pairs:
            self.remove(*data.draw(st.sampled_from(self.pairs)))

    @rule(channel=channels)
    def match(self, channel: str) -> None:
        groups = self.tree.match(channel)
        assert all(group.members for group in groups)
        assert len({group.pattern for group in groups}) == len(groups)
        found = {(group.pattern, member) for group in groups for member in group.members}
        assert found == {pair for pair in self.pairs if matches(pair[0], channel)}

    @invariant()
    def holds_the_pairs(self) -> None:
        expected: dict[str, list[int]] = {}
        for pattern, member in self.pairs:
            expected.setdefault(pattern, []).append(member)
        assert {group.pattern: list(group.members) for group in self.tree.groups()} == expected
        assert len(self.tree) == len(self.pairs)
        assert bool(self.tree) == bool(self.pairs)

    def teardown(self) -> None:
        for pair in self.pairs:
            self.tree.remove(*pair)
        assert is_bare(self.tree)


def is_bare(tree: TopicTree[int]) -> bool:
    return not tree._groups


TestTreeAgainstPairs = TreeAgainstPairs.TestCase
TestTreeAgainstPairs.settings = settings(max_examples=100, stateful_step_count=40)


def test_widest_pattern_comes_first() -> None:
    tree: TopicTree[int] = TopicTree()
    for pattern in ("a.b.c", "a.*", "*", "a.b.*", "a.b", "a.b.c.*", "a"):
        tree.add(pattern, 1)
    assert patterns_of(tree.match("a.b.c")) == ["*", "a.*", "a.b.*", "a.b.c"]
    assert patterns_of(tree.match("a.b")) == ["*", "a.*", "a.b"]
    assert patterns_of(tree.match("a")) == ["*", "a"]
    assert patterns_of(tree.match("b")) == ["*"]


def test_adding_a_malformed_pattern_changes_nothing() -> None:
    tree: TopicTree[int] = TopicTree()
    with pytest.raises(PeerError):
        tree.add("a.*.b", 1)
    assert is_bare(tree)
    assert len(tree) == 0


def test_group_keeps_its_members_in_the_order_of_arrival() -> None:
    tree: TopicTree[int] = TopicTree()
    for member in (3, 1, 2, 3):
        tree.add("a", member)
    tree.remove("a", 1)
    tree.add("a", 1)
    (group,) = tree.match("a")
    assert list(group.members) == [3, 2, 1]


def test_cached_channel_stays_cached_while_only_members_change() -> None:
    tree: TopicTree[int] = TopicTree()
    tree.add("a.*", 1)
    tree.add("a.b", 1)
    before = tree.match("a.b")
    tree.add("a.*", 2)
    tree.remove("a.b", 9)
    tree.remove("a.*", 1)
    assert tree.match("a.b") is before
    assert list(before[0].members) == [2]


@pytest.mark.parametrize("pattern", ["a.b", "a.*", "*"])
def test_cache_follows_groups_that_are_added_and_removed(pattern: str) -> None:
    tree: TopicTree[int] = TopicTree()
    assert tree.match("a.b") == ()
    tree.add(pattern, 1)
    assert patterns_of(tree.match("a.b")) == [pattern]
    tree.remove(pattern, 1)
    assert tree.match("a.b") == ()
    assert is_bare(tree)


def test_adding_and_removing_another_channel_keeps_the_cache() -> None:
    tree: TopicTree[int] = TopicTree()
    tree.add("a.*", 1)
    before = tree.match("a.b")
    tree.add("inbox.7", 1)
    tree.remove("inbox.7", 1)
    assert tree.match("a.b") is before


def test_cache_is_bounded() -> None:
    tree: TopicTree[int] = TopicTree()
    tree.add("a.*", 1)
    for number in range(3 * topic_tree.CACHED_CHANNELS):
        assert len(tree.match(f"a.{number}")) == 1
        assert len(tree._cache) <= topic_tree.CACHED_CHANNELS


def test_groups_are_compared_by_identity() -> None:
    tree: TopicTree[int] = TopicTree()
    tree.add("a", 1)
    (old,) = tree.match("a")
    tree.remove("a", 1)
    tree.add("a", 1)
    (new,) = tree.match("a")
    assert old != new
    assert len({old, new}) == 2
    assert not old.members


def test_memory_of_a_pattern_does_not_depend_on_its_depth() -> None:
    flat: TopicTree[int] = TopicTree()
    deep: TopicTree[int] = TopicTree()
    for number in range(1000):
        flat.add(f"{number:063}", 1)
        deep.add(".".join(f"{number:032}"), 1)
    assert memory_of(deep) <= 1.2 * memory_of(flat)


def memory_of(tree: TopicTree[int]) -> int:
    """The bytes of all objects that the tree leads to, each once."""
    seen: dict[int, object] = {}
    found: list[object] = [tree]
    while found:
        thing = found.pop()
        if id(thing) not in seen and not isinstance(thing, type):
            seen[id(thing)] = thing
            found += gc.get_referents(thing)
    return sum(map(sys.getsizeof, seen.values()))


@given(patterns, patterns)
def test_selectors_are_the_patterns_that_cover_a_text(grant: str, text: str) -> None:
    assert (grant in selectors(text)) == covers(grant, text)
    assert len(list(selectors(text))) == len(set(selectors(text)))
