"""Shared parts of the benchmarks: servers in processes of their own, and cheap WebSocket clients."""

from __future__ import annotations

import base64
import json
import os
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.postgres.embedded import server as embedded_server

ROOT = Path(__file__).parent.parent
SECRET = "a secret that only benchmarks have"
STARTING_TIME = 30.0
DRAIN = "\n[drain]\ndelay = 0\nwindow = 0\n"

TEXT, BINARY, PONG = 0x1, 0x2, 0xA


# Processes


def prepare() -> None:
    """Allow this process and its children to open many files, and make SIGTERM end it with its children."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def worker_pids(pid: int) -> list[int]:
    """Return the children of a process that run the same program: the workers of a broker, without its database."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    program = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [child for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == program]


def cpu_time(pid: int) -> float:
    """Return the CPU seconds used by all threads of a process, from Linux's clock of that process."""
    return time.clock_gettime_ns(~pid << 3 | 2) / 1e9


def describe_machine() -> str:
    """Return a line that describes the machine, for the top of each report."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores for everything ({model.partition(': ')[2] or 'unknown'}), "
        f"Python {sys.version.split()[0]}, load before {load:.1f}, loopback"
    )


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and its ports on 127.0.0.1. `ca` is the certificate of its WebTransport endpoint."""

    pid: int
    port: int
    quic_port: int = 0
    ca: str = ""


@contextmanager
def catbus_run(
    database: str, *, webtransport: bool = False, settings: str = "", drain: str = DRAIN, workers: int = 1
) -> Iterator[Server]:
    """Run `catbus run`, wait until it is ready, and print its warnings to stderr after it has ended.

    `settings` are additional sections of TOML; `drain` replaces the section `[drain]`.
    """
    settings += f"\n[run]\nworkers = {workers}\n" if workers > 1 else ""
    with tempfile.TemporaryDirectory(prefix="catbus-bench-") as state, tempfile.TemporaryFile("w+") as output:
        Path(state).chmod(0o711)  # For root, another user serves the embedded database.
        config = Path(state, "catbus.toml")
        config.write_text(Path(__file__).with_name("catbus.toml").read_text() + drain + settings)
        command = [sys.executable, "-m", "catbus", "run", "--config", str(config)]
        environment = {"DATABASE_URL": database, "CATBUS_SECRET": SECRET, "CATBUS_STATE": state}
        environment["PYTHONPATH"] = str(ROOT)
        if webtransport:
            environment["CATBUS_BIND"] = "127.0.0.1:0"
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output)
        try:
            with _stopping(process):
                port = _wait_serving(process, output)
                _wait_workers(port, workers)
                yield _with_webtransport(process.pid, port) if webtransport else Server(process.pid, port)
        finally:
            for event in _events(output):
                if event["level"] not in ("debug", "info"):
                    print(event, file=sys.stderr)
    if process.returncode:
        sys.exit(f"catbus run ended with status {process.returncode}")


def _wait_serving(process: subprocess.Popen[bytes], output: TextIO) -> int:
    """Wait until the broker is ready, and return its port."""
    deadline = time.monotonic() + STARTING_TIME
    while process.poll() is None and time.monotonic() < deadline:
        for event in _events(output):
            if event["event"] == "serving":
                port = int(event["urls"][0].rpartition(":")[2].partition("/")[0])
                if is_ready(port):
                    return port
        time.sleep(0.05)
    if process.poll() is not None:
        sys.exit(f"catbus run ended with status {process.returncode}")
    sys.exit(f"catbus run is not ready after {STARTING_TIME:.0f} s")


def _wait_workers(port: int, workers: int) -> None:
    """Wait until each of several workers is ready."""
    ready = [f'catbus_state{{worker="{number}",state="ready"}} 1.0' for number in range(workers)]
    while workers > 1:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            lines = response.read().decode().splitlines()
        if all(line in lines for line in ready):
            return
        time.sleep(0.1)


