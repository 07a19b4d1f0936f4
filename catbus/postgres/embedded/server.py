"""A PostgreSQL of our own: private to one directory, reached through a socket only, run as our own child.

In the directory:

    lock        held by the catbus that the directory belongs to
    cluster/    data and password; it gets this name when it is whole
    sockets/    where the server listens
    binaries/   a copy of the server, for a user that could not reach the original
    postgres.log

PostgreSQL refuses to run as root. When we are root, an unprivileged user serves the cluster and owns it.
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
"""Of the database, and of the role that owns everything."""
PORT = 5432
"""A part of the socket's name: nothing listens on a TCP port."""
LONGEST_SOCKET = 100
"""How long a socket's path may be, in bytes; systems allow 103 to 107."""
SETTINGS = {"listen_addresses": "", "port": str(PORT), "unix_socket_permissions": "0700", "log_checkpoints": "off"}

FAST = 10.0
"""Seconds for a shutdown that writes everything down."""
IMMEDIATE = 5.0
"""Seconds for one that leaves that to the next start."""

_STAGING = "cluster.new-"
_ACCOUNTS = "postgres", "nobody"
_POLL = 0.02
_INITDB_PATIENCE = 120.0
_OTHERS_PATIENCE = 60.0
"""Seconds for another process that has the directory to serve it."""
_LONGEST_LOG = 1_000_000
_PASSED_ON = "PATH", "LD_LIBRARY_PATH", "TZ"


class DirectoryInUse(ConfigError):
    """The directory belongs to another process."""


class EmbeddedServer:
    """A cluster that is ready to be served, by a child process made of `command` and `popen_options`.

    The directory is ours until `close`. `url` is for asyncpg.
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
        """Let go of the directory. The child must have ended."""
        self._closing.close()

    def is_ready(self, pid: int) -> bool:
        """Whether the child with this id takes connections."""
        status = _status(self.data)
        return status is not None and status.pid == pid and status.ready

    def wait_ready(self, process: subprocess.Popen[bytes], timeout: float = 60.0) -> None:
        """Block until the child takes connections. Raises `ConfigError` when it ends, `TimeoutError`."""
        deadline = time.monotonic() + timeout
        while not self.is_ready(process.pid):
            if process.poll() is not None:
                raise self.failure()
            if time.monotonic() > deadline:
                raise TimeoutError(f"PostgreSQL was not ready within {timeout:g} s; see {self.log_file}")
            time.sleep(_POLL)

    def failure(self) -> ConfigError:
        """Why the child could not start, in its own words."""
        with suppress(OSError):
            if said := _last_words(self.log_file.read_bytes()):
                return ConfigError(f"the embedded database does not start: {said} (more in {self.log_file})")
        return ConfigError(f"the embedded database does not start; see {self.log_file}")


async def run(
    directory: Path,
    *,
    settings: Mapping[str, str] | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the cluster in `directory`, made now if there is none, until cancelled; started with its URL.

    A server that dies is started again. On cancellation this returns when the server has ended, within some 15 s.
    Raises `ConfigError` for what `prepare` does, and for a server that does not start.
    """
    # In a thread, to its end: there is no stopping between two files.
    with await trio.to_thread.run_sync(prepare, directory, settings) as server:
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
async def reach(directory: Path, *, settings: Mapping[str, str] | None = None) -> AsyncIterator[str]:
    """The URL of the cluster in `directory`, which another catbus serves; where none does, we serve it for the moment.

    One that is about to serve it is waited for. Raises `ConfigError` as `run` does, and where it takes too long.
    """
    async with trio.open_nursery() as nursery:
        yield await _reach(directory, settings, nursery)
        nursery.cancel_scope.cancel()


async def _reach(directory: Path, settings: Mapping[str, str] | None, nursery: trio.Nursery) -> str:
    deadline = trio.current_time() + _OTHERS_PATIENCE
    while True:
        try:
            url: str = await nursery.start(partial(run, directory, settings=settings))
        except DirectoryInUse:
            found = served(directory)
            if found is not None:
                return found
            if trio.current_time() > deadline:
                raise
            await trio.sleep(_POLL)
        else:
            return url


def served(directory: Path) -> str | None:
    """The URL of the cluster in `directory` while a server takes connections to it, for who may read what is there."""
    directory = directory.resolve()
    data = directory / "cluster" / "data"
    status = _status(data)
    if status is None or not status.ready or _postmaster(data) != status.pid:
        return None
    return _url(directory, status.sockets)


def is_kept_in(directory: Path) -> bool:
    """Whether a catbus has its database in `directory`, or is about to, or had it there."""
    return (directory / "lock").is_file()


async def _wait_ready(server: EmbeddedServer, process: trio.Process) -> bool:
    """Wait until the child takes connections; False when it has ended instead."""
    # The news is in a file.
    while process.poll() is None and not server.is_ready(process.pid):  # noqa: ASYNC110
        await trio.sleep(_POLL)
    return process.poll() is None


async def _stop(process: trio.Process) -> None:
    for number, patience in ((signal.SIGINT, FAST), (signal.SIGQUIT, IMMEDIATE), (signal.SIGKILL, IMMEDIATE)):
        if process.poll() is None:
            process.send_signal(number)
            with trio.move_on_after(patience):
                await process.wait()


