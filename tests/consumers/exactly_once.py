"""A consumer under force: publishers, workers and replicas that die at any moment, and a check of what is left.

The log is the truth: a publisher whose connection dies in its COMMIT does not know whether it has published.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import psycopg

from tests.postgres.processes import CONFIG, ROOT, SECRET

from .worker import CONSUMER

PARTITIONS = 8
WORKERS = 4
PUBLISHERS = 8
PATIENCE = 120.0
"""Seconds within which everything is processed after the last fault."""
LOST = psycopg.OperationalError, psycopg.InterfaceError
"""The errors of a connection that was terminated."""
EFFECTS_TABLE = """
CREATE TABLE public.effects (
    id bigint GENERATED ALWAYS AS IDENTITY, seq bigint, channel text, payload text, worker integer
)
"""
CREATE = f"SELECT catbus.create_consumer('{CONSUMER}', 'orders.*', partitions => {PARTITIONS})"
LAG = f"""
SELECT (SELECT sum(lag) FROM catbus.consumer_positions() WHERE consumer = '{CONSUMER}') = 0
       AND NOT catbus.outbox_pending()
"""
# Both in the order in which a channel has them.
PUBLISHED = """
SELECT e.seq, e.channel, e.payload FROM catbus.entries AS e WHERE e.channel ~ '^orders[.]' ORDER BY e.channel, e.seq
"""
EFFECTS = "SELECT f.seq, f.channel, f.payload FROM public.effects AS f ORDER BY f.channel, f.id"
BACKENDS = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'victim%' AND pid <> pg_backend_pid()
"""


@dataclass
class Report:
    """What was published and processed, the faults, and everything that is wrong."""

    published: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


def run(url: str, seconds: float, seed: int, *, early: bool = False, crash: bool = False, replicas: int = 1) -> Report:
    """Publish and process for so long, with a fault every moment; then let the workers finish, and check.

    `crash`: kill server processes by SIGKILL, too, so that PostgreSQL restarts. Only for a server of one's own.
    """
    rng = random.Random(seed)
    report = Report()
    stopping = threading.Event()
    with psycopg.connect(url, autocommit=True) as sql:
        sql.execute(EFFECTS_TABLE)
        sql.execute(CREATE)
    with ExitStack() as stack:
        brokers = [stack.enter_context(_process(_broker(url))) for _ in range(replicas)]
        workers = [
            stack.enter_context(_process(_worker(url, seed * 100 + number, early=early))) for number in range(WORKERS)
        ]
        publishers = [
            threading.Thread(target=_publish, args=(url, number, seed, stopping)) for number in range(PUBLISHERS)
        ]
        for publisher in publishers:
            publisher.start()
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(rng.uniform(0.05, 0.4))
                report.faults[_fault(url, rng, workers, brokers, crash=crash)] += 1
        finally:
            stopping.set()
            for publisher in publishers:
                publisher.join()
        _wait(url, report)
        for worker in workers:
            worker.stop()
    with psycopg.connect(url, autocommit=True) as sql:
        published = sql.execute(PUBLISHED).fetchall()
        report.published = len(published)
        report.errors += compare(published, sql.execute(EFFECTS).fetchall())
    return report


def compare(published: list[tuple[int, str, str]], effects: list[tuple[int, str, str]]) -> Iterator[str]:
    """Yield what is wrong: every message has one effect, and those of a channel are in its order."""
    wanted, found = Counter(seq for seq, *_ in published), Counter(seq for seq, *_ in effects)
    if lost := sorted((wanted - found).elements()):
        yield f"{len(lost)} messages have no effect: {lost[:10]}"
    if repeated := sorted((found - wanted).elements()):
        yield f"{len(repeated)} effects are too many: {repeated[:10]}"
    if not lost and not repeated and published != effects:
        wrong = [pair for pair in zip(published, effects, strict=True) if pair[0] != pair[1]]
        yield f"wrong order or contents: {wrong[:3]}"


class _Process:
    """A process that is started again when it was killed."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self._process = start()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process = self._start()

    def stop(self) -> None:
        """End the process by SIGTERM. Raises `AssertionError` if it had ended by itself."""
        assert self._process.poll() is None, f"{self._process.args!r} ended with {self._process.returncode}"
        self._process.terminate()
        self._process.wait(PATIENCE)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def _process(start: Callable[[], subprocess.Popen[bytes]]) -> Iterator[_Process]:
    process = _Process(start)
    try:
        yield process
    finally:
        process.close()


def _broker(url: str) -> Callable[[], subprocess.Popen[bytes]]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("CATBUS_")}
    variables |= {"DATABASE_URL": url, "CATBUS_SECRET": SECRET, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "catbus", "run", "--config", str(CONFIG)]
    return lambda: subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _worker(url: str, seed: int, *, early: bool) -> Callable[[], subprocess.Popen[bytes]]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PGAPPNAME": "victim worker"}
    command = [sys.executable, "-m", "tests.consumers.worker", url, "--seed", str(seed), *["--early"] * early]
    return lambda: subprocess.Popen(command, env=variables)


def _publish(url: str, number: int, seed: int, stopping: threading.Event) -> None:
    """Publish in transactions of some messages, of which some roll back, until `stopping`."""
    rng = random.Random(seed * 1000 + number)
    count = 0
    while not stopping.is_set():
        with (
            suppress(*LOST),
            psycopg.connect(url, autocommit=True, application_name="victim publisher") as connection,
        ):
            while not stopping.wait(rng.uniform(0.001, 0.02)):
                with connection.transaction(force_rollback=rng.random() < 0.1):
                    for _ in range(rng.randint(1, 5)):
                        count += 1
                        kind = rng.choice(["orders", "orders", "others"])
                        channel = f"{kind}.{number}.{rng.randrange(5)}"
                        connection.execute("SELECT catbus.publish(%s, %s)", (channel, str(count)))
        stopping.wait(0.05)


def _fault(url: str, rng: random.Random, workers: list[_Process], brokers: list[_Process], *, crash: bool) -> str:
    """Inject one fault, and return its name."""
    kinds = {"worker killed": 5, "connection terminated": 5, "replica killed": 1, "server process killed": crash}
    (kind,) = rng.choices([*kinds], [*kinds.values()])
    if kind == "worker killed":
        rng.choice(workers).kill()
    elif kind == "replica killed":
        rng.choice(brokers).kill()
    else:
        with suppress(*LOST), psycopg.connect(url, autocommit=True) as sql:
            if pids := [pid for (pid,) in sql.execute(BACKENDS)]:
                if kind == "connection terminated":
                    sql.execute("SELECT pg_terminate_backend(%s)", (rng.choice(pids),))
                else:
                    with suppress(ProcessLookupError):
                        os.kill(rng.choice(pids), signal.SIGKILL)
    return kind


def _wait(url: str, report: Report) -> None:
    """Wait until everything that was published is processed."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(*LOST), psycopg.connect(url, autocommit=True) as sql:
            while time.monotonic() < end:
                if sql.execute(LAG).fetchone() == (True,):
                    return
                time.sleep(0.05)
        time.sleep(0.05)
    report.errors.append(f"not everything was processed within {PATIENCE:g} s")
