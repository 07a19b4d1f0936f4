"""The result of a check: how often each promise was checked and broken, with examples, and measurements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_EXAMPLES = 5
"""Maximum number of violations of a promise that are printed in full."""

PROMISES = {
    "acknowledged": "An acknowledged message is in the log under the acknowledged seq",
    "refused": "A publish that was rejected for good is not in the log",
    "once": "A publish is in the log at most once, however often it was sent",
    "ordered": "The messages of one publisher, except `unknown` ones, are in the log in the order of sending",
    "agreed": "A seq of an epoch is the same message for all clients",
    "increasing": "A subscription gets its messages in the order of their seqs, none of them twice",
    "whole": "A subscription gets every message that was not announced as a gap",
    "kept": "A message announced as deleted is older than the retention",
    "complete": "In the end every subscription has caught up with the log",
    "prompt": "Without a fault, a message arrives within 5 s",
    "readable": "A client without read permission gets nothing after 1 s",
    "writable": "A client without write permission publishes nothing after 1 s",
    "connected": "A fault of the database alone disconnects no client",
    "noticed": "A dead database connection is detected within 5 s",
    "ephemeral": "An ephemeral message reaches a session at most once",
    "counted": "A conditional publish in the log follows on the message that it expects",
    "conflicts": "A conditional publish that expects another message gets `conflict`, with the seq of the present one",
    "mapped": "A live map shows a state of the log, never an older one of an epoch, and in the end the newest one",
    "stays": "A member that is connected, or comes back within the grace, is never announced as gone",
    "gone": "A member of a killed replica is announced as gone within 30 s, once",
    "same members": "In the end all replicas and watchers know exactly the members that there are",
    "processed": "A message of a consumer has one effect, in the order of its channel",
}


@dataclass
class Promise:
    name: str
    checked: int = 0
    """How often the promise was checked."""
    broken: int = 0
    examples: list[str] = field(default_factory=list)

    def check(self, kept: object, text: str, *details: object) -> None:
        """Count a check, and record a violation, described by `text` and `details`, unless `kept`."""
        self.checked += 1
        if not kept:
            self.broken += 1
            if len(self.examples) < MAX_EXAMPLES:
                self.examples.append(text.format(*details))


@dataclass
class Measurement:
    """Durations in seconds of one kind."""

    name: str
    values: list[float] = field(default_factory=list)

    def at(self, part: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


class Report:
    """The result of each promise, measurements, and the number of faults of each kind with the publishes in flight."""

    def __init__(self) -> None:
        self.promises = {name: Promise(name) for name in PROMISES}
        self.measurements: dict[str, Measurement] = {}
        self.faults: dict[str, list[int]] = {}
        self.counts: dict[str, int] = {}

    def measurement(self, name: str) -> Measurement:
        return self.measurements.setdefault(name, Measurement(name))

    @property
    def broken(self) -> list[str]:
        """The promises that were violated."""
        return [name for name, promise in self.promises.items() if promise.broken]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "| Promise | Checked | Broken |"
        yield "|---|---:|---:|"
        for name, promise in self.promises.items():
            yield f"| {PROMISES[name]} | {promise.checked:,} | {promise.broken:,} |"
        yield ""
        for name, count in self.counts.items():
            yield f"{name}: {count:,}"
        yield ""
        yield "| Fault | How often | Publishes in flight then |"
        yield "|---|---:|---:|"
        for kind, in_flight in sorted(self.faults.items()):
            yield f"| {kind} | {len(in_flight)} | {sum(in_flight)} |"
        yield ""
        yield "| Seconds | n | p50 | p99 | longest |"
        yield "|---|---:|---:|---:|---:|"
        for name, measurement in sorted(self.measurements.items()):
            if measurement.values:
                yield (
                    f"| {name} | {len(measurement.values):,} | {measurement.at(0.5):.3f} | {measurement.at(0.99):.3f} "
                    f"| {measurement.at(1):.3f} |"
                )
        for name in self.broken:
            yield ""
            yield f"BROKEN {self.promises[name].broken} times: {PROMISES[name]}"
            yield from self.promises[name].examples
