"""Text for people: tables, durations, and names that others have chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

_LONGEST_NAME = 60
"""Characters of a name that a table shows."""


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table: its columns' names, then the rows, indented by two spaces."""
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def format_name(text: str) -> str:
    """Return a name of a client for a terminal, which could take special characters for commands."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 3]}..."


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: `2 d 3 h`."""
    seconds = max(0, int(seconds))
    for length, unit, smaller, small in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= length:
            return f"{seconds // length} {unit} {seconds % length // smaller} {small}"
    return f"{seconds} s"


def format_time(time: datetime) -> str:
    """Return a time in UTC, as RFC 3339 has it."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
