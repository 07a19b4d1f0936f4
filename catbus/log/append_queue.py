"""The queue of messages that wait to be appended: a queue for each client, and a fair share of the log for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

from .interface import APPEND_OVERHEAD, Append

QUANTUM = 2048
"""Cost after which the next client is served, if others wait."""


class ClientQueue:
    """The messages of one client, oldest first, and the cost of those that were taken."""

    __slots__ = ("appends", "client", "size", "used")

    def __init__(self, client: Hashable, used: int) -> None:
        self.client = client
        self.appends: deque[Append] = deque()
        self.size = 0
        self.used = used
        """Virtual time: as if the client had always used as much as the others that wait."""


class AppendQueue:
    """Messages that wait to be appended: each client's in the order of arrival, and the clients in fair shares.

    Clients are served by start-time fair queueing (Goyal, Vin and Cheng, 1996): the client that has used least of the
    log since it began to wait is next. A client with few messages waits for one quantum of each other client at most,
    however much these have queued.

    `messages` and `size` bound the queue. A client may queue as much as there is room left. So one busy client fills
    half of the queue, and `n` of them leave room for another one.
    """

    def __init__(self, messages: int, size: int) -> None:
        self.size = 0
        """Bytes of channels, payloads and senders."""
        self._limits = messages, size
        self._count = 0
        self._queues: dict[Hashable, ClientQueue] = {}
        self._schedule: list[tuple[int, int, ClientQueue]] = []
        """A heap of the clients' queues by what they have used. The number in the middle keeps the order of equals."""
        self._number = count()
        self._virtual_time = 0
        """What the client that was served last had used until then: new clients begin with it."""
        self._earliest = inf
        """No message is due before this."""

    def __len__(self) -> int:
        """The number of messages."""
        return self._count

    @property
    def clients(self) -> int:
        """The number of clients that have messages in the queue."""
        return len(self._queues)

    @property
    def deadline(self) -> float | None:
        """A time before which no message is due; None without messages."""
        return self._earliest if self._count else None

    def allowance(self, budget: int) -> int:
        """The cost of pending messages up to which a session is read.

        When `budget` is taken at a time, twice as much keeps the log busy, and more would only wait longer. The clients
        that wait share it.
        """
        return max(APPEND_OVERHEAD, 2 * budget // max(1, len(self._queues)))

    def offer(self, append: Append) -> bool:
        """Queue a message; return False if its client has as many messages or bytes in the queue as it may."""
        messages, most = self._limits
        queue, size = self._queues.get(append.client), append.size
        if queue is None:
            if self._count >= messages or self.size >= most:
                return False
            queue = self._queues[append.client] = ClientQueue(append.client, self._virtual_time)
            heappush(self._schedule, (queue.used, next(self._number), queue))
        elif len(queue.appends) >= messages - self._count or queue.size >= most - self.size:
            return False
        queue.appends.append(append)
        queue.size += size
        self.size += size
        self._count += 1
        if append.deadline < self._earliest:
            self._earliest = append.deadline
        return True

    def take(self, messages: int, budget: int) -> list[Append]:
        """Take out the next messages: up to `messages` with a total cost of up to `budget`, or one of any cost.

        No two of them have the same key: a client whose next message would repeat one waits for the next call.
        """
        taken: list[Append] = []
        keys: set[tuple[bytes, int]] = set()
        schedule, full = self._schedule, False
        waiting: list[ClientQueue] = []
        while schedule and not full:
            self._virtual_time, _, queue = heappop(schedule)
            if not queue.appends:
                continue  # Its messages were withdrawn, or have expired.
            appends, repeated = queue.appends, False
            before, left = len(taken), budget
            end = budget - QUANTUM if schedule or waiting else -inf
            while appends and budget > end:
                append = appends[0]
                cost = append.size + APPEND_OVERHEAD
                full = len(taken) == messages or (cost > budget and bool(taken))
                if full:
                    break
                if append.producer is not None:
                    key = append.producer, append.number
                    repeated = key in keys
                    if repeated:
                        break
                    keys.add(key)
                taken.append(appends.popleft())
                budget -= cost
            queue.used += left - budget
            size = left - budget - (len(taken) - before) * APPEND_OVERHEAD
            queue.size -= size
            self.size -= size
            if not appends:
                del self._queues[queue.client]
            elif repeated:
                waiting.append(queue)
            else:
                heappush(schedule, (queue.used, next(self._number), queue))
        for queue in waiting:
            heappush(schedule, (queue.used, next(self._number), queue))
        self._count -= len(taken)
        return taken

    def expire(self, now: float = inf) -> list[Append]:
        """Take out all messages that are due at `now` or before. The deadlines of one client never decrease."""
        expired: list[Append] = []
        if now >= self._earliest:
            for queue in list(self._queues.values()):
                due = []
                while queue.appends and queue.appends[0].deadline <= now:
                    due.append(queue.appends.popleft())
                self._count_removed(queue, due)
                expired += due
            self._schedule = [place for place in self._schedule if place[2].appends]
            heapify(self._schedule)
            self._earliest = min((queue.appends[0].deadline for queue in self._queues.values()), default=inf)
        return expired

    def withdraw(self, unwanted: Callable[[Append], bool], *clients: Hashable) -> list[Append]:
        """Take out the unwanted messages of these clients, or of all clients if none is named.

        A client can cause this by sending another token, so the cost is bounded by the messages of that client.
        """
        withdrawn: list[Append] = []
        named = [self._queues[client] for client in clients if client in self._queues]
        for queue in named if clients else list(self._queues.values()):
            found = [append for append in queue.appends if unwanted(append)]
            if found:
                gone = set(found)
                queue.appends = deque(append for append in queue.appends if append not in gone)
                self._count_removed(queue, found)
                withdrawn += found
        return withdrawn

    def _count_removed(self, queue: ClientQueue, appends: list[Append]) -> None:
        """Count messages that were removed from a queue. An empty queue stays in the schedule, and `take` skips it."""
        size = sum([append.size for append in appends])
        queue.size -= size
        self.size -= size
        self._count -= len(appends)
        if not queue.appends:
            del self._queues[queue.client]
        if not self._count:
            self._schedule.clear()
