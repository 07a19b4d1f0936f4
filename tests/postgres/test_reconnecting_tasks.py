"""Tasks that reconnect, on a virtual clock."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import trio
from structlog.testing import CapturingLogger
from trio.testing import MockClock

from catbus.errors import ConfigError
from catbus.postgres.access import reconnecting_tasks
from catbus.postgres.access.reconnecting_tasks import ReconnectingTasks, ReportProgress


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    logger = CapturingLogger()
    monkeypatch.setattr(reconnecting_tasks, "logger", logger)
    return logger


def outages(count: int) -> Iterator[Exception]:
    yield from (ConnectionRefusedError(f"try {n}") for n in range(count))


async def test_start_and_end_of_an_outage_are_logged_once(autojump_clock: MockClock, logs: CapturingLogger) -> None:
    supervisor = ReconnectingTasks("one", "other")
    errors = outages(20)

    async def one(working: ReportProgress) -> None:
        if (error := next(errors, None)) is not None:
            raise error
        working()
        assert supervisor.available
        working()

    async def other(working: ReportProgress) -> None:
        working()
        assert not supervisor.available

    await supervisor.run("other", other)
    await supervisor.run("one", one)
    assert [(call.method_name, *call.args) for call in logs.calls] == [
        ("warning", "database unavailable, trying again"),
        ("info", "database connected"),
    ]
    assert logs.calls[0].kwargs == {"service": "one", "error": "ConnectionRefusedError: try 0"}
    assert supervisor.restarts == 20
    assert supervisor.failures == 0


async def test_backoff_grows_to_a_second_and_resets_after_progress(autojump_clock: MockClock) -> None:
    starts: list[float] = []
    supervisor = ReconnectingTasks("one")

    async def one(working: ReportProgress) -> None:
        starts.append(trio.current_time())
        if len(starts) == 15:
            working()
        if len(starts) < 20:
            raise OSError

    await supervisor.run("one", one)
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert 0.025 <= pauses[0] <= 0.05
    assert all(0.5 <= pause <= 1 for pause in pauses[5:14])
    assert 0.025 <= pauses[14] <= 0.05
    assert 0.05 <= pauses[15] <= 0.1


async def test_service_is_down_from_its_outage_to_its_next_progress(autojump_clock: MockClock) -> None:
    supervisor = ReconnectingTasks("one")
    seen: list[bool] = []

    async def one(working: ReportProgress) -> None:
        seen.append(supervisor.available)
        if len(seen) < 3:
            working()
            seen.append(supervisor.available)
            raise TimeoutError
        seen.append(supervisor.available)

    await supervisor.run("one", one)
    assert seen == [False, True, False, False]
    supervisor.stop()
    assert not supervisor.available


async def test_optional_service_makes_nothing_unavailable(autojump_clock: MockClock, logs: CapturingLogger) -> None:
    supervisor = ReconnectingTasks("one")
    errors = outages(3)

    async def one(working: ReportProgress) -> None:
        working()

    async def beside(working: ReportProgress) -> None:
        assert supervisor.available
        if (error := next(errors, None)) is not None:
            raise error
        working()

    await supervisor.run("one", one)
    for _ in range(2):
        await supervisor.run("beside", beside)
        errors = outages(1)
    assert supervisor.available
    assert [(call.method_name, *call.args) for call in logs.calls] == [
        ("info", "database connected"),
        ("warning", "service unavailable, trying again"),
        ("warning", "service unavailable, trying again"),
    ]
    assert logs.calls[1].kwargs == {"service": "beside", "error": "ConnectionRefusedError: try 0"}
    assert supervisor.restarts == 4


async def test_bug_is_fatal_when_it_occurs_five_times_in_a_minute(
    autojump_clock: MockClock, logs: CapturingLogger
) -> None:
    supervisor = ReconnectingTasks("one")

    async def one(working: ReportProgress) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        await supervisor.run("one", one)
    assert supervisor.failures == 5
    # A repeated bug is logged once; the caller logs the fatal one.
    assert [call.args for call in logs.calls] == [("a service failed",)]
    assert isinstance(logs.calls[0].kwargs["exc_info"], KeyError)


async def test_occasional_bug_is_not_fatal(autojump_clock: MockClock) -> None:
    supervisor = ReconnectingTasks("one", "other")
    runs = 0

    async def with_progress(working: ReportProgress) -> None:
        nonlocal runs
        runs += 1
        working()
        if runs < 20:
            raise KeyError

    async def seldom(working: ReportProgress) -> None:
        nonlocal runs
        runs += 1
        await trio.sleep(16)
        if runs < 40:
            raise KeyError

    await supervisor.run("one", with_progress)
    await supervisor.run("other", seldom)
    assert runs == 40


async def test_failing_service_is_logged_once_a_minute(autojump_clock: MockClock, logs: CapturingLogger) -> None:
    """The service makes progress each time, so the backoff does not grow and the bugs are not fatal."""
    supervisor = ReconnectingTasks("one")
    reasons = [KeyError("ours"), RuntimeError("another")]

    async def one(working: ReportProgress) -> None:
        working()
        raise reasons[trio.current_time() - began >= 600]

    began = trio.current_time()
    with trio.move_on_after(630):
        await supervisor.run("one", one)
    failures = [call.kwargs for call in logs.calls if call.args == ("a service failed",)]
    assert len(failures) == 11
    assert failures[0]["exc_info"] is reasons[0]
    assert failures[1]["error"] == "KeyError: 'ours'"
    assert failures[-1]["exc_info"] is reasons[1]
    assert sum(kwargs.get("repeated", 0) for kwargs in failures) > 10_000
    assert all("exc_info" not in kwargs for kwargs in failures[1:-1])


@pytest.mark.parametrize("needed", [True, False])
async def test_repeated_outages_of_a_service_are_logged_a_few_times_a_minute(
    autojump_clock: MockClock, logs: CapturingLogger, needed: bool
) -> None:
    supervisor = ReconnectingTasks(*["one"][:needed])
    ports = iter(range(100_000))

    async def one(working: ReportProgress) -> None:
        working()
        raise OSError(f"refused at port {next(ports)}")

    with trio.move_on_after(119):
        await supervisor.run("one", one)
    lines = [call.args[0] for call in logs.calls]
    downs = [line for line in lines if "unavailable" in line]
    assert len(downs) == 2 * reconnecting_tasks.LOGGED_OUTAGES
    assert lines.count("database connected") <= needed * len(downs) + 1
    assert max(call.kwargs.get("repeated", 0) for call in logs.calls) > 1000


async def test_wrong_configuration_ends_the_tasks_at_once(autojump_clock: MockClock) -> None:
    async def one(working: ReportProgress) -> None:
        async with trio.open_nursery():
            raise ConfigError("too old")

    with pytest.raises(ConfigError, match="too old"):
        await ReconnectingTasks("one").run("one", one)


async def test_outage_within_an_exception_group_is_an_outage(autojump_clock: MockClock) -> None:
    tries = 0

    async def fail() -> None:
        raise OSError("gone")

    async def one(working: ReportProgress) -> None:
        nonlocal tries
        tries += 1
        if tries < 10:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(trio.sleep_forever)

    supervisor = ReconnectingTasks("one")
    await supervisor.run("one", one)
    assert (supervisor.restarts, supervisor.failures) == (9, 0)


async def test_outage_during_the_shutdown_is_ignored(autojump_clock: MockClock) -> None:
    supervisor = ReconnectingTasks("one")

    async def one(working: ReportProgress) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep(1)
            finally:
                raise ConnectionResetError

    with trio.move_on_after(0.5) as scope:
        await supervisor.run("one", one)
    assert scope.cancelled_caught
    assert supervisor.restarts == 0
