"""The embedded PostgreSQL server: a child process with one directory, reachable through a Unix socket only.

The directory contains

    lock        locked by the process that uses the directory
    cluster/    data and password; it gets this name when it is complete
    sockets/    the socket of the server
    binaries/   a copy of the installation, for a user that cannot reach the original
    postgres.log

PostgreSQL does not run as root. If this process is root, an unprivileged user owns the cluster and runs the server.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import trio

from ...errors import ConfigError
from ...observability.loggers import RateLimitedLog, get_logger
from .installations import Installation, find_installation

logger = get_logger("catbus.postgres")

NAME = "catbus"
"""The name of the database, and of the role that owns it."""
PORT = 5432
"""A part of the name of the socket: nothing listens on a TCP port."""
MAX_SOCKET_PATH = 100
"""Bytes that the path of a socket may have. Systems allow 103 to 107."""
SETTINGS = {"listen_addresses": "", "port": str(PORT), "unix_socket_permissions": "0700", "log_checkpoints": "off"}

FAST_SHUTDOWN_TIME = 10.0
"""Seconds for a fast shutdown, which writes everything to the disk."""
IMMEDIATE_SHUTDOWN_TIME = 5.0
"""Seconds for an immediate shutdown, after which the next start recovers."""

_STAGING = "cluster.new-"
_ACCOUNTS = "postgres", "nobody"
_POLL_INTERVAL = 0.02
_INITDB_TIMEOUT = 120.0
_OTHER_PROCESS_TIMEOUT = 60.0
"""Seconds to wait until another process that has the directory runs a server."""
_MAX_LOG_SIZE = 1_000_000
_PASSED_VARIABLES = "PATH", "LD_LIBRARY_PATH", "TZ"


class DirectoryInUse(ConfigError):
    """The directory belongs to another process."""


class EmbeddedServer:
    """A prepared cluster. `command` and `popen_options` start its server as a child process.

    The directory stays locked until `close`. `url` is for asyncpg.
    """

    def __init__(
        self,
        directory: Path,
        binaries: Installation,
        sockets: Path,
        options: dict[str, Any],
        settings: Mapping[str, str],
        closing: ExitStack,
    ) -> None:
        self.binaries = binaries
        self.data = directory / "cluster" / "data"
        self.log_file = directory / "postgres.log"
        self.popen_options = options
        self._closing = closing
        self.url = _url(directory, sockets)
        quoted = str(sockets).replace('"', '""')
        every = {**SETTINGS, "unix_socket_directories": f'"{quoted}"', **settings}
        self.command = [str(binaries.folder / "postgres"), "-D", str(self.data)]
        for name, value in every.items():
            self.command += ["-c", f"{name}={value}"]

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the directory. The child must have ended."""
        self._closing.close()

    def is_ready(self, pid: int) -> bool:
        """Whether the child with this process id accepts connections."""
        status = _status(self.data)
        return status is not None and status.pid == pid and status.ready

    def wait_ready(self, process: subprocess.Popen[bytes], timeout: float = 60.0) -> None:
        """Block until the child accepts connections. Raises `ConfigError` if it ends, and `TimeoutError`."""
        deadline = time.monotonic() + timeout
        while not self.is_ready(process.pid):
            if process.poll() is not None:
                raise self.failure()
            if time.monotonic() > deadline:
                raise TimeoutError(f"PostgreSQL was not ready within {timeout:g} s; see {self.log_file}")
            time.sleep(_POLL_INTERVAL)

    def failure(self) -> ConfigError:
        """The error of a child that did not start, with the reason from its log."""
        with suppress(OSError):
            if said := _error_line(self.log_file.read_bytes()):
                return ConfigError(f"the embedded database does not start: {said} (more in {self.log_file})")
        return ConfigError(f"the embedded database does not start; see {self.log_file}")


