"""Memory that is free goes back to the system: glibc keeps what lies between blocks that are still in use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import trio

INTERVAL = 4.0
"""Seconds from one look at the memory to the next."""
WORTH = 16 << 20
"""Bytes by which there has to be more of it than after the last time."""

_STATM = Path("/proc/self/statm")


class Watch:
    """Decides when giving memory back is worth its milliseconds: after a peak, not on the way to it."""

    def __init__(self, size: int) -> None:
        self._least = self._last = size

    def is_worth(self, size: int) -> bool:
        """Whether to give back what is free, where the process has so many bytes now."""
        growing, self._last = size > self._last, size
        self._least = min(self._least, size)
        return size - self._least >= WORTH and not growing

    def gave_back(self, size: int) -> None:
        """It has been done, and so many bytes are left."""
        self._least = self._last = size


def resident() -> int:
    """Bytes of memory that the process has. Raises `OSError` where the system does not tell as Linux does."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> Callable[[int], int] | None:
    """What gives free memory back (`man 3 malloc_trim`), or None with another C library than glibc."""
    try:
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None
    return trim


async def return_memory() -> None:
    """Give memory back after each peak, for ever; not where the system has no way to."""
    trim = give_back()
    try:
        watch = Watch(resident())
    except OSError:
        return
    while trim is not None:
        await trio.sleep(INTERVAL)
        if watch.is_worth(resident()):
            await trio.to_thread.run_sync(trim, 0)
            watch.gave_back(resident())
