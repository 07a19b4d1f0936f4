"""The `catbus` command."""

from .entry import main

__all__ = ["main"]
