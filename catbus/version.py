"""Which release this is."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """Such as "1.2.3", or a word that says that it is not known."""
    try:
        return metadata.version("catbus-broker")
    except metadata.PackageNotFoundError:
        return "(not installed)"
