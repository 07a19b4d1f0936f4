"""The arguments of public calls, checked where they are given: a wrong one is an error of its own call. Pure.

What fails here names the argument: `TypeError` where it is of another type, `ValueError` where it is out of range. The
broker would answer many of them with `bad_message`, or close a connection that others share.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..errors import PeerError, Refused
from ..protocol.wire_messages import MAX_NUMBER

LONGEST_EPOCH = 255
"""How many characters an epoch may have."""

MOST_RECENT = 100_000
"""How many messages of the past a subscription may begin with: they wait in memory."""

_CURSOR = re.compile(r"(\d{1,19})\.(\S{1,255})", re.ASCII)


def encode_cursor(seq: int, epoch: str) -> str:
    """The opaque text that stands for a place in the log."""
    return f"{seq}.{epoch}"


def check_place(name: str, value: object, epoch: object = None) -> tuple[int | None, str | None]:
    """The seq and the epoch of a place: a cursor, or a seq whose epoch is given apart, or none (None)."""
    if epoch is not None:
        check_text("epoch", epoch, LONGEST_EPOCH)
    if isinstance(value, str):
        found = _CURSOR.fullmatch(check_text(name, value))
        if found is None or int(found[1]) > MAX_NUMBER:
            raise ValueError(f"{name}: a seq or the cursor of a message, not {_show(value)}")
        if epoch not in (None, found[2]):
            raise ValueError("epoch: a cursor has an epoch of its own")
        return int(found[1]), found[2]
    seq = None if value is None else check_integer(name, value, 0)
    return seq, epoch  # type: ignore[return-value]


def check_name(name: str, value: object, check: Callable[[str], None]) -> None:
    """A channel or a pattern. Raises `Refused` with the code that the broker would answer with."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: a text, not {_show(value)}")
    try:
        check(value)
    except PeerError as error:
        raise Refused(error.code, error.message) from None


def check_text(name: str, value: object, longest: int | None = None) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: a text, not {_show(value)}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name}: half of a surrogate pair is no text") from None
    if longest is not None and size > longest:
        raise ValueError(f"{name}: longer than {longest} bytes")
    return value


def check_integer(name: str, value: object, least: int, most: int = MAX_NUMBER) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: an integer, not {_show(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name}: an integer from {least} to {most}, not {_show(value)}")
    return value


def check_flags(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: True or False, not {_show(value)}")


def check_seconds(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name}: seconds, not {_show(value)}")
        if not value > 0:
            raise ValueError(f"{name}: more than 0 seconds, not {_show(value)}")


def check_function(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name}: a function, not {_show(value)}")


def _show(value: object) -> str:
    """A value as an error shows it, at a bounded length."""
    if not isinstance(value, str | int | float | bool | None):
        return type(value).__name__
    text = ascii(value) if not isinstance(value, int) or value.bit_length() < 100 else "one with many digits"
    return text if len(text) <= 64 else text[:61] + "..."
