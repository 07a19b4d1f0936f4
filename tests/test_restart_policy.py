"""When a worker that has died is started again."""

from __future__ import annotations

from catbus.processes.restart_policy import FIRST_DELAY, MAX_DEATHS, PERIOD, RestartPolicy


def test_first_death_has_no_delay_and_each_further_one_twice_as_long() -> None:
    policy = RestartPolicy()
    delays = [policy.record_death(float(now)) for now in range(MAX_DEATHS)]
    assert delays == [0.0, FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY, None]


def test_worker_that_dies_rarely_is_always_started_again() -> None:
    policy = RestartPolicy()
    gap = PERIOD / (MAX_DEATHS - 1)
    assert all(policy.record_death(number * gap) is not None for number in range(100))
    policy = RestartPolicy()
    assert [policy.record_death(number * PERIOD) for number in range(10)] == [0.0] * 10
