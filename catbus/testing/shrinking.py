"""Shrinking: leave out of a failing example everything that it does not need in order to fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf
from typing import TypeVar

T = TypeVar("T")


def minimize(items: Sequence[T], fails: Callable[[list[T]], bool], until: float = inf) -> list[T]:
    """Return a sublist of `items` that still fails, and from which no single item can be removed.

    Stops at `until`, a time of `time.monotonic`, with the smallest list found so far.
    """
    left, size = list(items), len(items)
    while size:
        start = 0
        while start < len(left) and time.monotonic() < until:
            fewer = left[:start] + left[start + size :]
            if fails(fewer):
                left = fewer
            else:
                start += size
        size //= 2
    return left
