"""What a service manager is told (sd_notify(3)): by a broker alone, and by a supervisor of workers."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio

from catbus.processes.service_manager import ServiceManager
from tests.cli.conftest import Start, next_event
from tests.workers.processes import open_workers

INTERVAL = 0.05
WATCHDOG = {"WATCHDOG_USEC": str(round(2 * INTERVAL * 1_000_000))}


class Manager:
    """The socket of a service manager."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(30)

    def next(self) -> str:
        """The next message that does not only say that the broker is alive."""
        while (found := self._socket.recv(1000).decode()) == "WATCHDOG=1":
            pass
        return found

    def wait_alive(self) -> None:
        """Wait until it has been told twice in a row."""
        while self._socket.recv(1000) != b"WATCHDOG=1" or self._socket.recv(1000) != b"WATCHDOG=1":
            pass

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


def test_broker_says_when_it_serves_reloads_and_stops_and_that_it_is_alive(start: Start, manager: Manager) -> None:
    command = ("run", "--database", "memory", "--ws-bind", "127.0.0.1:0")
    process = start(*command, variables={"NOTIFY_SOCKET": manager.path, **WATCHDOG})
    [url] = next_event(process, "serving")["urls"]
    assert manager.next() == "READY=1"
    assert httpx.get(url.replace("ws:", "http:").replace("/ws", "/ready")).status_code == 200
    manager.wait_alive()
    process.send_signal(signal.SIGHUP)
    reloading, at = manager.next().splitlines()
    assert (reloading, at.partition("=")[0]) == ("RELOADING=1", "MONOTONIC_USEC")
    assert manager.next() == "READY=1"
    process.send_signal(signal.SIGTERM)
    assert manager.next() == "STOPPING=1"
    assert process.wait() == 0


async def test_supervisor_speaks_for_its_workers(database_url: str, manager: Manager) -> None:
    variables = {"NOTIFY_SOCKET": manager.path, **WATCHDOG}
    async with open_workers(database_url, **variables) as broker:
        assert await trio.to_thread.run_sync(manager.next) == "READY=1"
        assert len(broker.pids) == 2
        await trio.to_thread.run_sync(manager.wait_alive)
    assert await trio.to_thread.run_sync(manager.next) == "STOPPING=1"


@pytest.mark.parametrize("address", ["", "/nowhere/at-all"])
def test_manager_that_does_not_exist_is_told_nothing(address: str) -> None:
    environ = {"NOTIFY_SOCKET": address, "PATH": "/bin"}
    ServiceManager(environ).tell("READY=1")
    assert environ == {"PATH": "/bin"}


def test_address_may_be_in_the_abstract_namespace() -> None:
    name = f"catbus-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        ServiceManager({"NOTIFY_SOCKET": f"@{name}"}).tell("READY=1", "STATUS=serving")
        assert receiver.recv(1000) == b"READY=1\nSTATUS=serving"


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_is_told_within_half_of_its_time(variables: dict[str, str], interval: float | None) -> None:
    assert ServiceManager({"NOTIFY_SOCKET": "/run/notify", **variables}).watchdog_interval == interval
