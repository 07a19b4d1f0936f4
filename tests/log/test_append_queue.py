"""The append queue, compared with a list for each client, and the share of each client."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from catbus.log import Append
from catbus.log.append_queue import QUANTUM, AppendQueue
from catbus.log.interface import APPEND_OVERHEAD

MESSAGES, SIZE = 30, 4000


def message(client: Hashable, size: int = 2, key: int | None = None, deadline: float = 0.0) -> Append:
    producer = None if key is None else b"p"
    append = Append("a", b"x" * (size - 1), lambda *_: None, producer=producer, number=key or 0, client=client)
    append.deadline = deadline
    return append


class QueueAgainstLists(RuleBasedStateMachine):
    """Compares the queue with lists: each message is taken, withdrawn or expired once, in the order of its client."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = AppendQueue(MESSAGES, SIZE)
        self.lists: dict[str, list[Append]] = {client: [] for client in "abc"}
        self.now = count()

    @property
    def waiting(self) -> list[Append]:
        return [append for appends in self.lists.values() for append in appends]

    @rule(client=st.sampled_from("abc"), size=st.integers(2, 900), key=st.none() | st.integers(1, 3))
    def offer(self, client: str, size: int, key: int | None) -> None:
        append = message(client, size, key, float(next(self.now)))
        own = self.lists[client]
        rooms = MESSAGES - len(self.waiting) - len(own), SIZE - sum(a.size for a in (*self.waiting, *own))
        assert self.queue.offer(append) == (min(rooms) > 0)
        if min(rooms) > 0:
            own.append(append)

    @rule(messages=st.integers(1, 20), budget=st.integers(0, 5000))
    def take(self, messages: int, budget: int) -> None:
        before = {client: len(own) for client, own in self.lists.items()}
        taken = self.queue.take(messages, budget)
        assert bool(taken) == any(before.values())
        assert len(taken) <= messages
        assert len(taken) <= 1 or sum(append.size + APPEND_OVERHEAD for append in taken) <= budget
        keys = [append.number for append in taken if append.producer is not None]
        assert len(keys) == len(set(keys))
        for append in taken:
            assert append is self.lists[str(append.client)].pop(0)

    @rule(back=st.integers(0, 40))
    def expire(self, back: int) -> None:
        now = next(self.now) - back
        due = [append for append in self.waiting if append.deadline <= now]
        assert sorted(self.queue.expire(now), key=id) == sorted(due, key=id)
        self.remove(due)

    @rule(client=st.sampled_from("abc"), number=st.integers(0, 3))
    def withdraw(self, client: str, number: int) -> None:
        unwanted = [append for append in self.lists[client] if append.number == number]
        assert self.queue.withdraw(lambda append: append.number == number, client) == unwanted
        self.remove(unwanted)

    @rule(number=st.integers(0, 3))
    def withdraw_of_all(self, number: int) -> None:
        unwanted = [append for append in self.waiting if append.number == number]
        assert sorted(self.queue.withdraw(lambda append: append.number == number), key=id) == sorted(unwanted, key=id)
        self.remove(unwanted)

    def remove(self, appends: list[Append]) -> None:
        for append in appends:
            self.lists[str(append.client)].remove(append)

    @invariant()
    def counts_are_right(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert self.queue.size == sum(append.size for append in self.waiting)
        assert self.queue.clients == sum(map(bool, self.lists.values()))
        earliest = min((append.deadline for append in self.waiting), default=None)
        assert (self.queue.deadline is None) == (earliest is None)
        assert earliest is None or (self.queue.deadline or 0.0) <= earliest


TestQueueAgainstLists = QueueAgainstLists.TestCase
TestQueueAgainstLists.settings = settings(stateful_step_count=40)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(2, 3000))
def test_message_waits_for_at_most_one_message_of_each_other_client(sizes: list[int], longest: int) -> None:
    queue = AppendQueue(1_000_000, 1 << 30)
    for number, size in enumerate(sizes):
        for _ in range(40):
            assert queue.offer(message(number, size + 1))
    queue.take(17, 1 << 20)
    newcomer = message("newcomer", longest)
    assert queue.offer(newcomer)
    before = 0
    while (taken := queue.take(1, 1 << 20)) != [newcomer]:
        before += taken[0].size + APPEND_OVERHEAD
    assert before <= len(sizes) * (QUANTUM + 301 + APPEND_OVERHEAD)


def test_busy_clients_get_equal_bytes_whatever_the_size_of_their_messages() -> None:
    queue = AppendQueue(1_000_000, 1 << 30)
    sizes = {"small": 2, "big": 1500, "bigger": 6000}
    taken_bytes = dict.fromkeys(sizes, 0)
    for client, size in sizes.items():
        for _ in range(4000):
            queue.offer(message(client, size))
    for _ in range(100):
        for append in queue.take(50, 20_000):
            taken_bytes[str(append.client)] += append.size + APPEND_OVERHEAD
    assert max(taken_bytes.values()) - min(taken_bytes.values()) <= 2 * (
        QUANTUM + max(sizes.values()) + APPEND_OVERHEAD
    )


def test_busy_clients_leave_room_for_another_client() -> None:
    for clients in range(1, 6):
        queue = AppendQueue(120, 1 << 20)
        while sum(queue.offer(message(client)) for client in range(clients)):
            pass
        assert 120 - len(queue) == 120 // (clients + 1)


def test_single_client_fills_whole_batches() -> None:
    queue = AppendQueue(10_000, 1 << 20)
    for number in range(3000):
        queue.offer(message("a", key=number + 1))
    assert [append.number for append in queue.take(1000, 1 << 20)] == list(range(1, 1001))


def test_withdrawal_visits_no_message_of_another_client() -> None:
    queue = AppendQueue(1000, 1 << 20)
    mine = message("mine")
    for client in range(100):
        queue.offer(message(client))
    queue.offer(mine)
    visited: list[Append] = []
    assert queue.withdraw(lambda append: visited.append(append) is None, "mine") == [mine]
    assert visited == [mine]


def test_client_that_publishes_and_withdraws_in_a_loop_leaves_nothing_behind() -> None:
    queue = AppendQueue(1000, 1 << 20)
    for _ in range(100):
        queue.offer(message("a"))
        queue.withdraw(lambda _: True, "a")
    assert (len(queue), queue.clients, len(queue._schedule)) == (0, 0, 0)
    other = message("b")
    queue.offer(other)
    assert queue.take(10, 1 << 20) == [other]
