"""Log levels as text, like `catbus=info,aioquic=warning`."""

from __future__ import annotations

import logging
import re

_LOGGER = re.compile(r"[\w.-]+")

LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "off": logging.CRITICAL + 10,
}


def parse_levels(text: str) -> dict[str, int]:
    """Parse log levels to a mapping by logger. A level without a logger has the empty name, the root logger's.

    Raises `ValueError`.
    """
    levels = {}
    for directive in filter(None, map(str.strip, text.split(","))):
        name, separator, level = directive.rpartition("=")
        if (separator and not _LOGGER.fullmatch(name.strip())) or level.strip().lower() not in LEVELS:
            raise ValueError(directive)
        levels[name.strip()] = LEVELS[level.strip().lower()]
    return levels
