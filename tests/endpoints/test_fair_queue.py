"""The order in which waiting keys are served."""

from __future__ import annotations

from collections import Counter

from catbus.endpoints.webtransport.fair_queue import MAX_SAVED, SHARE, USE_FORGOTTEN_AFTER, CpuUsage, FairQueue


def drain(queue: FairQueue[str, str, int], now: float, cost: float, most: int = 1_000_000) -> list[str]:
    """Take items one by one at this cost; return their sources."""
    sources: list[str] = []
    while len(sources) < most and (turn := queue.take(now, over_share=True)) is not None:
        turn.items.popleft()
        sources.append(turn.source)
        queue.end(turn, cost, now)
    return sources


def test_use_is_paid_off_with_time_and_forgotten_after_a_second() -> None:
    usage = CpuUsage()
    usage.charge(MAX_SAVED, 100.0)
    assert not usage.exceeded(100.0)
    usage.charge(0.01, 100.0)
    assert usage.exceeded(100.0)
    assert not usage.exceeded(100.0 + 0.01 / SHARE + 1e-6)
    usage.charge(1000.0, 100.0)
    assert usage.exceeded(100.0)
    assert not usage.exceeded(100.0 + USE_FORGOTTEN_AFTER)


def test_key_with_the_least_use_goes_first() -> None:
    queue: FairQueue[str, str, int] = FairQueue(100)
    queue.charge("heavy", 0.1, 0.0)
    for number in range(3):
        assert queue.put("heavy", "heavy", number, 0.0)
    assert queue.put("light", "light", 0, 0.0)
    assert drain(queue, 0.0, 0.001) == ["light", "heavy", "heavy", "heavy"]
    assert len(queue) == 0
    assert queue.take(0.0, over_share=True) is None


def test_rarely_used_key_waits_for_one_other_at_most() -> None:
    queue: FairQueue[str, str, int] = FairQueue(1000)
    for number in range(400):
        assert queue.put(f"flood {number % 20}", "x", number, 0.0)
    drain(queue, 0.0, 0.001, most=50)
    queue.put("honest", "honest", 1, 0.0)
    assert drain(queue, 0.0, 0.001, most=1) == ["honest"]


def test_key_that_uses_little_goes_first_even_with_little_cpu() -> None:
    """The broker has a tenth of a core, so no key uses its share of a whole core."""
    queue: FairQueue[str, str, int] = FairQueue(10_000)
    now, waited = 0.0, []
    for number in range(1000):
        queue.put(f"flood {number % 20}", "flood", number, now)
    for number in range(500):
        if number % 10 == 0:
            queue.put("honest", "honest", number, now)
        turn = queue.take(now, over_share=True)
        assert turn is not None
        item = turn.items.popleft()
        if turn.source == "honest":
            waited.append(number - item)
        cost = 0.0001 if turn.source == "honest" else 0.002
        now += 10 * cost
        queue.end(turn, cost, now)
    assert len(waited) == 50
    # At first no key has used anything.
    assert max(waited[3:]) == 0


def test_busy_keys_get_equal_time_at_any_cost_per_item() -> None:
    queue: FairQueue[str, str, int] = FairQueue(100_000)
    costs = {"dear": 0.002, "cheap": 0.0005}
    for number in range(2000):
        for key in costs:
            queue.put(key, key, number, 0.0)
    spent = Counter[str]()
    now = 0.0
    while now < 1.0:
        turn = queue.take(now, over_share=True)
        assert turn is not None
        turn.items.popleft()
        cost = costs[turn.source]
        spent[turn.source] += int(cost * 1e6)
        now += cost
        queue.end(turn, cost, now)
    assert abs(spent["dear"] - spent["cheap"]) < 20_000


def test_sources_of_one_key_are_served_in_rotation() -> None:
    queue: FairQueue[str, str, int] = FairQueue(100)
    for number in range(10):
        assert queue.put("network", "hostile", number, 0.0)
    assert queue.put("network", "honest", 0, 0.0)
    assert drain(queue, 0.0, 0.001)[:2] == ["hostile", "honest"]


def test_keys_over_their_shares_wait_unless_more_is_allowed() -> None:
    queue: FairQueue[str, str, int] = FairQueue(100)
    queue.put("a", "a", 1, 0.0)
    queue.charge("a", 2 * MAX_SAVED, 0.0)
    assert queue.take(0.0) is None
    assert len(queue) == 1
    assert queue.take(0.0, over_share=True) is not None
    queue.put("b", "b", 1, 0.0)
    assert queue.take(0.0) is not None


def test_flood_leaves_room_for_others() -> None:
    queue: FairQueue[str, str, int] = FairQueue(1000)
    for key in ("flood", "another", "a third"):
        while queue.put(key, key, 0, 0.0):
            pass
    assert queue.put("honest", "honest", 0, 0.0)
    # One key with many sources leaves room, too.
    number = 0
    while queue.put("crowd", f"source {number}", 0, 0.0):
        number += 1
    assert queue.put("honest", "another", 0, 0.0)
    number = 0
    while queue.put(f"forged {number}", "x", 0, 0.0):
        number += 1
    assert len(queue) == 1000


def test_keys_are_forgotten_when_their_use_is_paid_off() -> None:
    queue: FairQueue[int, int, int] = FairQueue(100)
    for number in range(100_000):
        now = number / 1000
        assert queue.put(number, 0, 0, now)
        turn = queue.take(now)
        assert turn is not None
        turn.items.popleft()
        queue.end(turn, 0.0001, now)
    assert len(queue._flows) < 1000
