"""The attacked broker: `catbus run` as an operator runs it, of this tree or of another one, and its resources."""

from __future__ import annotations

import json
import os
import resource
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.postgres.server import serve

from .attacks import SECRET, Attack

ROOT = Path(__file__).parents[2]
STARTING_TIME = 60.0
OPEN_FILES = 20_000
ADDRESS_CONNECTIONS = 5
"""Connections of one address that a proxy names. Connections of this machine itself have no limit."""
_CONFIG = """
[websocket]
bind = ["127.0.0.1:0"]
tls = {tls}

[webtransport]
bind = [{quic}]

[drain]
delay = 0
window = 0

"""


class Use(NamedTuple):
    """Resources of a process: `memory` and `peak` in bytes; `connections` as in `/metrics`, half-open ones included."""

    memory: int
    peak: int
    files: int
    threads: int
    connections: int
    faults: int


class Broker:
    """A running replica."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, urls: list[str], *, tls: bool) -> None:
        self.pid = process.pid
        self.process = process
        self.urls = urls
        self.tls = tls
        self.port = int(urls[0].rpartition(":")[2].partition("/")[0])
        self.quic_port = int(urls[1].rpartition(":")[2]) if len(urls) > 1 else 0
        self.ca = ""
        if tls:
            self.ca = ssl.get_server_certificate(("127.0.0.1", self.port))
        elif self.quic_port:
            self.ca = json.loads(self.get("/.well-known/catbus"))["certificate"]
        self._log = log

    def get(self, path: str) -> bytes:
        """Return the body of a response."""
        scheme, context = ("https", ssl._create_unverified_context()) if self.tls else ("http", None)
        with urllib.request.urlopen(f"{scheme}://127.0.0.1:{self.port}{path}", timeout=10, context=context) as answer:
            body: bytes = answer.read()
            return body

    def use(self) -> Use:
        """Measure its resources; `peak` counts since `forget_peak`."""
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if ":" in line
        )
        connections, faults = -1, -1
        try:
            values = self.get("/metrics").decode()
        except (OSError, ValueError):
            pass
        else:
            connections = int(_sum(values, "catbus_connections{")) - 1  # but for this one
            faults = int(_sum(values, "catbus_internal_errors_total{"))
        return Use(
            int(status["VmRSS"].split()[0]) << 10,
            int(status["VmHWM"].split()[0]) << 10,
            self.files,
            int(status["Threads"]),
            connections,
            faults,
        )

    @property
    def files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    @property
    def memory(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    @property
    def cpu(self) -> float:
        """Return the seconds of CPU that it has used."""
        return time.clock_gettime_ns(~self.pid << 3 | 2) / 1e9

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    @property
    def logged(self) -> int:
        """Return the bytes that it has logged."""
        return self._log.stat().st_size

    def complaints(self) -> list[str]:
        """Return its log lines above `info`."""
        found = []
        for line in self._log.read_text().splitlines():
            event = json.loads(line)
            if event["level"] not in ("debug", "info"):
                found.append(f"{event['level']}: {event['event']}")
        return found

    def stop(self, patience: float) -> float | None:
        """Terminate it. Returns the seconds until it ended, or None if it did not within `patience`."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return None
        return time.monotonic() - began


def _sum(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


@contextmanager
def brokers(attack: Attack, tree: Path = ROOT, database: str = "") -> Iterator[tuple[list[Broker], str]]:
    """Start the replicas for an attack, and a database unless there is one. Yields both."""
    with ExitStack() as stack:
        if attack.log != "postgres":
            database = "memory"
        elif not database:
            database = stack.enter_context(contextmanager(serve)())
        yield [stack.enter_context(_run(attack, tree, database)) for _ in range(attack.replicas)], database


@contextmanager
def _run(attack: Attack, tree: Path, database: str) -> Iterator[Broker]:
    with tempfile.TemporaryDirectory(prefix="catbus-hostile-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        for file, make in attack.files.items():
            (directory / file).write_text(make())
        text = _CONFIG.format(tls=str(attack.tls).lower(), quic='"127.0.0.1:0"' if attack.quic else "")
        (directory / "catbus.toml").write_text(text + attack.settings)
        (directory / "log").touch()
        environment = {
            **os.environ,
            "DATABASE_URL": database,
            "CATBUS_SECRET": SECRET,
            "CATBUS_STATE": str(directory / "state"),
            "CATBUS_TRUSTED_PROXIES": "127.0.0.1",
            "CATBUS_LIMITS_ADDRESS_CONNECTIONS": str(ADDRESS_CONNECTIONS),
            "PYTHONPATH": str(tree),
        }
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "catbus", "run", "--config", str(directory / "catbus.toml")],
                env=environment,
                cwd=tree,
                stdout=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=_limit_files(attack.open_files or OPEN_FILES),
            )
        try:
            urls = _wait_serving(process, directory / "log")
            broker = Broker(process, directory / "log", urls, tls=attack.tls)
            _wait_ready(broker)
            yield broker
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _limit_files(count: int) -> Callable[[], None]:
    def limit() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))

    return limit


def _wait_serving(process: subprocess.Popen[bytes], log: Path) -> list[str]:
    deadline = time.monotonic() + STARTING_TIME
    while process.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines(keepends=True):
            event: dict[str, Any] = json.loads(line) if line.endswith("\n") else {}
            if event.get("event") == "serving":
                urls: list[str] = event["urls"]
                return urls
        time.sleep(0.05)
    raise RuntimeError(f"catbus run does not serve: {log.read_text()}")


def _wait_ready(broker: Broker) -> None:
    deadline = time.monotonic() + STARTING_TIME
    while time.monotonic() < deadline:
        with suppress(OSError):
            if broker.get("/ready") == b"ready\n":
                return
        time.sleep(0.05)
    raise RuntimeError("catbus run is not ready")
