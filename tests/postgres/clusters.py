"""Clusters that one test owns, so that it can restore, replace or fail over a whole server."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]
import pytest
import trio

from catbus.errors import ConfigError
from catbus.postgres.embedded import server as embedded_server
from tests.log.harness import TEST_TIMEOUT
from tests.postgres.server import execute, make_directory, tethered

SETTINGS = {"fsync": "off", "max_connections": "30", "synchronous_commit": "on"}


class Cluster:
    """A PostgreSQL server with its own directory. Methods that wait are blocking: call them from a thread."""

    def __init__(self, directory: Path, settings: Mapping[str, str] = SETTINGS) -> None:
        self.directory = directory
        self.settings = settings
        self.url = ""
        self._serving = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        return self.directory / "cluster" / "data"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server, and create the cluster if the directory is empty."""
        try:
            self._start()
        except BaseException:
            self.kill()
            raise

    def _start(self) -> None:
        server = self._serving.enter_context(embedded_server.prepare_server(self.directory, self.settings))
        with server.log_file.open("ab") as log:
            process = subprocess.Popen(server.command, stdout=log, stderr=subprocess.STDOUT, **server.popen_options)
        self._serving.enter_context(tethered(process, self.directory))
        self._process, self.url = process, server.url
        if (self.data / "standby.signal").exists():
            # A standby never reports that it is ready.
            trio.run(self._wait_connected)
        else:
            server.wait_ready(process)

    async def _wait_connected(self) -> None:
        with trio.fail_after(TEST_TIMEOUT):
            while True:
                with suppress(OSError, asyncpg.PostgresError):
                    await trio.to_thread.run_sync(execute, self.url, "SELECT 1")
                    return
                await trio.sleep(0.02)

    def stop(self) -> None:
        """Stop the server by a regular shutdown."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(TEST_TIMEOUT)
            self._process = None
        self._serving.close()

    def kill(self) -> None:
        """Kill the server and all its processes, as in a power failure that preserves written data."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(TEST_TIMEOUT)
            self._process = None
        self._serving.close()

    def pause(self) -> None:
        """Pause the server with SIGSTOP: it does not reply, and its connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        """Send a signal to the server and all its processes."""
        assert self._process is not None
        pid = self._process.pid
        if self.running:
            # A stopped server starts no further processes meanwhile.
            os.kill(pid, signal.SIGSTOP)
        for child in _children(pid):
            with suppress(ProcessLookupError):
                os.kill(child, number)
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def save(self) -> None:
        """Stop the server, copy its data, and start it again."""
        self.stop()
        self._copy(self.data, self.directory / "saved")
        self.start()

    def set_back(self) -> None:
        """Stop the server, and restore the saved copy of its data."""
        self.stop()
        self._copy(self.directory / "saved", self.data)

    def _copy(self, source: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-a", source, target], check=True)

    def make_standby(self, standby: Cluster, through: str | None = None) -> None:
        """Make another cluster a standby of this one, which connects `through` that URL if it is given."""
        with embedded_server.prepare_server(standby.directory, standby.settings) as server:
            program, options = server.binaries.folder / "pg_basebackup", server.popen_options
        if not program.exists():
            pytest.skip("this PostgreSQL comes without pg_basebackup")
        shutil.rmtree(standby.data)
        shutil.copy(self.data.parent / "password", standby.data.parent / "password")
        command = [
            program,
            "--dbname",
            through or self.url,
            "--pgdata",
            standby.data,
            "--write-recovery-conf",
            "--checkpoint=fast",
        ]
        subprocess.run(command, check=True, **options)
        standby.start()

    def promote(self) -> None:
        """Promote this standby to a primary."""
        execute(self.url, "SELECT pg_promote()")


def _children(parent: int) -> list[int]:
    children = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The process name, in parentheses, may contain any character.
            if int(file.read_text().rpartition(")")[2].split()[1]) == parent:
                children.append(int(file.parent.name))
    return children


@contextmanager
def open_cluster(*, identity: bool = False) -> Iterator[Cluster]:
    """A cluster that is not started yet. It has its own system identifier only with `identity`."""
    directory = make_directory()
    cluster = Cluster(directory)
    try:
        if not identity:
            _copy_template(directory)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _copy_template(directory: Path) -> None:
    """Copy a prepared cluster, which is faster than initdb."""
    template = _template()
    subprocess.run(["cp", "-a", template / "cluster", directory], check=True)
    if (template / "binaries").exists():
        (directory / "binaries").symlink_to(template / "binaries")


@cache
def _template() -> Path:
    directory = make_directory()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    with embedded_server.prepare_server(directory, SETTINGS):
        return directory


@contextmanager
def open_served_cluster() -> Iterator[Cluster]:
    """A running cluster. Without a PostgreSQL to run: an error with CI=true, otherwise a skip."""
    with ExitStack() as closing:
        try:
            cluster = closing.enter_context(open_cluster())
            cluster.start()
        except ConfigError as error:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(str(error))
        yield cluster
