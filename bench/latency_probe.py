"""Honest subscribers whose latency is measured while something else happens."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from harness import PONG, Publisher, Server, auth_line, cpu_time, frame, payload
from subscriber_process import Connector, Round, SubscriberProcess
from subscriber_transports import WebSocketConnector, WebTransportConnector

CHANNEL = b"bench.latency_probe"
SUBSCRIBERS = 5
"""Subscribers over each transport."""
RATE = 50
DELIVERY_TIMEOUT = 60.0


def publish_line(channel: bytes, text: bytes, more: bytes = b"") -> bytes:
    return b'{"type":"publish","channel":"%b","payload":%b%b}\n' % (channel, text, more)


def subscribe_step(channel: bytes) -> tuple[bytes, bytes]:
    return b'{"type":"subscribe","pattern":"%b"}\n' % channel, b'"subscribed"'


AUTH_STEP = auth_line(), b'"auth_ok"'


class Measurement(NamedTuple):
    """A phase: seconds, the broker's share of a core, latencies in seconds by transport, and memory in bytes."""

    seconds: float
    busy: float
    latencies: dict[str, list[float]]
    memory: int
    peak: int


class LatencyProbe:
    """Subscribers over each transport that the server has, and a publisher for them."""

    def __init__(self, server: Server) -> None:
        steps = [AUTH_STEP, subscribe_step(CHANNEL)]
        framed = [(frame(said), expected) for said, expected in steps]
        connectors: dict[str, Connector] = {
            "WebSocket": WebSocketConnector(server.port, "/ws", framed, frame(b"", PONG))
        }
        if server.ca:
            connectors = {"WebTransport": WebTransportConnector(server.quic_port, server.ca, steps), **connectors}
        self._pid = server.pid
        self._processes = {name: SubscriberProcess(connector, sampled=True) for name, connector in connectors.items()}
        for process in self._processes.values():
            process.send_request(SUBSCRIBERS)
            process.read_reply()
        self._publisher = Publisher(WebSocketConnector(server.port, "/ws", framed[:1], b"").connect_one())

    def measure(self, name: str, is_running: Callable[[], bool]) -> Measurement:
        """Publish and measure for as long as `is_running` returns True."""
        latencies: dict[str, list[float]] = {name: [] for name in self._processes}
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")  # Resets the peak.
        began, cpu = time.monotonic(), cpu_time(self._pid)
        while is_running():
            for transport, found in self._round(name).items():
                latencies[transport] += found
        memory = read_memory(self._pid)
        seconds = time.monotonic() - began
        busy = (cpu_time(self._pid) - cpu) / seconds
        return Measurement(seconds, busy, latencies, memory["VmRSS"], memory["VmHWM"])

    def close(self) -> None:
        for process in self._processes.values():
            process.end()

    def _round(self, name: str) -> dict[str, list[float]]:
        mark = b'"mark":"%b"' % secrets.token_hex(4).encode()
        for process in self._processes.values():
            for request in (None, Round(mark, RATE, DELIVERY_TIMEOUT)):
                process.send_request(request)
                process.read_reply()
        began = time.monotonic()
        for number in range(RATE):
            while time.monotonic() < (due := began + number / RATE):
                self._publisher.wait(due)
            self._publisher.write(frame(publish_line(CHANNEL, payload(mark, number), b',"ack":false')))
        latencies: dict[str, list[float]] = {}
        for transport, process in self._processes.items():
            sample = process.read_reply().sample
            for each in sample:
                if [number for number, _ in each] != list(range(RATE)):
                    sys.exit(f"{name}: a subscriber over {transport} got {[number for number, _ in each]} of {RATE}")
            latencies[transport] = [latency for each in sample for _, latency in each]
        return latencies


def read_memory(pid: int) -> dict[str, int]:
    """Return VmRSS and VmHWM, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {
        name: int(value.split()[0]) << 10
        for name, _, value in (line.partition(":") for line in lines)
        if name in ("VmRSS", "VmHWM")
    }


def for_seconds(seconds: float) -> Callable[[], bool]:
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() < deadline
