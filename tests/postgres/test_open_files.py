"""The limit of open files: a broker under more connections than it may have files."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.endpoints.open_files import RESERVED_FILES
from tests.postgres.server import execute, to_database

PATIENCE = 60
SECRET = "q7Lw2pT5rYb8nHd1mKc4sJf6g0aEuXzV"
FILES = 64
ROOT = Path(__file__).parents[2]


class Broker:
    """A broker process with a limit of open files, and its log."""

    def __init__(self, directory: Path, database_url: str, files: int | None) -> None:
        config = directory / "catbus.toml"
        config.write_text('[websocket]\nbind = "127.0.0.1:0"\n[webtransport]\nbind = "127.0.0.1:0"\n')
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CATBUS_")}
        settings = {"CATBUS_SECRET": SECRET, "CATBUS_STATE": str(directory), "DATABASE_URL": database_url}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "catbus", "run", "--config", str(config)],
            env={**inherited, **settings, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            preexec_fn=files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))),
        )
        self.events: list[dict[str, Any]] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        url: str = self.wait_for("serving")["urls"][0]
        self.port = int(url.split(":")[2].split("/")[0])

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.events.append(json.loads(line))
                self._more.notify_all()

    def wait_for(self, name: str) -> dict[str, Any]:
        """The first log event with this name."""
        with self._more:
            assert self._more.wait_for(lambda: any(each["event"] == name for each in self.events), PATIENCE)
            return next(each for each in self.events if each["event"] == name)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=PATIENCE)
        self._reader.join()
        return status

    def end(self) -> None:
        self.process.kill()
        self._reader.join()
        self.process.communicate()


@pytest.fixture
def brokers(tmp_path: Path, database_url: str) -> Iterator[Any]:
    started: list[Broker] = []

    def start(files: int | None = None) -> Broker:
        started.append(Broker(tmp_path, database_url, files))
        return started[-1]

    yield start
    for broker in started:
        broker.end()


def ask(connection: socket.socket, request: str, body: str = "") -> tuple[int, str]:
    """The status and body of a reply on a connection that stays open."""
    head = f"{request} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n"
    token = sign(SECRET, client_id="alice", grants=Grants.ALL)
    connection.sendall(f"{head}Authorization: Bearer {token}\r\n\r\n{body}".encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(1 << 16) or pytest.fail(f"the connection was closed: {answer!r}")
    head, _, begun = answer.decode().partition("\r\n\r\n")
    length = int(head.lower().partition("content-length: ")[2].split()[0])
    while len(begun) < length:
        begun += connection.recv(1 << 16).decode()
    return int(head.split()[1]), begun


def publish(connection: socket.socket) -> int:
    return ask(connection, "POST /publish", '{"channel":"a","payload":1}')[0]


def turned_away(connection: socket.socket) -> float:
    """The number of connections that were rejected or evicted."""
    _, text = ask(connection, "GET /metrics")
    names = "catbus_connections_rejected_total", "catbus_connections_evicted_total"
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(names))


def test_connections_leave_files_for_the_database(brokers: Any, database_url: str) -> None:
    broker = brokers(FILES)
    with broker.connect() as honest:
        while ask(honest, "GET /ready") != (200, "ready\n"):
            pass
        assert publish(honest) == 200
        with ExitStack() as crowd:

            def connect() -> socket.socket:
                return crowd.enter_context(broker.connect())

            members = 1
            while (status := publish(connect())) == 200:
                members += 1
            assert (members, status) == (FILES - RESERVED_FILES, 503)
            # Unauthenticated connections are evicted after a moment.
            for _ in range(4 * FILES):
                connect()
            while turned_away(honest) < 3 * FILES:
                pass
            assert len([*Path(f"/proc/{broker.process.pid}/fd").iterdir()]) < FILES
            # The database ends the broker's connections, and the broker reconnects although all places are taken.
            name = urlsplit(database_url).path[1:]
            execute(
                to_database(database_url, "postgres"),
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
            )
            while publish(honest) != 200:
                pass
            assert ask(honest, "GET /health")[0] == 200
        while True:
            with broker.connect() as late:
                late.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
                if b" 200 " in late.recv(1 << 16):
                    break
    assert broker.stop() == 0
    told = broker.wait_for(
        "fewer connections than configured: raise the limit of open files, or lower limits.connections"
    )
    assert (told["files"], told["wanted"]) == (FILES, 10_000)
    assert len(broker.events) < 50
    assert not any("exception" in event for event in broker.events)


def test_connection_without_a_free_file_waits_and_is_logged_once(brokers: Any) -> None:
    broker = brokers()
    pid = broker.process.pid
    with broker.connect() as honest:
        while ask(honest, "GET /ready") != (200, "ready\n"):
            pass
        most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        assert most[0] == most[1], "it takes what it may have"
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, most[1]))
        with broker.connect() as late:
            told = broker.wait_for("cannot accept a connection")
            assert (told["level"], told["reason"]) == ("warning", "Too many open files")
            failures = 0.0
            while failures < 3:
                assert ask(honest, "GET /health")[0] == 200, "the others are served"
                text = ask(honest, "GET /metrics")[1]
                failures = float(text.partition('catbus_accepts_delayed_total{transport="websocket"} ')[2].split()[0])
            resource.prlimit(pid, resource.RLIMIT_NOFILE, most)
            assert ask(late, "GET /health")[0] == 200
    assert broker.stop() == 0
    assert [event["event"] for event in broker.events].count(told["event"]) == 1
    assert not any("exception" in event for event in broker.events)
