"""The version of this release."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """The version, such as "1.2.3", or "(not installed)"."""
    try:
        return metadata.version("catbus-broker")
    except metadata.PackageNotFoundError:
        return "(not installed)"
