"""What some tests drive that is not Python's: programs of the distribution, and what npm has installed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

CLIENT = Path(__file__).parent.parent / "clients" / "javascript"


def find_program(package: str, *names: str) -> str:
    """Where it is. Without one the test is skipped, or fails where it must not be missing."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
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


def _missing(reason: str) -> BaseException:
    """What a test ends with that cannot do without: it fails with CI=true, and is skipped elsewhere."""
    return (pytest.fail if os.environ.get("CI") == "true" else pytest.skip).Exception(reason)
