"""Which partitions a replica serves next, and when. Pure: the times are arguments, in seconds by any one clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from .verdicts import backoff

Partition = tuple[str, int]
"""The name of a consumer, and the number of a partition."""

OPENING_FAILURES = 5
"""Failures of a consumer, one after the other, that open its circuit."""
LONGEST_CIRCUIT_PAUSE = 60.0
"""Seconds between two attempts of a consumer with an open circuit, at most."""


@dataclass(slots=True)
class _Circuit:
    """The recent failures of one consumer. From `OPENING_FAILURES` on, one partition after the other is tried."""

    failures: int = 0
    blocked: float = -inf
    """No delivery of the consumer begins before this time."""

    @property
    def is_open(self) -> bool:
        return self.failures >= OPENING_FAILURES


class DeliverySchedule:
    """Chooses the partitions to be served. At most `slots` deliveries run at the same time.

    A consumer begins a delivery only while fewer of its own run than there are free slots. So one whose receiver is
    slow uses at most half of them, and a consumer of which none runs gets the last one.

    After failures of a consumer its circuit opens: then only one of its partitions at a time makes an attempt, with
    pauses, until one succeeds. Circuits are those of this replica.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._ready: dict[Partition, float] = {}
        """The partitions with something to do, and from when on."""
        self._running: set[Partition] = set()
        self._per_consumer: Counter[str] = Counter()
        """The running deliveries of each consumer."""
        self._circuits: dict[str, _Circuit] = {}

    @property
    def running(self) -> int:
        """Deliveries that run now."""
        return len(self._running)

    @property
    def open_circuits(self) -> int:
        """Consumers whose circuits are open."""
        return sum(circuit.is_open for circuit in self._circuits.values())

    def waiting(self, now: float) -> int:
        """Partitions that could be served now if there were free slots."""
        return sum(self._can_begin(partition, now) for partition in self._ready)

    def observe(self, now: float, work: Mapping[Partition, float]) -> None:
        """The database has this work: partitions, and the seconds until each may be leased.

        It replaces what was known.
        """
        self._ready = {partition: now + wait for partition, wait in work.items()}
        consumers = {consumer for consumer, _ in work}
        for consumer in [*self._circuits]:
            # It was deleted or paused, or has nothing to deliver.
            if consumer not in consumers and self._circuits[consumer].blocked < now - LONGEST_CIRCUIT_PAUSE:
                del self._circuits[consumer]

    def begin(self, now: float) -> list[Partition]:
        """The partitions whose deliveries begin now, those that wait longest first. Call `finish` for each of them."""
        begun = []
        for partition, _ in sorted(self._ready.items(), key=lambda item: item[1]):
            consumer, _ = partition
            free = self._slots - len(self._running)
            if free == 0:
                break
            if self._can_begin(partition, now) and self._per_consumer[consumer] < free:
                begun.append(partition)
                self._running.add(partition)
                self._per_consumer[consumer] += 1
                del self._ready[partition]
        return begun

    def finish(self, partition: Partition) -> None:
        """A delivery has ended. Call one of the other methods before, to say how."""
        self._running.remove(partition)
        consumer, _ = partition
        self._per_consumer[consumer] -= 1
        if not self._per_consumer[consumer]:
            del self._per_consumer[consumer]

    def succeed(self, now: float, partition: Partition) -> None:
        """A batch was delivered. There may be another one."""
        self._circuits.pop(partition[0], None)
        self._ready[partition] = now

    def fail(self, now: float, partition: Partition, delay: float, fraction: float) -> None:
        """An attempt has failed, and the next one of this partition is in `delay` seconds. See `verdicts.backoff`."""
        self._ready[partition] = now + delay
        circuit = self._circuits.setdefault(partition[0], _Circuit())
        circuit.failures += 1
        if circuit.is_open:
            pause = min(backoff(circuit.failures - OPENING_FAILURES + 1, fraction), LONGEST_CIRCUIT_PAUSE)
            circuit.blocked = max(circuit.blocked, now + pause)

    def throttle(self, now: float, partition: Partition, delay: float) -> None:
        """The receiver asks to wait: no delivery of the consumer begins within `delay` seconds."""
        self._ready[partition] = now + delay
        circuit = self._circuits.setdefault(partition[0], _Circuit())
        circuit.blocked = max(circuit.blocked, now + delay)

    def next_time(self, now: float) -> float:
        """When `begin` may return something that it does not return now, without a call of another method."""
        times = (max(time, self._blocked(partition[0])) for partition, time in self._ready.items())
        return min((time for time in times if time > now), default=inf)

    def _can_begin(self, partition: Partition, now: float) -> bool:
        consumer, _ = partition
        circuit = self._circuits.get(consumer)
        return (
            partition not in self._running
            and self._ready[partition] <= now
            and (circuit is None or (circuit.blocked <= now and not (circuit.is_open and self._per_consumer[consumer])))
        )

    def _blocked(self, consumer: str) -> float:
        circuit = self._circuits.get(consumer)
        return -inf if circuit is None else circuit.blocked
