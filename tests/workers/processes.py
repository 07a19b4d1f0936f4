"""A broker with workers as an operator runs it, and what its log and its metrics say of each worker."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.brokers import request
from tests.postgres.processes import Replica, open_replicas, token

Samples = dict[str, dict[tuple[str, ...], float]]
"""By name of the metric, and by the values of its labels, of which the worker is the first."""


class WorkerBroker:
    """A running broker with workers."""

    def __init__(self, supervisor: Replica) -> None:
        self.supervisor = supervisor

    @property
    def url(self) -> str:
        return self.supervisor.url

    @property
    def address(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def pids(self) -> list[int]:
        """The processes that have served, by worker: the last one of each."""
        served = self._events("a worker serves")
        return [pid for _, pid in sorted({event["worker"]: event["pid"] for event in served}.items())]

    @property
    def starts(self) -> int:
        """How often a worker has begun to serve."""
        return len(self._events("a worker serves"))

    def worker_of(self, client_id: str) -> int:
        """The worker that has opened the last session of a client."""
        return int(next(e["worker"] for e in reversed(self._events("session opened")) if e["client_id"] == client_id))

    def opened(self, client_id: str) -> int:
        """How many sessions a client has opened."""
        return sum(event["client_id"] == client_id for event in self._events("session opened"))

    def _events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.supervisor.events if event["event"] == name]

    def kill(self, worker: int, number: signal.Signals) -> int:
        """Send a signal to a worker, and return its process id."""
        pid = self.pids[worker]
        os.kill(pid, number)
        return pid

    async def restarted(self, starts: int) -> None:
        """Wait until workers have begun to serve more often than that."""
        await until(lambda: self.starts > starts)

    async def metrics(self) -> Samples:
        """The metrics of all workers, from one of them."""
        text = (await request(self.address, "/metrics", "")).body.decode()
        samples: Samples = defaultdict(dict)
        # It is an error if the samples of a family are not together.
        names = [family.name for family in text_string_to_metric_families(text)]
        assert len(names) == len(set(names))
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                assert next(iter(sample.labels)) == "worker"
                samples[sample.name][tuple(sample.labels.values())] = sample.value
        return samples

    async def metrics_when(self, holds: Callable[[Samples], object]) -> Samples:
        """The metrics as soon as something holds. What other workers say may be 1 s old."""
        while not holds(samples := await self.metrics()):
            await trio.sleep(0.02)
        return samples

    async def status(self) -> list[dict[str, object]]:
        """What the workers say of themselves, from one of them."""
        found = json.loads((await request(self.address, "/status", token("reader"))).body)
        workers: list[dict[str, object]] = found["workers"]
        return workers

    async def status_when(self, worker: int, state: str) -> dict[str, object]:
        """What is said of a worker as soon as its state is that. It may be 1 s old, too."""
        while (found := (await self.status())[worker])["state"] != state:
            await trio.sleep(0.02)
        return found

    async def all_ready(self, count: int = 2) -> None:
        """Wait until each worker is ready for clients."""
        ready = [(str(number), "ready") for number in range(count)]
        await self.metrics_when(lambda samples: all(samples["catbus_state"].get(each) for each in ready))


@asynccontextmanager
async def open_workers(
    database_url: str, count: int = 2, state: Path | None = None, **variables: str
) -> AsyncIterator[WorkerBroker]:
    """Run a broker with `count` workers, and end it. With a directory for a certificate, it serves WebTransport."""
    async with open_replicas(database_url, 1, state, CATBUS_RUN_WORKERS=str(count), **variables) as [supervisor]:
        broker = WorkerBroker(supervisor)
        await broker.all_ready(count)
        yield broker
        supervisor.terminate()
        assert await supervisor.wait() == 0


async def until(condition: Callable[[], object]) -> None:
    """Wait until something is so that another process changes."""
    while not condition():
        await trio.sleep(0.02)


def threads(pid: int) -> int:
    """The number of threads of a process."""
    found = re.search(r"Threads:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
