"""The type of an attack, the table of all attacks, and the processes that attackers run in."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign

SECRET = "a secret that the hostile clients do not have"
NICENESS = 10
"""The niceness of attackers. Real attackers have machines of their own, so here they use only the remaining CPU."""
PAUSE = 0.05
"""Seconds before an attacker reconnects after the broker has closed its connection."""
MAX_CODE = 5000
MAX_PROCESSES = 16

processes = multiprocessing.get_context("fork")

EVERYTHING = Grants.ALL

FEW_BYTES = "a request of few bytes is much work, and honest load of as many bytes is none"
"""The reason of an attack that has no honest load of its kind."""

_NUMBERS = 5
"""The counters: bytes, units, closed connections, opened connections, bytes of preparations."""


class Ended(Exception):
    """The broker has closed an attacker's connection."""


class Tally:
    """The counters of the attackers of one attack, separate for each process.

    There is no lock: attackers are killed, and a process that is killed while it holds a lock never releases it.
    """

    def __init__(self) -> None:
        self._numbers = processes.RawArray("d", _NUMBERS * MAX_PROCESSES)
        self._codes = processes.RawArray("i", MAX_CODE)
        self._faults: multiprocessing.SimpleQueue[str] = processes.SimpleQueue()
        self._place = 0

    def count_as(self, process: int) -> None:
        """Make this process count under this number."""
        self._place = _NUMBERS * process

    def sent(self, size: int, units: int = 1) -> None:
        """Count bytes, and packets, requests or connections."""
        self._numbers[self._place] += size
        self._numbers[self._place + 1] += units

    def opened(self) -> None:
        """Count a connection."""
        self.sent(0)
        self._numbers[self._place + 3] += 1

    def prepared(self, size: int) -> None:
        """Count bytes of a handshake, or of a request that an attacker waits for."""
        self._numbers[self._place + 4] += size

    def ended(self, code: int | None) -> None:
        """Count a connection that the broker has closed, with its close code."""
        self._numbers[self._place + 2] += 1
        if code is not None and code < MAX_CODE:
            self._codes[code] += 1

    def fault(self, text: str) -> None:
        """Note that an attack has got something that no client may get."""
        self._faults.put(text)

    @property
    def size(self) -> float:
        return float(sum(self._numbers[0::_NUMBERS]))

    @property
    def units(self) -> float:
        return float(sum(self._numbers[1::_NUMBERS]))

    def numbers(self) -> tuple[float, float, float]:
        """Return the bytes, units and connections so far."""
        connections, prepared = (float(sum(self._numbers[place::_NUMBERS])) for place in (3, 4))
        return self.size + prepared, self.units, connections

    def rates(self, before: tuple[float, float, float], seconds: float) -> tuple[float, float, float]:
        """Return the rates per second of these totals."""
        size, units, connections = ((now - then) / seconds for now, then in zip(self.numbers(), before, strict=True))
        return size, units, connections

    @property
    def endings(self) -> int:
        return int(sum(self._numbers[2::_NUMBERS]))

    def codes(self) -> dict[int, int]:
        """Return the number of closed connections by close code."""
        return {code: count for code, count in enumerate(self._codes[:]) if count}

    def faults(self) -> list[str]:
        found = []
        while not self._faults.empty():
            found.append(self._faults.get())
        return found


@dataclass(frozen=True)
class Target:
    """The attacked broker. `elsewhere` is the WebSocket port of another replica, or of the same one."""

    pid: int
    port: int
    tally: Tally
    quic_port: int = 0
    ca: str = ""
    tls: bool = False
    elsewhere: int = 0
    database: str = ""
    seconds: float = 5.0
    """The duration of the attack in seconds."""

    def against(self, tally: Tally) -> Target:
        """Return the same target with another tally."""
        return replace(self, tally=tally)

    def token(self, client_id: str = "mallory", grants: Grants = EVERYTHING) -> str:
        return sign(SECRET, client_id=client_id, grants=grants)


Run = Callable[[Target], None]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack. `run` is called in `processes` processes, and again whenever it returns or its connection is closed.

    - `token`: whether the attacker has a token
    - `like`: the unit of the honest load for comparison: `bytes`, `requests` (HTTP, as many bytes), `packets` (QUIC) or
      `connections`
    - `alone`: the reason why no honest load is comparable; such an attack is compared with the time before it
    - `filled`: messages in the log before the attack
    - `kept`: MiB that may stay in use, because the log keeps what was published
    - `drains`: whether the broker is stopped during the attack
    - `stands`: whether the tests require that the broker withstands it
    """

    name: str
    layer: str
    about: str
    run: Run
    token: bool = False
    processes: int = 1
    like: str = ""
    alone: str = ""
    log: str = "memory"
    replicas: int = 1
    settings: str = ""
    files: Mapping[str, Callable[[], str]] = field(default_factory=dict)
    open_files: int = 0
    kept: int = 0
    left: int = 0
    filled: int = 0
    drains: bool = False
    stands: bool = True

    @property
    def quic(self) -> bool:
        return self.layer == "quic"

    @property
    def tls(self) -> bool:
        return self.layer == "tls"


ATTACKS: dict[str, Attack] = {}


def attack(layer: str, name: str, about: str, **options: object) -> Callable[[Run], Run]:
    """Add a function to the table. A function may have several of these decorators."""

    def register(run: Run) -> Run:
        assert name not in ATTACKS, name
        ATTACKS[name] = made = Attack(name=name, layer=layer, about=about, run=run, **options)  # type: ignore[arg-type]
        assert bool(made.like) != bool(made.alone), name
        return run

    return register


def pace(per_second: float) -> Iterator[None]:
    """Return at this rate, and catch up on at most half a second."""
    due = time.monotonic()
    while True:
        yield
        due += 1 / per_second
        left = due - time.monotonic()
        if left > 0:
            time.sleep(left)
        elif left < -0.5:
            due = time.monotonic()


@contextmanager
def attackers(attack: Attack, target: Target, count: int = 0) -> Iterator[None]:
    """Run the attack in `count` processes, or in as many as it names."""
    running = [
        processes.Process(target=_again_and_again, args=(attack, target, number), daemon=True)
        for number in range(count or attack.processes)
    ]
    for each in running:
        each.start()
    try:
        yield
        for each in running:
            if not each.is_alive():
                raise RuntimeError(f"{attack.name}: an attacker has ended by itself, see above")
    finally:
        for each in running:
            each.kill()
            each.join()


def _again_and_again(attack: Attack, target: Target, number: int) -> None:
    target.tally.count_as(number + 1)
    os.nice(NICENESS)
    logging.disable()
    while True:
        try:
            attack.run(target)
        except (Ended, OSError):
            time.sleep(PAUSE)
