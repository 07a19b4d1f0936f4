"""The topic tree, compared with a plain list of (pattern, member) pairs."""

from __future__ import annotations

import gc
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from catbus.delivery import topic_tree
from catbus.delivery.topic_tree import Group, TopicTree
from catbus.errors import PeerError
from catbus.protocol.channels import matches
from tests.test_channels import channels, patterns


def patterns_of(groups: tuple[Group[int], ...]) -> list[str]:
    return [group.pattern for group in groups]


class TreeAgainstPairs(RuleBasedStateMachine):
    """The tree finds the groups that a list of (pattern, member) pairs contains."""

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
    def remove_existing_pair(self, data: st.DataObject) -> None:
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
        assert is_empty(self.tree)


def is_empty(tree: TopicTree[int]) -> bool:
    return not tree._groups


TestTreeAgainstPairs = TreeAgainstPairs.TestCase
TestTreeAgainstPairs.settings = settings(stateful_step_count=40)


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
    assert is_empty(tree)
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
    assert is_empty(tree)


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
    """The size in bytes of all objects that are reachable from the tree. Each object counts once."""
    seen: dict[int, object] = {}
    pending: list[object] = [tree]
    while pending:
        current = pending.pop()
        if id(current) not in seen and not isinstance(current, type):
            seen[id(current)] = current
            pending += gc.get_referents(current)
    return sum(map(sys.getsizeof, seen.values()))
