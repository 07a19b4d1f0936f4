"""Measure one attack: honest clients before it, during it, after it, and under honest load of its size."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from .attacks import Attack, Tally, Target, attackers
from .broker import ROOT, Broker, Use, brokers
from .honest import STEPS, Honest, Seen, Visit, fill, load

RETURN_TIME = 10.0
"""Seconds within which memory and open files must be as before."""
SCATTERED = 48 << 20
"""Bytes that the allocator may lose to fragmentation, and the log may keep of honest clients' messages."""
SPARE_FILES = 4
EXIT_TIME = 15.0
"""Seconds within which an attacked broker must stop: `drain.deadline` and half of it."""
MARGIN = 0.010
IDLE_TIME = 20.0
"""Seconds after that within which the broker must be idle."""
IDLE = 0.2
"""Share of a core. Honest clients alone use far less."""


@dataclass
class Span:
    """Observations of honest clients in one part of the time."""

    latencies: list[float]
    lost: int
    refused: list[str]
    visits: list[Visit]

    def at(self, part: float) -> float:
        """Return a percentile of the latencies in seconds; infinite if nothing arrived."""
        ordered = sorted(self.latencies)
        return ordered[min(int(len(ordered) * part), len(ordered) - 1)] if ordered else float("inf")

    def step(self, step: str) -> float:
        """Return the median of one step of the new clients."""
        times = [visit.seconds for visit in self.visits if visit.step == step and visit.seconds is not None]
        return statistics.median(times) if times else float("inf")

    def joined(self, other: Span) -> Span:
        """Return both spans together."""
        return Span(
            self.latencies + other.latencies,
            self.lost + other.lost,
            self.refused + other.refused,
            self.visits + other.visits,
        )

    @property
    def failures(self) -> list[str]:
        return [f"{visit.step}: {visit.fault}" for visit in self.visits if visit.seconds is None]


@dataclass
class Result:
    """The result of an attack."""

    attack: Attack
    calm: Span
    during: Span
    beside: Span
    before: Use
    after: Use
    peak: int
    busy: float
    """Share of a core during the attack."""
    calmed: bool
    """Whether the broker was idle again soon after the attack."""
    size: float
    units: float
    """Rates of the attack per second: bytes, and packets, requests or connections."""
    load: tuple[float, float, float]
    """The same rates of the honest load, and connections."""
    endings: int
    codes: dict[int, int]
    logged: int
    exit: float | None = None
    faults: list[str] = field(default_factory=list)

    def verdict(self) -> list[str]:
        """Return the failures of the broker; empty if it withstood the attack."""
        found = list(self.faults)
        bound = max(2 * self.beside.at(0.99), self.beside.at(0.99) + MARGIN)
        if self.during.at(0.99) > bound:
            found.append(f"p99 over {bound * 1e3:.0f} ms")
        for step in STEPS:
            usual = self.beside.step(step)
            if self.during.step(step) > max(2 * usual, usual + MARGIN):
                found.append(f"{step} {usual * 1e3:.0f} -> {self.during.step(step) * 1e3:.0f} ms")
        if self.during.lost:
            found.append(f"{self.during.lost} lost")
        refused = self.during.refused + self.during.failures
        if refused:
            found.append(f"{len(refused)} refused ({max(set(refused), key=refused.count)})")
        if self.after.memory > self.before.memory + SCATTERED + (self.attack.kept << 20):
            found.append("memory stays")
        if self.after.files > self.before.files + SPARE_FILES:
            found.append("files stay")
        if self.after.connections > self.before.connections + SPARE_FILES + self.attack.left:
            found.append("connections stay")
        if self.after.faults > self.before.faults:
            found.append(f"{self.after.faults - self.before.faults} faults of the broker's")
        if not self.calmed:
            found.append(f"busy for more than {RETURN_TIME + IDLE_TIME:.0f} s afterwards")
        if self.attack.drains and self.exit is None:
            found.append(f"does not stop within {EXIT_TIME:.0f} s")
        return found


