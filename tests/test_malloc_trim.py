"""catbus.malloc_trim: free memory returns to the system after a peak."""

from __future__ import annotations

import subprocess
import sys

import pytest

from catbus import malloc_trim
from catbus.malloc_trim import MIN_GROWTH, PeakDetector

PEAK = """
import trio
from trio.testing import MockClock
from catbus import malloc_trim

async def main() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(malloc_trim.trim_after_peaks)
        await trio.sleep(malloc_trim.MEASURE_INTERVAL + 1)
        # Every hundredth stays, so that nothing but holes is free.
        held = [bytes(4096) for _ in range(25_000)]
        peak = malloc_trim.resident_bytes()
        held = held[::100]
        while malloc_trim.resident_bytes() > peak - (64 << 20):
            await trio.sleep(malloc_trim.MEASURE_INTERVAL)
        nursery.cancel_scope.cancel()

trio.run(main, clock=MockClock(rate=1000))
"""


def test_memory_is_trimmed_only_after_a_peak_has_passed() -> None:
    watch = PeakDetector(100 * MIN_GROWTH)
    looks = [101, 102, 102, 102]
    assert [watch.should_trim(look * MIN_GROWTH) for look in looks] == [False, False, True, True]
    watch.trimmed(101 * MIN_GROWTH)
    assert [watch.should_trim(look * MIN_GROWTH) for look in (101, 102 - 1 / 64, 101, 102, 102)] == [False] * 4 + [True]


def test_smaller_process_lowers_the_base_of_the_next_peak() -> None:
    watch = PeakDetector(100 * MIN_GROWTH)
    assert [watch.should_trim(look * MIN_GROWTH) for look in (50, 51, 51)] == [False, False, True]


@pytest.mark.skipif(
    malloc_trim.load_malloc_trim() is None, reason="only glibc keeps what is free between blocks, and gives it back"
)
def test_free_pages_return_to_the_system() -> None:
    subprocess.run([sys.executable, "-c", PEAK], check=True, timeout=60)
