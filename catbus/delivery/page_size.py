"""How many messages a page has, of the history and over HTTP. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ..log import Entry
from .encoded_messages import OVERHEAD

MAX_HISTORY = 1000
"""Maximum number of messages in a page of the history."""

MAX_PAGE_BYTES = 1 << 20
"""Maximum size of a page of messages, unless it is a single message. Sizes are approximate."""


def newest_that_fit(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Return the newest entries that fit into a page, and at least one.

    Broker and client hold a page in memory as one object.
    """
    sizes = list(accumulate(entry.size + OVERHEAD for entry in reversed(entries)))
    return entries[-max(1, bisect_right(sizes, MAX_PAGE_BYTES)) :]