def measure(attack: Attack, seconds: float, tree: Path = ROOT) -> Result:
    """Run one attack against its own broker."""
    with brokers(attack, tree) as (replicas, database):
        broker = replicas[-1]
        tally = Tally()
        target = Target(
            pid=broker.pid,
            port=broker.port,
            tally=tally,
            quic_port=broker.quic_port,
            ca=broker.ca,
            tls=attack.tls,
            elsewhere=replicas[0].port,
            database=database,
            seconds=seconds,
        )
        fill(target, attack.filled)
        honest = Honest(target, broker.urls[-1] if attack.quic else broker.urls[0])
        time.sleep(1)
        began = [time.monotonic()]
        time.sleep(seconds / 2)
        before = broker.use()
        broker.forget_peak()
        began.append(time.monotonic())
        tally = target.tally
        logged, cpu, done = broker.logged, broker.cpu, tally.numbers()
        exit_time = None
        with attackers(attack, target):
            time.sleep(seconds)
            lasted = time.monotonic() - began[-1]
            busy = (broker.cpu - cpu) / lasted
            size, units, opened = tally.rates(done, lasted)
            logged = broker.logged - logged
            peak = _peak(broker)
            began.append(time.monotonic())
            if attack.drains:
                seen = honest.stop()
                exit_time = broker.stop(EXIT_TIME)
        endings, codes = tally.endings, tally.codes()
        after, calmed, like = before, True, "" if attack.drains else attack.like
        loaded = (0.0, 0.0, 0.0)
        if attack.drains:
            began += began[-1:] * 2
        else:
            after = _wait_returned(broker, before, attack)
            calmed = _wait_idle(broker)
            like = like if calmed else ""
            began.append(time.monotonic())
            rate = {"packets": units, "connections": opened}.get(like, size)
            done = tally.numbers()
            with load(target, like, rate):
                time.sleep(seconds / 2)
                began.append(time.monotonic())
                loaded = tally.rates(done, began[-1] - began[-2])
            seen = honest.stop()
        calm, during = _between(seen, began[0], began[1]), _between(seen, began[1], began[2])
        beside = _between(seen, began[3], began[4])
        if not like:
            calm = beside = calm.joined(beside)
        return Result(
            attack,
            calm,
            during,
            beside,
            before,
            after,
            peak,
            busy,
            calmed,
            size,
            units,
            loaded,
            endings,
            codes,
            logged,
            exit_time,
            tally.faults() + ([f"{seen.disorder} out of order"] if seen.disorder else []),
        )


def _peak(broker: Broker) -> int:
    for line in Path(f"/proc/{broker.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def _wait_returned(broker: Broker, before: Use, attack: Attack) -> Use:
    """Wait until memory, files and connections are as before, at most as long as allowed."""
    deadline = time.monotonic() + RETURN_TIME
    while time.monotonic() < deadline:
        if (
            _is_idle(broker)
            and broker.files <= before.files + SPARE_FILES
            and broker.memory <= before.memory + SCATTERED + (attack.kept << 20)
            and (now := broker.use()).connections <= before.connections + SPARE_FILES + attack.left
        ):
            return now
    return broker.use()


def _wait_idle(broker: Broker) -> bool:
    """Wait until the attackers' bytes in kernel buffers are processed, because they would count as honest load."""
    deadline = time.monotonic() + IDLE_TIME
    while not _is_idle(broker):
        if time.monotonic() > deadline:
            return False
    return True


def _is_idle(broker: Broker) -> bool:
    """Whether the broker is nearly idle for half a second."""
    cpu = broker.cpu
    time.sleep(0.5)
    return broker.cpu - cpu < IDLE * 0.5


def _between(seen: Seen, start: float, end: float) -> Span:
    sent = [each for each in seen.sent if start <= each.at < end]
    return Span(
        [each.latency for each in sent if each.latency is not None],
        sum(each.latency is None for each in sent),
        [why for at, why in seen.refused if start <= at < end],
        [visit for visit in seen.visits if start <= visit.at < end],
    )


HEAD = (
    "| Attack | Token | Honest p50 / p99 calm, beside as much honest load, during (ms) | Delivered of published during "
    "| Newcomer: connect, resume, history, POST during (ms) | Refused, lost | Memory before, peak, after (MiB) "
    "| Files before, after | Connections before, after | CPU | Sent per s | Closed | Verdict |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(result: Result) -> str:
    """Return the result as a row of a Markdown table."""

    def latency(span: Span) -> str:
        return f"{span.at(0.5) * 1e3:.1f} / {span.at(0.99) * 1e3:.1f}"

    attack, before, after = result.attack, result.before, result.after
    beside = "-"
    if result.beside is not result.calm:
        beside = f"{latency(result.beside)} ({_amount(result.load[0])}B, {_amount(result.load[1])}/s)"
    codes = ", ".join(f"{code} x {count}" for code, count in result.codes.items())
    cells = [
        attack.name,
        "yes" if attack.token else "no",
        f"{latency(result.calm)}; {beside}; **{latency(result.during)}**",
        f"{len(result.during.latencies)} of {len(result.during.latencies) + result.during.lost}",
        ", ".join(f"{result.during.step(step) * 1e3:.0f}" for step in STEPS),
        f"{len(result.during.refused) + len(result.during.failures)}, {result.during.lost}",
        f"{before.memory >> 20}, {result.peak >> 20}, {after.memory >> 20}",
        f"{before.files}, {after.files}",
        f"{before.connections}, {after.connections}",
        f"{result.busy * 100:.0f} %, {_amount(1000 * result.busy / max(result.units, 0.001))}ms each",
        f"{_amount(result.size)}B, {_amount(result.units)}",
        f"{result.endings}" + (f" ({codes})" if codes else ""),
        "; ".join(result.verdict()) or "stands",
    ]
    if result.exit is not None:
        cells[-1] += f"; stops in {result.exit:.1f} s"
    if result.logged > 10_000:
        cells[-1] += f"; logs {_amount(result.logged)}B"
    return f"| {' | '.join(cells)} |"


def _amount(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g} {unit}".rstrip() + ("" if unit else " ")
        number /= 1000
    return f"{number:.3g} G"