async def run_server(
    directory: Path,
    *,
    settings: Mapping[str, str] | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a server for `directory` until cancelled. Creates the cluster if there is none. `started` gets its URL.

    A server that dies is started again. On cancellation this returns when the server has ended, within about 15 s.
    Raises `ConfigError` as `prepare_server` does, and for a server that does not start.
    """
    # In a thread that is not abandoned: it must not stop between two files.
    with await trio.to_thread.run_sync(prepare_server, directory, settings) as server:
        started = False
        deaths = RateLimitedLog(logger.error)
        while True:
            with server.log_file.open("ab") as log:
                process = await trio.lowlevel.open_process(
                    server.command, stdout=log, stderr=subprocess.STDOUT, **server.popen_options
                )
            try:
                if await _wait_ready(server, process):
                    logger.info("started the embedded database", pid=process.pid, server=str(server.binaries))
                    if not started:
                        task_status.started(server.url)
                        started = True
                status = await process.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await _stop(process)
            if not started:
                raise server.failure()
            file = str(server.log_file)
            deaths.log(trio.current_time(), "the embedded database died, starting it again", status=status, log=file)
            await trio.sleep(1)


@asynccontextmanager
async def open_server(directory: Path, *, settings: Mapping[str, str] | None = None) -> AsyncIterator[str]:
    """The URL of the server for `directory`. If no other process runs one, this context does.

    Waits for a process that is starting one. Raises `ConfigError` as `run_server` does, and if that takes too long.
    """
    async with trio.open_nursery() as nursery:
        yield await _find_or_start(directory, settings, nursery)
        nursery.cancel_scope.cancel()


async def _find_or_start(directory: Path, settings: Mapping[str, str] | None, nursery: trio.Nursery) -> str:
    deadline = trio.current_time() + _OTHER_PROCESS_TIMEOUT
    while True:
        try:
            url: str = await nursery.start(partial(run_server, directory, settings=settings))
        except DirectoryInUse:
            found = running_url(directory)
            if found is not None:
                return found
            if trio.current_time() > deadline:
                raise
            await trio.sleep(_POLL_INTERVAL)
        else:
            return url


def running_url(directory: Path) -> str | None:
    """The URL of the server for `directory` while it accepts connections; None otherwise."""
    directory = directory.resolve()
    data = directory / "cluster" / "data"
    status = _status(data)
    if status is None or not status.ready or _postmaster(data) != status.pid:
        return None
    return _url(directory, status.sockets)


def exists_in(directory: Path) -> bool:
    """Whether `directory` is, was or is about to be the directory of an embedded server."""
    return (directory / "lock").is_file()


async def _wait_ready(server: EmbeddedServer, process: trio.Process) -> bool:
    """Wait until the child accepts connections. Returns False if it has ended instead."""
    # The server reports its state in a file.
    while process.poll() is None and not server.is_ready(process.pid):  # noqa: ASYNC110
        await trio.sleep(_POLL_INTERVAL)
    return process.poll() is None


async def _stop(process: trio.Process) -> None:
    for number, patience in (
        (signal.SIGINT, FAST_SHUTDOWN_TIME),
        (signal.SIGQUIT, IMMEDIATE_SHUTDOWN_TIME),
        (signal.SIGKILL, IMMEDIATE_SHUTDOWN_TIME),
    ):
        if process.poll() is None:
            process.send_signal(number)
            with trio.move_on_after(patience):
                await process.wait()


def prepare_server(directory: Path, settings: Mapping[str, str] | None = None) -> EmbeddedServer:
    """Lock `directory` for this process, and create the cluster in it if there is none.

    An earlier process may have stopped at any moment: incomplete steps are repeated, and a server that has outlived its
    parent is stopped. `settings` are those of PostgreSQL. Raises `ConfigError` if there is no usable PostgreSQL, the
    cluster has another major version, or the directory is in use or unusable.
    """
    directory = directory.resolve()
    settings = settings or {}
    with ExitStack() as closing:
        try:
            _make_directory(directory)
            closing.enter_context(_locked(directory))
            cluster = directory / "cluster"
            _stop_orphan(cluster / "data")
            options = _child_options(cluster)
            binaries = _binaries_for(cluster)
            if not binaries.can_be_run(options):
                binaries = binaries.copy(directory / "binaries")
            if not cluster.is_dir():
                _initialise(cluster, binaries, options, durable=settings.get("fsync") != "off")
            sockets = closing.enter_context(_socket_directory(directory, options))
            log = directory / "postgres.log"
            if log.exists() and log.stat().st_size > _MAX_LOG_SIZE:
                log.rename(log.with_suffix(".log.1"))
            log.touch(mode=0o600)
            return EmbeddedServer(directory, binaries, sockets, options, settings, closing.pop_all())
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"the embedded database cannot be kept in {directory}: {error}") from error


def _url(directory: Path, sockets: Path) -> str:
    password = (directory / "cluster" / "password").read_text()
    return f"postgres://{NAME}:{password}@/{NAME}?host={quote(str(sockets), safe='')}&port={PORT}"


def _make_directory(directory: Path) -> None:
    if os.geteuid():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        # The user that serves the cluster has to get through. What is in it has doors of its own.
        directory.chmod(directory.stat().st_mode & 0o7777 | 0o111)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with os.fdopen(os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUse(
                f"another catbus (process {file.read() or 'unknown'}) has its embedded database in {directory}: "
                "stop it, or give this one another state directory (CATBUS_STATE) or a database for both (DATABASE_URL)"
            ) from None
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def _child_options(cluster: Path) -> dict[str, Any]:
    """The options of a child process: without this process's terminal and secrets, and not as root."""
    environment = {name: os.environ[name] for name in _PASSED_VARIABLES if name in os.environ}
    options: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "cwd": "/",
        "env": {**environment, "LC_ALL": "C"},
        "umask": 0o077,
        "process_group": 0,
    }
    if os.geteuid() == 0:
        account = _account(cluster)
        options |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    return options