def prepare(directory: Path, settings: Mapping[str, str] | None = None) -> EmbeddedServer:
    """Take `directory` for this process, and make the cluster in it if there is none.

    It may have been left at any moment: what is half done is done again, and a server that has outlived its catbus is
    stopped. `settings` are PostgreSQL's own. Raises `ConfigError`: no usable PostgreSQL, a cluster of another major
    version, a directory that is in use or cannot be used.
    """
    directory = directory.resolve()
    settings = settings or {}
    with ExitStack() as closing:
        try:
            _make_directory(directory)
            closing.enter_context(_locked(directory))
            cluster = directory / "cluster"
            _stop_leftover(cluster / "data")
            options = _child_options(cluster)
            binaries = _binaries_for(cluster)
            if not binaries.can_be_run(options):
                binaries = binaries.copy(directory / "binaries")
            if not cluster.is_dir():
                _initialise(cluster, binaries, options, durable=settings.get("fsync") != "off")
            sockets = closing.enter_context(_socket_directory(directory, options))
            log = directory / "postgres.log"
            if log.exists() and log.stat().st_size > _LONGEST_LOG:
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
    """How a child process is started: apart from our terminal and our secrets, and not as root."""
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
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
    """The unprivileged user: the one that has the cluster, or who is to have it."""
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


def _give(path: Path, options: dict[str, Any]) -> None:
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
    """Make a cluster that has the role and the database. It gets its name last."""
    logger.info("initialising the embedded database", directory=str(cluster.parent), server=str(binaries))
    # Under a new name each time: what an earlier catbus has left behind may still be writing.
    for abandoned in cluster.parent.glob(f"{_STAGING}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=cluster.parent))
    password = staging / "password"
    with os.fdopen(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(24))
        os.fsync(file.fileno())
    _give(password, options)
    _give(staging, options)
    data = staging / "data"
    initdb = [str(binaries.folder / "initdb"), f"--pgdata={data}", f"--username={NAME}", f"--pwfile={password}"]
    initdb += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-instructions"]
    _call(initdb if durable else [*initdb, "--no-sync"], options)
    # In this mode a server needs neither a socket nor a client. The database that it opens is for maintenance.
    single = [str(binaries.folder / "postgres"), "--single", "-c", "exit_on_error=on"]
    _call([*single, "-D", str(data), "postgres"], options, f"CREATE DATABASE {NAME};\n")
    staging.rename(cluster)
    _sync_directory(cluster.parent)


def _call(command: list[str], options: dict[str, Any], words: str = "") -> None:
    who = f" as user {pwd.getpwuid(options['user']).pw_name}" if "user" in options else ""
    failed = f"the embedded database cannot be made: {command[0]}{who}"
    try:
        done = subprocess.run(  # noqa: S603
            command,
            **{**options, "stdin": None},
            input=words.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_INITDB_PATIENCE,
            check=False,
        )
    except PermissionError:
        raise ConfigError(f"{failed}: permission denied: that user has to be able to get there") from None
    if done.returncode:
        raise ConfigError(f"{failed}: {_last_words(done.stdout)}")


def _last_words(output: bytes) -> str:
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
    """A directory for the socket: ours, unless its path is too long for a socket's address."""
    sockets = directory / "sockets"
    if len(os.fsencode(sockets / f".s.PGSQL.{PORT}")) <= LONGEST_SOCKET:
        sockets.mkdir(mode=0o700, exist_ok=True)
        _give(sockets, options)
        yield sockets
        return
    with tempfile.TemporaryDirectory(prefix="catbus-", dir="/tmp", ignore_cleanup_errors=True) as short:
        _give(Path(short), options)
        yield Path(short)


def _stop_leftover(data: Path) -> None:
    """Stop the server that has outlived the catbus before us: only one may have the data."""
    for number, patience in ((signal.SIGINT, FAST), (signal.SIGQUIT, IMMEDIATE)):
        if (pid := _postmaster(data)) is None:
            break
        logger.info("stopping the embedded database that an earlier catbus has left behind", pid=pid)
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience
        while _postmaster(data) is not None and time.monotonic() < deadline:
            time.sleep(_POLL)
    if (pid := _postmaster(data)) is not None:
        raise ConfigError(f"an earlier catbus has left process {pid} behind, which has {data} open: kill it")
    _forget_stranger(data / "postmaster.pid")


@dataclass(frozen=True, slots=True)
class _Status:
    """What a server has written of itself into `postmaster.pid`."""

    pid: int
    sockets: Path
    ready: bool


def _status(data: Path) -> _Status | None:
    """What the server of `data` last said; it may have gone without a word."""
    with suppress(OSError, ValueError):
        lines = (data / "postmaster.pid").read_text().splitlines()
        if len(lines) >= 8:
            return _Status(int(lines[0]), Path(lines[4].strip()), lines[7].strip() == "ready")
    return None


def _postmaster(data: Path) -> int | None:
    """The process that serves `data`, if there is one."""
    try:
        pid = int((data / "postmaster.pid").read_text().partition("\n")[0])
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if command[0].endswith(b"/postgres") and os.fsencode(data) in command else None


def _forget_stranger(file: Path) -> None:
    """Remove `postmaster.pid` where it names a process that is something else by now, as after a container's restart.

    PostgreSQL would take that process for a server. It knows better itself where there is no such process.
    """
    with suppress(FileNotFoundError, ProcessLookupError, ValueError):
        os.kill(int(file.read_text().partition("\n")[0]), 0)
        file.unlink()
