"""What waits to be appended: a queue for each client, and a fair share of the log for each of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

from .interface import OVERHEAD, Append

TURN = 2048
"""Cost after which one client has had its turn, where others wait."""


class _Line:
    """The messages of one client, oldest first, and what the client has had of the log."""

    __slots__ = ("appends", "client", "had", "size")

    def __init__(self, client: Hashable, had: int) -> None:
        self.client = client
        self.appends: deque[Append] = deque()
        self.size = 0
        self.had = had


class AppendQueue:
    """Messages that wait to be appended: each client's in the order in which they came, the clients by turns.

    Turns follow start-time fair queueing (Goyal, Vin and Cheng, 1996): the client that has had the least of the log,
    counted from when it began to wait, is next. A client that has little to say waits for one turn of each of the
    others at the most, however much they have queued.

    `messages` and `size` bound the queue, and each client's part of it: a client may queue as much as there is room
    left. So one that never stops fills half of the queue, and `n` of them leave room for one more.
    """

    def __init__(self, messages: int, size: int) -> None:
        self.size = 0
        """Bytes of channels and payloads."""
        self._limits = messages, size
        self._count = 0
        self._lines: dict[Hashable, _Line] = {}
        self._turns: list[tuple[int, int, _Line]] = []
        """A heap of the lines, by what they have had; the number in the middle keeps equals in turn."""
        self._turn = count()
        self._had = 0
        """What the line that was served last had had until then: newcomers begin with it."""
        self._earliest = inf
        """No message is due before this."""

    def __len__(self) -> int:
        """How many messages there are."""
        return self._count

    @property
    def clients(self) -> int:
        """How many clients have messages in it."""
        return len(self._lines)

    @property
    def deadline(self) -> float | None:
        """No message is due before this; None where there is none."""
        return self._earliest if self._count else None

    def allowance(self, budget: int) -> int:
        """What the messages of a session may cost that have no answer yet, before no more are read from it.

        Where `budget` is taken at a time, twice as much keeps the log busy, and what is more would only be older when
        its turn comes: the clients that wait share it.
        """
        return max(OVERHEAD, 2 * budget // max(1, len(self._lines)))

    def offer(self, append: Append) -> bool:
        """Queue a message; False where its client has as many in the queue as there is room for, or as many bytes."""
        messages, most = self._limits
        line, size = self._lines.get(append.client), append.size
        if line is None:
            if self._count >= messages or self.size >= most:
                return False
            line = self._lines[append.client] = _Line(append.client, self._had)
            heappush(self._turns, (line.had, next(self._turn), line))
        elif len(line.appends) >= messages - self._count or line.size >= most - self.size:
            return False
        line.appends.append(append)
        line.size += size
        self.size += size
        self._count += 1
        if append.deadline < self._earliest:
            self._earliest = append.deadline
        return True

    def take(self, messages: int, budget: int) -> list[Append]:
        """Take out what is next: up to `messages`, that cost up to `budget` together, or a single one of any cost.

        No two of them have the same key: where one would, its client has to wait for the next call.
        """
        taken: list[Append] = []
        keys: set[tuple[bytes, int]] = set()
        turns, full = self._turns, False
        waiting: list[_Line] = []
        while turns and not full:
            self._had, _, line = heappop(turns)
            if not line.appends:
                continue  # They have been withdrawn, or were due.
            appends, repeated = line.appends, False
            before, left = len(taken), budget
            end = budget - TURN if turns or waiting else -inf
            while appends and budget > end:
                append = appends[0]
                price = append.size + OVERHEAD
                full = len(taken) == messages or (price > budget and bool(taken))
                if full:
                    break
                if append.producer is not None:
                    key = append.producer, append.number
                    repeated = key in keys
                    if repeated:
                        break
                    keys.add(key)
                taken.append(appends.popleft())
                budget -= price
            line.had += left - budget
            size = left - budget - (len(taken) - before) * OVERHEAD
            line.size -= size
            self.size -= size
            if not appends:
                del self._lines[line.client]
            elif repeated:
                waiting.append(line)
            else:
                heappush(turns, (line.had, next(self._turn), line))
        for line in waiting:
            heappush(turns, (line.had, next(self._turn), line))
        self._count -= len(taken)
        return taken

    def expire(self, now: float = inf) -> list[Append]:
        """Take out all that are due at `now` or before. The deadlines of one client never go back."""
        expired: list[Append] = []
        if now >= self._earliest:
            for line in list(self._lines.values()):
                due = []
                while line.appends and line.appends[0].deadline <= now:
                    due.append(line.appends.popleft())
                self._removed(line, due)
                expired += due
            self._turns = [turn for turn in self._turns if turn[2].appends]
            heapify(self._turns)
            self._earliest = min((line.appends[0].deadline for line in self._lines.values()), default=inf)
        return expired

    def withdraw(self, unwanted: Callable[[Append], bool], *clients: Hashable) -> list[Append]:
        """Take out some of the messages of these clients, or of all where none is named, wherever they stand.

        A client has its messages withdrawn by showing another token, so it costs no more than what that client has.
        """
        withdrawn: list[Append] = []
        for line in [self._lines[c] for c in clients if c in self._lines] if clients else list(self._lines.values()):
            found = [append for append in line.appends if unwanted(append)]
            if found:
                gone = set(found)
                line.appends = deque(append for append in line.appends if append not in gone)
                self._removed(line, found)
                withdrawn += found
        return withdrawn

    def _removed(self, line: _Line, appends: list[Append]) -> None:
        """These have been taken out of a line, from anywhere in it. An empty one keeps its turn, which `take` skips."""
        size = sum([append.size for append in appends])
        line.size -= size
        self.size -= size
        self._count -= len(appends)
        if not line.appends:
            del self._lines[line.client]
        if not self._count:
            self._turns.clear()
