"""The choice of the partitions to be served, on a clock of its own."""

from __future__ import annotations

from math import inf

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from catbus.webhooks.delivery_schedule import OPENING_FAILURES, DeliverySchedule, Partition


def parts(consumer: str, number: int) -> dict[Partition, float]:
    return {(consumer, part): 0.0 for part in range(number)}


def test_slow_consumer_leaves_slots_for_others() -> None:
    schedule = DeliverySchedule(16)
    schedule.observe(0, parts("slow", 64))
    assert len(schedule.begin(0)) == 8
    assert schedule.waiting(0) == 56
    schedule.observe(1, parts("slow", 64) | parts("also", 64) | parts("fast", 1))
    begun = schedule.begin(1)
    assert [consumer for consumer, _ in begun].count("also") == 4
    assert ("fast", 0) in begun
    assert "slow" not in {consumer for consumer, _ in begun}


def test_one_consumer_gets_the_only_slot() -> None:
    schedule = DeliverySchedule(1)
    schedule.observe(0, parts("a", 2))
    assert len(schedule.begin(0)) == 1
    assert schedule.begin(0) == []
    assert schedule.next_time(0) == inf


def test_partition_that_waits_longest_begins_first() -> None:
    schedule = DeliverySchedule(2)
    schedule.observe(0, {("a", 0): 5.0, ("b", 0): 3.0, ("c", 0): 4.0})
    assert schedule.begin(0) == []
    assert schedule.next_time(0) == 3
    assert schedule.begin(10) == [("b", 0), ("c", 0)]


def test_circuit_opens_after_failures_and_closes_with_a_success() -> None:
    schedule = DeliverySchedule(100)
    schedule.observe(0, parts("a", 10) | parts("b", 1))
    begun = [partition for partition in schedule.begin(0) if partition[0] == "a"]
    assert len(begun) == 10
    for partition in begun:
        schedule.fail(0, partition, 1.0, 1.0)
        schedule.finish(partition)
    assert schedule.open_circuits == 1
    # The sixth failure after the circuit has opened doubles the pause to 32 s.
    assert schedule.begin(31) == []
    assert schedule.next_time(31) == 32
    (probe,) = schedule.begin(32)
    assert schedule.begin(32) == []
    schedule.fail(32, probe, 1.0, 1.0)
    schedule.finish(probe)
    (other,) = schedule.begin(100)
    assert other != probe
    schedule.succeed(100, other)
    schedule.finish(other)
    assert schedule.open_circuits == 0
    assert len(schedule.begin(100)) == 10


def test_receiver_that_asks_to_wait_blocks_its_consumer_only() -> None:
    schedule = DeliverySchedule(100)
    schedule.observe(0, parts("a", 2) | parts("b", 1))
    schedule.begin(0)
    schedule.throttle(0, ("a", 0), 30.0)
    for partition in (("a", 0), ("a", 1), ("b", 0)):
        schedule.finish(partition)
    schedule.observe(1, parts("a", 2) | parts("b", 1))
    assert schedule.begin(1) == [("b", 0)]
    assert schedule.next_time(1) == 30
    assert len(schedule.begin(30)) == 2


class ScheduleMachine(RuleBasedStateMachine):
    """Any order of polls, starts and ends. What is due and not blocked begins in the end."""

    running = Bundle("running")

    @initialize(slots=st.integers(1, 6))
    def start(self, slots: int) -> None:
        self.slots = slots
        self.now = 0.0
        self.schedule = DeliverySchedule(slots)
        self.active: set[Partition] = set()
        self.failures = dict.fromkeys("ab", 0)

    @rule(work=st.dictionaries(st.tuples(st.sampled_from("ab"), st.integers(0, 3)), st.floats(0, 9)))
    def observe(self, work: dict[Partition, float]) -> None:
        self.schedule.observe(self.now, work)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def begin(self) -> None:
        begun = self.schedule.begin(self.now)
        assert len({*begun}) == len(begun)
        assert self.active.isdisjoint(begun)
        self.active |= {*begun}
        assert len(self.active) <= self.slots
        for consumer in "ab":
            if self.failures[consumer] >= OPENING_FAILURES:
                assert sum(each == consumer for each, _ in begun) <= 1
        assert self.schedule.next_time(self.now) > self.now

    @rule(data=st.data(), how=st.sampled_from(["succeed", "fail", "throttle", "nothing"]))
    def finish(self, data: st.DataObject, how: str) -> None:
        if not self.active:
            return
        partition = data.draw(st.sampled_from(sorted(self.active)))
        match how:
            case "succeed":
                self.schedule.succeed(self.now, partition)
                self.failures[partition[0]] = 0
            case "fail":
                self.schedule.fail(self.now, partition, 2.0, 0.5)
                self.failures[partition[0]] += 1
            case "throttle":
                self.schedule.throttle(self.now, partition, 2.0)
        self.schedule.finish(partition)
        self.active.remove(partition)

    @rule()
    def everything_due_begins_after_the_longest_pause(self) -> None:
        for partition in sorted(self.active):
            self.schedule.finish(partition)
        self.active.clear()
        self.now += 1000
        self.schedule.observe(self.now, parts("a", 1) | parts("b", 1))
        begun = []
        while step := self.schedule.begin(self.now):
            begun += step
            for partition in step:
                self.schedule.finish(partition)
        assert {*begun} == {("a", 0), ("b", 0)}

    @invariant()
    def nothing_is_forgotten(self) -> None:
        if hasattr(self, "schedule"):
            assert self.schedule.running == len(self.active)


TestScheduleMachine = ScheduleMachine.TestCase