def _account(cluster: Path) -> pwd.struct_passwd:
    """The unprivileged user that owns the cluster, or will own it."""
    with suppress(FileNotFoundError, KeyError):
        if owner := cluster.stat().st_uid:
            return pwd.getpwuid(owner)
    for name in _ACCOUNTS:
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise ConfigError(
        "PostgreSQL does not run as root, and there is no user `postgres` or `nobody` to run it: "
        "run catbus as another user, or set DATABASE_URL to a database that is there already"
    )


def _change_owner(path: Path, options: dict[str, Any]) -> None:
    if "user" in options:
        os.chown(path, options["user"], options["group"])


def _binaries_for(cluster: Path) -> Installation:
    try:
        major = int((cluster / "data" / "PG_VERSION").read_text())
    except FileNotFoundError:
        return find_installation()
    try:
        return find_installation(major)
    except ConfigError as error:
        raise ConfigError(
            f"{cluster} was made by PostgreSQL {major}, and no other major version can read it. {error}. "
            "To begin with an empty log instead, move that directory away"
        ) from None


def _initialise(cluster: Path, binaries: Installation, options: dict[str, Any], *, durable: bool) -> None:
    """Create a cluster with the role and the database. It gets its name at the end."""
    logger.info("initialising the embedded database", directory=str(cluster.parent), server=str(binaries))
    # Under a new name each time: a child that an earlier process has left behind may still be writing.
    for abandoned in cluster.parent.glob(f"{_STAGING}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=cluster.parent))
    password = staging / "password"
    with os.fdopen(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(24))
        os.fsync(file.fileno())
    _change_owner(password, options)
    _change_owner(staging, options)
    data = staging / "data"
    initdb = [str(binaries.folder / "initdb"), f"--pgdata={data}", f"--username={NAME}", f"--pwfile={password}"]
    initdb += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-instructions"]
    _run_program(initdb if durable else [*initdb, "--no-sync"], options)
    # In this mode a server needs neither a socket nor a client. It opens the database `postgres`.
    single = [str(binaries.folder / "postgres"), "--single", "-c", "exit_on_error=on"]
    _run_program([*single, "-D", str(data), "postgres"], options, f"CREATE DATABASE {NAME};\n")
    staging.rename(cluster)
    _sync_directory(cluster.parent)


def _run_program(command: list[str], options: dict[str, Any], words: str = "") -> None:
    who = f" as user {pwd.getpwuid(options['user']).pw_name}" if "user" in options else ""
    failed = f"the embedded database cannot be made: {command[0]}{who}"
    try:
        done = subprocess.run(  # noqa: S603
            command,
            **{**options, "stdin": None},
            input=words.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_INITDB_TIMEOUT,
            check=False,
        )
    except PermissionError:
        raise ConfigError(f"{failed}: permission denied: that user has to be able to get there") from None
    if done.returncode:
        raise ConfigError(f"{failed}: {_error_line(done.stdout)}")


def _error_line(output: bytes) -> str:
    lines = output.decode(errors="replace").splitlines()
    telling = [line for line in lines if any(word in line for word in ("error:", "FATAL:", "ERROR:"))] or lines
    return telling[-1].strip() if telling else ""


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _socket_directory(directory: Path, options: dict[str, Any]) -> Iterator[Path]:
    """A directory for the socket: in `directory`, unless that path is too long for the address of a socket."""
    sockets = directory / "sockets"
    if len(os.fsencode(sockets / f".s.PGSQL.{PORT}")) <= MAX_SOCKET_PATH:
        sockets.mkdir(mode=0o700, exist_ok=True)
        _change_owner(sockets, options)
        yield sockets
        return
    with tempfile.TemporaryDirectory(prefix="catbus-", dir="/tmp", ignore_cleanup_errors=True) as short:
        _change_owner(Path(short), options)
        yield Path(short)


def _stop_orphan(data: Path) -> None:
    """Stop a server that has outlived its parent: only one server may use the data."""
    for number, patience in ((signal.SIGINT, FAST_SHUTDOWN_TIME), (signal.SIGQUIT, IMMEDIATE_SHUTDOWN_TIME)):
        if (pid := _postmaster(data)) is None:
            break
        logger.info("stopping the embedded database that an earlier catbus has left behind", pid=pid)
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience
        while _postmaster(data) is not None and time.monotonic() < deadline:
            time.sleep(_POLL_INTERVAL)
    if (pid := _postmaster(data)) is not None:
        raise ConfigError(f"an earlier catbus has left process {pid} behind, which has {data} open: kill it")
    _remove_stale_pid_file(data / "postmaster.pid")


@dataclass(frozen=True, slots=True)
class _Status:
    """The state that a server has written into `postmaster.pid`."""

    pid: int
    sockets: Path
    ready: bool


def _status(data: Path) -> _Status | None:
    """The last state of the server of `data`. The server may have died since."""
    with suppress(OSError, ValueError):
        lines = (data / "postmaster.pid").read_text().splitlines()
        if len(lines) >= 8:
            return _Status(int(lines[0]), Path(lines[4].strip()), lines[7].strip() == "ready")
    return None


def _postmaster(data: Path) -> int | None:
    """The process id of the server of `data`; None if there is none."""
    try:
        pid = int((data / "postmaster.pid").read_text().partition("\n")[0])
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if command[0].endswith(b"/postgres") and os.fsencode(data) in command else None


def _remove_stale_pid_file(file: Path) -> None:
    """Remove `postmaster.pid` if it names a process that is no server, as after the restart of a container.

    PostgreSQL would take that process for a server. It handles the case that there is no such process itself.
    """
    with suppress(FileNotFoundError, ProcessLookupError, ValueError):
        os.kill(int(file.read_text().partition("\n")[0]), 0)
        file.unlink()
