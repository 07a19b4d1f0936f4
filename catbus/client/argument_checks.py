"""Checks of the arguments of public calls. Pure.

The error names the argument: `TypeError` for a wrong type, `ValueError` for a value out of range. The broker would
reject many of them with `bad_message`, or close a connection that other tasks share.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..errors import PeerError, Refused
from ..protocol.wire_messages import MAX_NUMBER

MAX_EPOCH_SIZE = 255
"""The longest epoch, in bytes."""

MAX_LAST = 100_000
"""The largest `last` of a subscription, in messages. They wait in memory."""

_CURSOR = re.compile(r"(\d{1,19})\.(\S{1,255})", re.ASCII)


def encode_cursor(seq: int, epoch: str) -> str:
    """Encode a position in the log as opaque text."""
    return f"{seq}.{epoch}"


def check_position(name: str, value: object, epoch: object = None) -> tuple[int | None, str | None]:
    """Return the seq and epoch of a position: a cursor, or a seq with a separate epoch, or None."""
    if epoch is not None:
        check_text("epoch", epoch, MAX_EPOCH_SIZE)
    if isinstance(value, str):
        found = _CURSOR.fullmatch(check_text(name, value))
        if found is None or int(found[1]) > MAX_NUMBER:
            raise ValueError(f"{name}: a seq or the cursor of a message, not {_show(value)}")
        if epoch not in (None, found[2]):
            raise ValueError("epoch: a cursor already has an epoch")
        return int(found[1]), found[2]
    seq = None if value is None else check_integer(name, value, 0)
    return seq, epoch  # type: ignore[return-value]


def check_name(name: str, value: object, check: Callable[[str], None]) -> None:
    """Check a channel or a pattern. Raises `Refused` with the error code that the broker would use."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: a text, not {_show(value)}")
    try:
        check(value)
    except PeerError as error:
        raise Refused(error.code, error.message) from None


def check_text(name: str, value: object, max_size: int | None = None) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: a text, not {_show(value)}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name}: half of a surrogate pair is not valid text") from None
    if max_size is not None and size > max_size:
        raise ValueError(f"{name}: longer than {max_size} bytes")
    return value


def check_integer(name: str, value: object, least: int, most: int = MAX_NUMBER) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: an integer, not {_show(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name}: an integer from {least} to {most}, not {_show(value)}")
    return value


def check_retain(expect: object, *, retain: bool, ephemeral: bool, echo: bool) -> None:
    """Check the arguments of a publish that sets the retained message of a channel."""
    if expect is not None:
        check_integer("expect", expect, 0)
        if not retain:
            raise ValueError("expect: only with retain")
    if retain and ephemeral:
        raise ValueError("retain: not with ephemeral, which is not in the log")
    if retain and not echo:
        raise ValueError("retain: only with echo, by which the live maps of this client learn of it")


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
    """Format a value for an error message, at a bounded length."""
    if not isinstance(value, str | int | float | bool | None):
        return type(value).__name__
    text = ascii(value) if not isinstance(value, int) or value.bit_length() < 100 else "one with many digits"
    return text if len(text) <= 64 else text[:61] + "..."