def _events(output: TextIO) -> list[dict[str, Any]]:
    # pread leaves the position of the file alone, which the server shares.
    lines = os.pread(output.fileno(), 1 << 24, 0).decode().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_ready(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(b"GET /ready HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
        return peer.makefile("rb").readline().split()[1] == b"200"


def _with_webtransport(pid: int, port: int) -> Server:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/.well-known/catbus") as response:
        found = json.load(response)
    return Server(pid, port, int(found["webtransport"].rpartition(":")[2]), found["certificate"])


@contextmanager
def database(url: str | None, directory: str | None = None) -> Iterator[str]:
    """Yield the URL of the benchmark's database: `url`, or an embedded PostgreSQL with default settings in `directory`.

    Prints the time of an fsync there, without which figures of commits mean nothing.
    """
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="catbus-bench-", dir=directory) as place:
        print(
            "PostgreSQL and clients share these cores; "
            f"fdatasync in {Path(place).parent}: {_fsync_time(place):.2f} ms, fsync is on"
        )
        with embedded_server.prepare_server(Path(place)) as server, server.log_file.open("ab") as log:
            process = subprocess.Popen(server.command, stdout=log, stderr=subprocess.STDOUT, **server.popen_options)
            try:
                server.wait_ready(process)
                yield server.url
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(STARTING_TIME)


def _fsync_time(directory: str) -> float:
    """Return how many milliseconds it takes to append a page to a file and flush it to the disk."""
    times = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(50):
            began = time.perf_counter()
            os.write(file.fileno(), bytes(8192))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


@contextmanager
def nats_run(command: str, directory: Path) -> Iterator[Server]:
    """Run nats-server with WebSocket, ready to serve."""
    ports = [_free_port(), _free_port()]
    file = directory / "nats.conf"
    file.write_text(
        f'host: "127.0.0.1"\nport: {ports[0]}\nmax_pending: 512MB\n'
        f'websocket {{ host: "127.0.0.1", port: {ports[1]}, no_tls: true, compression: false }}\n'
    )
    process = subprocess.Popen([command, "-c", str(file)], stderr=subprocess.DEVNULL)
    with _stopping(process):
        deadline = time.monotonic() + STARTING_TIME
        while True:
            try:
                socket.create_connection(("127.0.0.1", ports[1])).close()
                break
            except ConnectionRefusedError:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{command} does not listen")
                time.sleep(0.05)
        yield Server(process.pid, ports[1])


@contextmanager
def _stopping(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STARTING_TIME)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# Clients


def connect(port: int, path: str = "/ws") -> socket.socket:
    """Connect a socket, and upgrade it to WebSocket."""
    peer = socket.create_connection(("127.0.0.1", port), timeout=STARTING_TIME)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    key = base64.b64encode(os.urandom(16)).decode()
    peer.sendall(
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    response = wait_for(peer, b"\r\n\r\n")
    if b" 101 " not in response.partition(b"\r\n")[0]:
        sys.exit(f"no WebSocket: {response!r}")
    return peer


def wait_for(peer: socket.socket, text: bytes) -> bytes:
    """Read from a blocking socket until `text` has arrived, and return everything that was read."""
    data = b""
    while text not in data:
        more = peer.recv(65_536)
        if not more:
            sys.exit(f"closed by the server instead of {text!r}: {data!r}")
        data += more
    return data


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """Encode a complete WebSocket message as a client does: masked."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 65_536:
        head = bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 0x80 | 127)) + size.to_bytes(8, "big")
    mask = os.urandom(4)
    stretched = (mask * (size // 4 + 1))[:size]
    masked = (int.from_bytes(payload, "big") ^ int.from_bytes(stretched, "big")).to_bytes(size, "big")
    return head + mask + masked


def auth_line(client_id: str = "bench") -> bytes:
    """Return an `auth` with the token of `bench_token`."""
    return json.dumps({"type": "auth", "token": bench_token(client_id), "protocol": 1}).encode() + b"\n"


def bench_token(client_id: str = "bench") -> str:
    """Return a token with all grants below `bench.`."""
    return sign(SECRET, client_id=client_id, grants=Grants(("bench.*",), ("bench.*",)))


PAYLOAD_SIZE = 128


def payload(mark: bytes, number: int, size: int = PAYLOAD_SIZE) -> bytes:
    """Return a JSON payload of `size` bytes with its number, the marker of its round, and its time of publishing."""
    text = b'{"n":%d,"sent":%d,%b,"pad":"' % (number, time.monotonic_ns(), mark)
    return text + b"x" * (size - len(text) - 2) + b'"}'


class Publisher:
    """A connection that publishes without blocking. A later `write` sends what the kernel did not accept."""

    def __init__(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self.peer = peer
        self._unsent = b""
        self._unread = b""

    @property
    def blocked(self) -> bool:
        """Whether bytes wait to be sent."""
        return bool(self._unsent)

    def write(self, data: bytes = b"") -> None:
        """Send `data` after the bytes that wait."""
        data = self._unsent + data
        try:
            self._unsent = data[self.peer.send(data) :]
        except BlockingIOError:
            self._unsent = data

    def read(self) -> bytes:
        """Return the complete lines that have arrived, including frame headers between them."""
        try:
            data = self.peer.recv(1 << 18)
        except BlockingIOError:
            return b""
        if not data:
            sys.exit(f"the server has closed a publisher's connection: {self._unread!r}")
        lines, end, self._unread = (self._unread + data).rpartition(b"\n")
        return lines + end

    def wait(self, until: float) -> bytes:
        """Send waiting bytes and return what arrives, until the time `until` of `time.monotonic` at the latest."""
        timeout = max(0.0, until - time.monotonic())
        readable, _, _ = select.select([self.peer], [self.peer] if self._unsent else [], [], timeout)
        if self._unsent:
            self.write()
        return self.read() if readable else b""


# Figures


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which that share of all values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
