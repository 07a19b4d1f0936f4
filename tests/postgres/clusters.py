"""Clusters of a test's own, for what one does to whole servers: setting them back, replacing them, failing over."""

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
    """A PostgreSQL in a directory of its own. The methods that wait block: call them from a thread."""

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
        """Serve what is in the directory, made now if there is nothing."""
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
            # It never becomes ready, by its own account.
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
        """Stop the server, in order."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(TEST_TIMEOUT)
            self._process = None
        self._serving.close()

    def kill(self) -> None:
        """End the server and all its processes, as when the machine loses its power but not what was written."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(TEST_TIMEOUT)
            self._process = None
        self._serving.close()

    def pause(self) -> None:
        """Let the server stand still: it answers nobody, and nobody is told."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        """Send the server and all its processes a signal."""
        assert self._process is not None
        pid = self._process.pid
        if self.running:
            # It starts no further ones meanwhile.
            os.kill(pid, signal.SIGSTOP)
        for child in _children(pid):
            with suppress(ProcessLookupError):
                os.kill(child, number)
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def save(self) -> None:
        """Stop, keep a copy of the data, and go on."""
        self.stop()
        self._copy(self.data, self.directory / "saved")
        self.start()

    def set_back(self) -> None:
        """Stop, and put the copy in the place of the data."""
        self.stop()
        self._copy(self.directory / "saved", self.data)

    def _copy(self, source: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-a", source, target], check=True)

    def make_standby(self, standby: Cluster, through: str | None = None) -> None:
        """Have another one follow this one, `through` another URL where there is one."""
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
        """Make a standby a primary."""
        execute(self.url, "SELECT pg_promote()")


def _children(parent: int) -> list[int]:
    children = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name, in parentheses, may have anything in it.
            if int(file.read_text().rpartition(")")[2].split()[1]) == parent:
                children.append(int(file.parent.name))
    return children


@contextmanager
def open_cluster(*, identity: bool = False) -> Iterator[Cluster]:
    """A cluster that does not run yet. Only with an `identity` it has a system identifier of its own."""
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
    """Clusters are copies of one, which are made sooner."""
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
    """A cluster that runs. Without a PostgreSQL to run: an error with CI=true, otherwise a skip."""
    with ExitStack() as closing:
        try:
            cluster = closing.enter_context(open_cluster())
            cluster.start()
        except ConfigError as error:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(str(error))
        yield cluster
