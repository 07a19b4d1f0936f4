"""What some tests drive that is not of this environment: programs, what npm has installed, another Python."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

CLIENT = Path(__file__).parent.parent / "clients" / "javascript"


def find_program(package: str, *names: str) -> str:
    """Where it is. Without one the test is skipped, or fails where it must not be missing."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/go/bin"
    for name in names:
        if found := shutil.which(name, path=path):
            return found
    raise _missing(f"there is no {names[0]} on PATH: install your distribution's package `{package}`")


def find_module(path: str) -> Path:
    """A file or directory of a package that npm has installed, likewise."""
    found = CLIENT / "node_modules" / path
    if not found.exists():
        raise _missing("npm has installed nothing in clients/javascript: npm ci --prefix clients/javascript")
    return found


def find_foreign_python() -> Path:
    """The Python that has what `tests/foreign/requirements.txt` names, likewise."""
    found = Path(sys.prefix) / "foreign" / "bin" / "python"
    if not found.exists():
        raise _missing("the WebTransport libraries of others need Python 3.12 or newer: make .venv/installed-foreign")
    return found


def find_for_conformance(name: str, environment: str = "conformance") -> Path:
    """A program that has been installed for `make conformance` alone, likewise. `autobahn` is one for Python 2.7."""
    found = Path(sys.prefix) / environment / "bin" / name
    if not found.exists():
        raise _missing(f"{environment}/bin/{name} is not installed: make .venv/installed-conformance")
    return found


def find_schemathesis() -> Path:
    """The program `schemathesis`, likewise."""
    found = Path(sys.prefix) / "schemathesis" / "bin" / "schemathesis"
    if not found.exists():
        raise _missing("schemathesis is not installed: make .venv/installed-schemathesis")
    return found


def _missing(reason: str) -> BaseException:
    """What a test ends with that cannot do without: it fails with CI=true, and is skipped elsewhere."""
    return (pytest.fail if os.environ.get("CI") == "true" else pytest.skip).Exception(reason)
