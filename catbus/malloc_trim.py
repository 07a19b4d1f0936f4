"""Return of free memory to the system with `malloc_trim`, because glibc keeps free blocks between used ones."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import trio

MEASURE_INTERVAL = 4.0
"""Seconds between measurements of the memory."""
MIN_GROWTH = 16 << 20
"""Bytes of growth since the last `malloc_trim` that make another one worthwhile."""

_STATM = Path("/proc/self/statm")


class PeakDetector:
    """Decides when `malloc_trim` is worth its milliseconds: after a peak, not on the way to it."""

    def __init__(self, size: int) -> None:
        self._least = self._last = size

    def should_trim(self, size: int) -> bool:
        """Whether to trim now that the process has `size` bytes."""
        growing, self._last = size > self._last, size
        self._least = min(self._least, size)
        return size - self._least >= MIN_GROWTH and not growing

    def trimmed(self, size: int) -> None:
        """Note that the memory was trimmed, and `size` bytes are left."""
        self._least = self._last = size


def resident_bytes() -> int:
    """Return the resident bytes of the process. Raises `OSError` on a system without Linux's /proc."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load_malloc_trim() -> Callable[[int], int] | None:
    """Return the C function `malloc_trim` (`man 3 malloc_trim`), or None with another C library than glibc."""
    try:
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None
    return trim


async def trim_after_peaks() -> None:
    """Trim the memory after each peak, forever. Returns at once on a system that cannot."""
    trim = load_malloc_trim()
    try:
        watch = PeakDetector(resident_bytes())
    except OSError:
        return
    while trim is not None:
        await trio.sleep(MEASURE_INTERVAL)
        if watch.should_trim(resident_bytes()):
            await trio.to_thread.run_sync(trim, 0)
            watch.trimmed(resident_bytes())
