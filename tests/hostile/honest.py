"""Honest clients beside an attack: a stream of messages, new clients, and load of the same size as the attack."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import ssl
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.errors import Disconnected
from catbus.testing.blocking_connection import ThreadedConnection, dial

from .attacks import NICENESS, SECRET, Target, pace, processes
from .peers import QuicPeer, WebSocketPeer, frame, request

RATE = 50
"""Messages per second."""
VISITS = 4
"""New clients per second."""
PATIENCE = 15.0
"""Seconds after which a message counts as lost."""
CHANNEL = "honest.stream"
QUIET = "honest.quiet"
LOAD_MESSAGE = 1000
"""Bytes of a message of the honest load."""
MESSAGES_IN_FRAME = 16
LOAD_CLIENTS = 4
"""Clients of the honest load. Each has its own process and client_id."""
STEPS = "connect", "resume", "history", "post"


def token(client_id: str) -> str:
    return sign(SECRET, client_id=client_id, grants=Grants(("honest.*",), ("honest.*",)))


class Sent(NamedTuple):
    """A message of the stream: its time of publication, and the seconds until it arrived, or None."""

    at: float
    latency: float | None


class Visit(NamedTuple):
    """A step of a new client: its start, and its seconds, or None and the reason of the failure."""

    at: float
    step: str
    seconds: float | None
    fault: str = ""


class Seen(NamedTuple):
    """Everything that honest clients observed."""

    sent: list[Sent]
    refused: list[tuple[float, str]]
    """The times and codes of rejected publishes, and the reasons of lost connections."""
    visits: list[Visit]
    disorder: int
    """Messages that arrived out of order, or twice."""


class Honest:
    """The clients, in two processes, until `stop`."""

    def __init__(self, target: Target, url: str) -> None:
        self._over = processes.Event()
        self._pipes = []
        self._processes = []
        for run in (_stream, _visit):
            here, there = processes.Pipe()
            process = processes.Process(target=run, args=(target, url, there, self._over), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        for pipe in self._pipes:
            assert pipe.recv() == "ready"

    def stop(self) -> Seen:
        self._over.set()
        (sent, refused, disorder), visits = (pipe.recv() for pipe in self._pipes)
        for process in self._processes:
            process.join()
        return Seen(sent, refused, visits, disorder)


@contextlib.contextmanager
def _authority(target: Target) -> Iterator[str | None]:
    """A file with the broker's certificate, if it has one."""
    if not target.ca:
        yield None
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "ca.pem")
        path.write_text(target.ca)
        yield str(path)


def _enter(url: str, ca: str | None, client_id: str) -> ThreadedConnection:
    """Connect and authenticate a client."""
    connection = dial(url, ca=ca, timeout=PATIENCE)
    connection.send(request("auth", token=token(client_id), protocol=1))
    _expect(connection, "auth_ok")
    return connection


