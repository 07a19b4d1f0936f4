"""The types of setting values, and the conversion from TOML, text and Python values."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from ..errors import ConfigError
from .log_levels import parse_levels
from .network_addresses import check_key_set_url, is_url, redact_url, split_address

# The types. An error shows the description as the expected value.

_TEN_YEARS = 315_360_000.0
_DURATION = 'a duration: seconds, or text like "30s", "5m" or "1h"'

Text = Annotated[str, Meta(min_length=1, description="text")]
Duration = Annotated[float, Meta(ge=0, le=_TEN_YEARS, description=_DURATION)]
Timeout = Annotated[float, Meta(gt=0, le=_TEN_YEARS, description=f"{_DURATION}, above 0")]
Size = Annotated[int, Meta(gt=0, le=2**53, description='a size above 0: bytes, or text like "64KiB" or "1MiB"')]
LogSize = Annotated[int, Meta(ge=64 << 20, le=2**53, description='a size of at least 64 MiB, like "10GiB"')]
Count = Annotated[int, Meta(gt=0, le=2**53, description="a whole number above 0")]
Workers = Annotated[
    Annotated[int, Meta(ge=1, le=128)] | Literal["auto"],
    Meta(description='a number of processes from 1 to 128, or "auto"'),
]
Switch = Annotated[bool, Meta(description="true or false")]
File = Annotated[str, Meta(min_length=1, description="a path")]
KeySource = Annotated[str, Meta(min_length=1, description="a path, or a URL that begins with https://")]
Secret = Annotated[str, Meta(min_length=1, description="a secret: text that is not empty")]
Address = Annotated[str, Meta(description='an address with a port, like "127.0.0.1:8080" or "[::1]:8080"')]
Network = Annotated[str, Meta(description='an address or a network, like "192.0.2.7", "10.0.0.0/8" or "fd00::/8"')]
DatabaseUrl = Annotated[str, Meta(description='"embedded", "memory" or a URL that begins with postgres://')]
PostgresUrl = Annotated[str, Meta(description="a URL that begins with postgres://")]
Levels = Annotated[str, Meta(description='log levels, like "info" or "catbus=info,aioquic=warning"')]
Format = Literal["auto", "json", "text"]
SynchronousCommit = Literal["on", "off", "local", "remote_write", "remote_apply"]
Failover = Literal["lossy", "lossless"]

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_BYTES = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_BYTES |= {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


def convert_value(hint: Any, value: object, base: Path | None = None) -> Any:
    """Convert `value` to the type `hint` of a setting. Raises `ValueError`.

    The function accepts its own results. A relative path is relative to the directory `base`, if given.
    """
    kind = _value_type(hint)
    if value is None and kind is not hint:
        return None
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(value, str | os.PathLike):
            value = [value]
        if not isinstance(value, list | tuple):
            raise ValueError
        return tuple(convert_value(item, each, base) for each in value)
    if kind in (File, KeySource) and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        value = _parse_text(kind, value)
    # msgspec raises a ValueError, but its text is for programmers.
    checked = msgspec.convert(value, kind)
    is_path = kind == File or (kind == KeySource and not is_url(checked))
    return _expand_path(checked, base) if is_path else checked


def _expand_path(text: str, base: Path | None) -> str:
    try:
        return str((base or Path()) / Path(text).expanduser())
    except RuntimeError:  # Unknown user.
        raise ValueError from None


def _parse_text(kind: Any, text: str) -> object:
    if kind in (Duration, Timeout):
        return _parse_amount(text, _SECONDS)
    if kind in (Size, LogSize):
        return int(_parse_amount(text, _BYTES))
    if kind == Levels:
        parse_levels(text)
    if kind == KeySource and is_url(text):
        check_key_set_url(text)
    if kind == Address:
        try:
            split_address(text)
        except ConfigError:
            raise ValueError from None
    if kind == Network:
        ip_network(text)
    if kind == DatabaseUrl and text in ("embedded", "memory"):
        return text
    if kind in (DatabaseUrl, PostgresUrl) and not text.startswith(("postgres://", "postgresql://")):
        raise ValueError
    return text


def _parse_amount(text: str, units: Mapping[str, float]) -> float:
    match = _AMOUNT.fullmatch(text)
    amount = float(match[1]) * units.get(match[2], math.nan) if match else math.nan
    if not math.isfinite(amount):
        raise ValueError
    return amount


def parse_duration(text: str) -> float:
    """Parse text like "30s", "5m", "1h" or "7d" to seconds. Raises `ValueError`."""
    return _parse_amount(text, _SECONDS)


def parse_size(text: str) -> int:
    """Parse text like "64KiB" or "1MiB" to bytes. Raises `ValueError`."""
    return int(_parse_amount(text, _BYTES))


def _value_type(hint: Any) -> Any:
    """Return `X` for the type `X | None`. A file cannot contain None."""
    rest = [each for each in get_args(hint) if each is not type(None)]
    return rest[0] if type(None) in get_args(hint) else hint


def describe_mismatch(hint: Any, value: object, *, hidden: bool) -> str:
    """Return the error text with the expected and the found value. The value of a hidden setting is not shown."""
    return f"expected {describe_type(hint)}, found {_format_secret(value) if hidden else format_value(value)}"


def describe_type(hint: Any) -> str:
    kind = _value_type(hint)
    if get_origin(kind) is tuple:
        return f"{describe_type(get_args(kind)[0])}, or a list of them"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(kind))
    return next(meta.description for meta in get_args(kind) if isinstance(meta, Meta) and meta.description)


def format_value(value: object) -> str:
    """Format a value for an error message as TOML, with limited length. Secret parts of a URL are not shown."""
    match value:
        case float():
            return repr(value)
        case int() if value.bit_length() > 256:
            return "a number that is too large"
        case bool() | str() | int():
            shown = redact_url(value) if isinstance(value, str) else value
            text = json.dumps(shown, ensure_ascii=True)
            return text if len(text) <= 60 else text[:57] + '..."'
        case list() | tuple():
            return "[" + ", ".join(map(format_value, value[:4])) + (", ...]" if len(value) > 4 else "]")
        case Mapping():
            return "a table"
        case _:
            return f"a {type(value).__name__}"


def _format_secret(value: object) -> str:
    scheme, separator, _ = value.partition("://") if isinstance(value, str) else ("", "", "")
    return format_value(f"{scheme}://...") if separator else "something else"
