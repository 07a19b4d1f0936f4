"""Subscribers who behave well, whose latency is measured while something else goes on."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from crowd import Crowd, Door, Round
from doors import WebSocketDoor, WebTransportDoor
from harness import PONG, Publisher, Server, auth_line, cpu_time, frame, payload

CALM = b"bench.calm"
SUBSCRIBERS = 5
"""Who behave well, over each transport."""
RATE = 50
PATIENCE = 60.0


def publish_line(channel: bytes, text: bytes, more: bytes = b"") -> bytes:
    return b'{"type":"publish","channel":"%b","payload":%b%b}\n' % (channel, text, more)


def subscribe_step(channel: bytes) -> tuple[bytes, bytes]:
    return b'{"type":"subscribe","pattern":"%b"}\n' % channel, b'"subscribed"'


HELLO = auth_line(), b'"auth_ok"'


class Figures(NamedTuple):
    """Latencies in seconds by transport, memory in bytes, and of the broker's time the share that it was at work."""

    seconds: float
    busy: float
    latencies: dict[str, list[float]]
    memory: int
    peak: int


class Calm:
    """They, over each transport that the server has, and who publishes for them."""

    def __init__(self, server: Server) -> None:
        steps = [HELLO, subscribe_step(CALM)]
        framed = [(frame(said), expected) for said, expected in steps]
        doors: dict[str, Door] = {"WebSocket": WebSocketDoor(server.port, "/ws", framed, frame(b"", PONG))}
        if server.ca:
            doors = {"WebTransport": WebTransportDoor(server.quic_port, server.ca, steps), **doors}
        self._pid = server.pid
        self._crowds = {name: Crowd(door, sampled=True) for name, door in doors.items()}
        for crowd in self._crowds.values():
            crowd.ask(SUBSCRIBERS)
            crowd.answer()
        self._publisher = Publisher(WebSocketDoor(server.port, "/ws", framed[:1], b"").enter())

    def measure(self, name: str, going_on: Callable[[], bool]) -> Figures:
        """Publish for them as long as that, and say how long it took to get there."""
        latencies: dict[str, list[float]] = {name: [] for name in self._crowds}
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")  # The peak counts from here.
        began, cpu = time.monotonic(), cpu_time(self._pid)
        while going_on():
            for transport, found in self._round(name).items():
                latencies[transport] += found
        memory = read_memory(self._pid)
        seconds = time.monotonic() - began
        busy = (cpu_time(self._pid) - cpu) / seconds
        return Figures(seconds, busy, latencies, memory["VmRSS"], memory["VmHWM"])

    def close(self) -> None:
        for crowd in self._crowds.values():
            crowd.end()

    def _round(self, name: str) -> dict[str, list[float]]:
        mark = b'"mark":"%b"' % secrets.token_hex(4).encode()
        for crowd in self._crowds.values():
            for request in (None, Round(mark, RATE, PATIENCE)):
                crowd.ask(request)
                crowd.answer()
        began = time.monotonic()
        for number in range(RATE):
            while time.monotonic() < (due := began + number / RATE):
                self._publisher.wait(due)
            self._publisher.write(frame(publish_line(CALM, payload(mark, number), b',"ack":false')))
        latencies: dict[str, list[float]] = {}
        for transport, crowd in self._crowds.items():
            sample = crowd.answer().sample
            for each in sample:
                if [number for number, _ in each] != list(range(RATE)):
                    sys.exit(f"{name}: a subscriber over {transport} got {[number for number, _ in each]} of {RATE}")
            latencies[transport] = [latency for each in sample for _, latency in each]
        return latencies


def read_memory(pid: int) -> dict[str, int]:
    """VmRSS and VmHWM, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {
        name: int(value.split()[0]) << 10
        for name, _, value in (line.partition(":") for line in lines)
        if name in ("VmRSS", "VmHWM")
    }


def during(seconds: float) -> Callable[[], bool]:
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() < deadline