def _expect(connection: ThreadedConnection, kind: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE
    while (found := connection.receive(deadline - time.monotonic())) is not None:
        if found["type"] == kind:
            return found
        if found["type"].endswith("error"):
            raise Disconnected(str(found.get("code")))
    raise Disconnected(f"closed with {connection.code}")


def _stream(target: Target, url: str, pipe: Any, over: Any) -> None:
    """Publish, and measure the time until each message arrives on another connection."""
    with _authority(target) as ca:
        publisher, subscriber = _enter(url, ca, "publisher"), _enter(url, ca, "subscriber")
        subscriber.send(request("subscribe", pattern=CHANNEL))
        _expect(subscriber, "subscribed")
        times: list[float] = []
        latencies: dict[int, float] = {}
        refused: list[tuple[float, str]] = []
        disorder, last = 0, -1

        def take(connection: ThreadedConnection, until: float) -> None:
            nonlocal disorder, last
            while True:
                try:
                    found = connection.receive(until - time.monotonic())
                except TimeoutError:
                    return
                now = time.monotonic()
                if found is None:
                    refused.append((now, f"closed with {connection.code}"))
                    raise EOFError
                if found["type"] == "message":
                    number = found["payload"]["n"]
                    disorder += number <= last
                    last = max(last, number)
                    latencies.setdefault(number, now - times[number])
                elif found["type"].endswith("error"):
                    refused.append((now, found["code"]))
                if until <= now:
                    return

        pipe.send("ready")
        with contextlib.suppress(EOFError):
            due = time.monotonic()
            for number in itertools.count():
                if over.is_set():
                    break
                times.append(time.monotonic())
                publisher.send(request("publish", channel=CHANNEL, payload={"n": number}, id=number))
                due = max(due + 1 / RATE, times[-1])
                take(publisher, time.monotonic())
                take(subscriber, due)
            deadline = time.monotonic() + PATIENCE
            while len(latencies) < len(times) and time.monotonic() < deadline:
                take(subscriber, time.monotonic() + 0.1)
            take(publisher, time.monotonic())
        pipe.send(([Sent(at, latencies.get(number)) for number, at in enumerate(times)], refused, disorder))


def _visit(target: Target, url: str, pipe: Any, over: Any) -> None:
    """Connect, resume, request history, publish over HTTP, and disconnect, repeatedly."""
    visits: list[Visit] = []
    with _authority(target) as ca:
        # The messages to resume from, and to read.
        with contextlib.closing(_enter(url, ca, "visitor")) as first:
            for number in range(20):
                first.send(request("publish", channel=QUIET, payload=number, id=number))
            seq = 0
            for _ in range(20):
                seq = _expect(first, "published")["seq"]
        pipe.send("ready")
        for _ in pace(VISITS):
            if over.is_set():
                break
            began, step = time.monotonic(), STEPS[0]
            connection = None
            try:
                for step in STEPS:
                    began = time.monotonic()
                    if step == "connect":
                        connection = _enter(url, ca, "visitor")
                    elif step == "resume":
                        assert connection is not None
                        head = connection_head(connection)
                        connection.send(request("subscribe", pattern=QUIET, since=max(seq, head - 50)))
                        _expect(connection, "live")
                    elif step == "history":
                        assert connection is not None
                        connection.send(request("history", pattern=QUIET, limit=10, id=1))
                        _expect(connection, "history")
                    else:
                        _post(target)
                    visits.append(Visit(began, step, time.monotonic() - began))
            except (Disconnected, OSError, TimeoutError, http.client.HTTPException) as error:
                visits.append(Visit(began, step, None, str(error) or type(error).__name__))
            finally:
                if connection is not None:
                    connection.close()
        pipe.send(visits)


def connection_head(connection: ThreadedConnection) -> int:
    """Return the head of the log, from the reply to a `ping`."""
    connection.send(request("ping", seq=1))
    return int(_expect(connection, "head")["seq"])


def _http(target: Target) -> http.client.HTTPConnection:
    """Open a connection for requests, with TLS if the port uses it."""
    if not target.tls:
        return http.client.HTTPConnection("127.0.0.1", target.port, timeout=PATIENCE)
    context = ssl.create_default_context(cadata=target.ca)
    return http.client.HTTPSConnection("127.0.0.1", target.port, timeout=PATIENCE, context=context)


def _post(target: Target) -> None:
    """Publish a message over HTTP."""
    with contextlib.closing(_http(target)) as connection:
        body = json.dumps({"channel": "honest.posted", "payload": 1})
        connection.request("POST", "/publish", body, {"Authorization": f"Bearer {token('poster')}"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise Disconnected(f"HTTP {answer.status}")


# Load


def fill(target: Target, count: int) -> None:
    """Publish this many small messages."""
    if not count:
        return
    peer = WebSocketPeer(target, sign(SECRET, client_id="filler", grants=Grants.ALL))
    for start in range(0, count, 500):
        numbers = range(start, min(start + 500, count))
        lines = [
            request("publish", channel=f"noise.fill{n % 100}", payload=n, id=n, ack=n == numbers[-1]) for n in numbers
        ]
        peer.send(frame(b"".join(lines)))
        peer.wait_for(b'"id":%d' % numbers[-1])
    peer.close()


@contextlib.contextmanager
def load(target: Target, kind: str, rate: float) -> Iterator[None]:
    """Work of honest clients at the rate of an attack: `rate` bytes, packets or connections per second."""
    running: list[multiprocessing.process.BaseProcess] = []
    if kind and rate > 0:
        for number in range(LOAD_CLIENTS):
            process = processes.Process(target=_work, args=(target, kind, rate / LOAD_CLIENTS, number), daemon=True)
            process.start()
            running.append(process)
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def _work(target: Target, kind: str, rate: float, number: int) -> None:
    """Run one client of the load, with the niceness of an attacker."""
    target.tally.count_as(number + 1)
    os.nice(NICENESS)
    _LOADS[kind](target, rate, token(f"load {number}"))


def _load_bytes(target: Target, rate: float, token: str) -> None:
    """Publish over a WebSocket, several messages in a frame."""
    peer = WebSocketPeer(target, token)
    numbers = itertools.count()
    size = MESSAGES_IN_FRAME * LOAD_MESSAGE
    for _ in pace(rate / size):
        lines = [_message(next(numbers)) for _ in range(MESSAGES_IN_FRAME)]
        peer.send(frame(b"".join(lines)))
        peer.drain()


def _load_requests(target: Target, rate: float, token: str) -> None:
    """Publish over HTTP, several messages in a request."""
    connection = _http(target)
    message = {"channel": "honest.load", "payload": "x" * LOAD_MESSAGE}
    body = json.dumps([message] * MESSAGES_IN_FRAME)
    for _ in pace(rate / len(body)):
        connection.request("POST", "/publish", body, {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        answer.read()
        target.tally.sent(len(body))


def _load_packets(target: Target, rate: float, token: str) -> None:
    """Publish over WebTransport, a message in a packet."""
    peer = QuicPeer(target, token)
    for number, _ in enumerate(pace(rate)):
        if peer.connection.writable(peer.stream):
            peer.connection.send(peer.stream, _message(number))
        peer.turn(0)


def _load_connections(target: Target, rate: float, token: str) -> None:
    """Connect, authenticate, and leave."""
    for _ in pace(rate):
        WebSocketPeer(target, token).close()


def _message(number: int) -> bytes:
    return request("publish", channel="honest.load", payload="x" * (LOAD_MESSAGE - 100), id=number, ack=False)


_LOADS = {
    "bytes": _load_bytes,
    "requests": _load_requests,
    "packets": _load_packets,
    "connections": _load_connections,
}
