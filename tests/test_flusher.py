"""The flusher on a virtual clock, with transport writers whose flushes take a set time."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.delivery.flusher import CHECKPOINT_AFTER, FLUSHES_PER_CLOCK_READING, MAX_LINGER, Flusher
from catbus.delivery.send_queue import SendQueue


class Stopwatch:
    """A clock that advances only by the cost of flushes, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TransportWriter:
    """Records the time of each flush (Trio time) and the number of items that it took."""

    def __init__(self, flusher: Flusher, stopwatch: Stopwatch, cost: float = 0.0) -> None:
        self.send_queue = SendQueue(self, flusher.wake)
        self.cost = cost
        self.sent: list[tuple[float, int]] = []
        self._stopwatch = stopwatch

    def flush(self) -> None:
        self._stopwatch.now += self.cost
        self.sent.append((trio.current_time(), len(self.send_queue.take())))


async def test_message_is_flushed_at_once_under_low_load(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    stopwatch = Stopwatch()
    flusher = Flusher(stopwatch)
    writer = TransportWriter(flusher, stopwatch, cost=0.0)
    nursery.start_soon(flusher.run)
    for _ in range(3):
        writer.send_queue.put(b"x")
        await wait_all_tasks_blocked()
    assert [count for _, count in writer.sent] == [1, 1, 1]


async def test_send_queues_linger_after_an_expensive_pass_for_as_long_as_it_took(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    stopwatch = Stopwatch()
    flusher = Flusher(stopwatch)
    writers = [TransportWriter(flusher, stopwatch, cost=0.0005) for _ in range(8)]
    nursery.start_soon(flusher.run)
    for _ in range(5):
        for writer in writers:
            writer.send_queue.put(b"x")
        await wait_all_tasks_blocked()
    assert [len(writer.sent) for writer in writers] == [2] * 8, (
        "the second pass already knows the duration of the first one"
    )
    mock_clock.jump(0.0039)
    await wait_all_tasks_blocked()
    assert [len(writer.sent) for writer in writers] == [2] * 8
    mock_clock.jump(0.0002)
    await wait_all_tasks_blocked()
    assert [[count for _, count in writer.sent[2:]] for writer in writers] == [[3]] * 8, "one flush sends all of them"


async def test_send_queue_outside_the_expensive_pass_does_not_linger(
    mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    stopwatch = Stopwatch()
    flusher = Flusher(stopwatch)
    writers = [TransportWriter(flusher, stopwatch, cost=0.001) for _ in range(4)]
    other = TransportWriter(flusher, stopwatch)
    nursery.start_soon(flusher.run)
    for _ in range(3):
        for writer in writers:
            writer.send_queue.put(b"x")
        await wait_all_tasks_blocked()
    assert flusher.statistics().lingering == 4
    other.send_queue.put(b"x")
    await wait_all_tasks_blocked()
    assert len(other.sent) == 1


async def test_lingering_is_bounded(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    stopwatch = Stopwatch()
    flusher = Flusher(stopwatch)
    writer = TransportWriter(flusher, stopwatch, cost=3.0)
    nursery.start_soon(flusher.run)
    for _ in range(3):
        writer.send_queue.put(b"x")
        await wait_all_tasks_blocked()
    assert len(writer.sent) == 2
    mock_clock.jump(MAX_LINGER + 0.001)
    await wait_all_tasks_blocked()
    assert len(writer.sent) == 3


async def test_long_pass_lets_other_tasks_run_between_its_slices(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    stopwatch = Stopwatch()
    flusher = Flusher(stopwatch)
    writers = [TransportWriter(flusher, stopwatch, cost=CHECKPOINT_AFTER) for _ in range(9 * FLUSHES_PER_CLOCK_READING)]
    progress: list[int] = []

    async def other() -> None:
        while True:
            progress.append(sum(len(writer.sent) for writer in writers))
            await trio.lowlevel.checkpoint()
            if progress[-1] == len(writers):
                return

    for writer in writers:
        writer.send_queue.put(b"x")
    async with trio.open_nursery() as inner:
        inner.start_soon(other)
        nursery.start_soon(flusher.run)
    assert len(set(progress)) > 2, "the other task ran during the pass"
