"""The catch-up of lagging subscriptions: the next page of the log, and how much of it each of them gets. Pure.

`Delivery` in `fan_out.py` reads the pages, and changes the states of the subscriptions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from itertools import accumulate
from operator import attrgetter

from ..log import Entry
from .encoded_messages import OVERHEAD, EncodedMessages
from .send_queue import SendQueue
from .subscription import Subscription, merge, without

_seq = attrgetter("seq")


class CatchUpSweeps:
    """The order in which pages are read for lagging subscriptions.

    Two sweeps alternate: one through the entries in memory, and one through those before. So a subscription with a
    small lag is served at once, however large the lag of others is. Each sweep reads on from its last page towards the
    head, and then from the lowest cursor again. To start from the lowest cursor each time would let new lagging
    subscriptions starve those that are nearly complete.
    """

    def __init__(self) -> None:
        self._in_memory = False
        """Whether the last page was of the sweep through the entries in memory."""
        self._swept = {True: 0, False: 0}
        """Up to where the sweep through the entries in memory has read, and the sweep before them."""

    def next_position(self, cursors: Sequence[int], memory_floor: int) -> int | None:
        """Return the seq after which to read next, for subscriptions with these cursors; None if there are none.

        `memory_floor`: the seq of the oldest entry in memory.
        """
        near = [cursor for cursor in cursors if cursor >= memory_floor - 1]
        far = [cursor for cursor in cursors if cursor < memory_floor - 1]
        in_memory = bool(near) and (not self._in_memory or not far)
        found = near if in_memory else far
        if not found:
            return None
        self._in_memory = in_memory
        further_on = [cursor for cursor in found if cursor >= self._swept[in_memory]]
        return min(further_on or found)

    def note_page(self, position: int, last: int, memory_floor: int) -> None:
        """Note that a page has been read, from `position` up to `last`."""
        self._swept[position >= memory_floor - 1] = last


class PatternMatches:
    """The entries of a page that match one pattern. Subscriptions that get the same part share its encoding."""

    def __init__(self, pattern: str, entries: Sequence[Entry], epoch: str = "") -> None:
        self.pattern = pattern
        self.entries = entries
        self.epoch = epoch
        self.origins = {entry.origin for entry in entries}
        self._ends = list(accumulate(entry.size + OVERHEAD + len(pattern) for entry in entries))
        self._encoded: dict[tuple[int, int], EncodedMessages] = {}

    def cut(self, cursor: int, send_queue: SendQueue, last: int) -> tuple[EncodedMessages | None, int]:
        """Return the entries after `cursor` that fit into the send queue, and the seq up to which they are complete.

        An empty send queue gets at least one message, whatever its size.
        """
        entries, ends = self.entries, self._ends
        start = bisect_right(entries, cursor, key=_seq)
        if start == len(entries):
            return None, last
        stop = bisect_right(ends, (ends[start - 1] if start else 0) + send_queue.room, lo=start)
        if stop == start and not send_queue:
            stop += 1
        complete = last if stop == len(entries) else entries[stop].seq - 1
        if stop == start:
            return None, complete
        encoded = self._encoded.get((start, stop))
        if encoded is None:
            encoded = self._encoded[start, stop] = EncodedMessages(self.pattern, entries[start:stop], self.epoch)
        return encoded, complete


def feed(
    subscription: Subscription, matches: list[PatternMatches], last: int, merged: dict[Hashable, PatternMatches]
) -> int:
    """Offer as much of a page as there is room for. Returns the seq up to which the subscription is complete then.

    `merged` keeps what event streams share while one page is served.
    """
    patterns = subscription.patterns
    matches = [found for found in matches if found.pattern in patterns]
    if not matches:
        return last
    found, start = matches[0], 0
    if subscription.merge_key is None:
        start = patterns[found.pattern]
    else:
        shared = merged.get(subscription.merge_key) if subscription.is_event_stream else None
        if shared is None:
            entries = merge(subscription, [(m.pattern, m.entries) for m in matches])
            shared = PatternMatches("", entries, found.epoch)
            if subscription.is_event_stream:
                merged[subscription.merge_key] = shared
        found = shared
    if subscription.producer in found.origins:
        found = PatternMatches(found.pattern, without(found.entries, subscription.producer), found.epoch)
    encoded, complete = found.cut(max(subscription.cursor, start), subscription.send_queue, last)
    if encoded is not None:
        subscription.send_queue.offer(encoded)
    return complete
