"""Programs of the distribution that some tests drive."""

from __future__ import annotations

import os
import shutil

import pytest


def find_program(package: str, *names: str) -> str:
    """Where it is. Without one the test is skipped, or fails where it must not be missing."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    for name in names:
        if found := shutil.which(name, path=path):
            return found
    reason = f"there is no {names[0]} on PATH: install your distribution's package `{package}`"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
