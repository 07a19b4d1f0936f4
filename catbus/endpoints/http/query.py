"""The query of a request's target: strict parsing of its parameters. Pure.

A query consists of `name=value` pairs between `&`, as HTML forms write them: `+` is a space, and other characters are
percent-encoded UTF-8. What is not valid is an error and never ignored: a client whose `since` has a typing error would
otherwise miss messages without noticing. The length of a query is limited with the head of its request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar
from urllib.parse import unquote_to_bytes

import msgspec

from ...error_codes import ErrorCode
from ...errors import PeerError
from ...protocol.channels import check_pattern
from ...protocol.wire_messages import MAX_NUMBER

S = TypeVar("S", bound=msgspec.Struct)

ACCESS_TOKEN = "access_token"
"""The parameter that has the token of a client that cannot set headers (RFC 6750, section 2.3)."""

Parameters = Mapping[str, Sequence[str]]
"""The values of each parameter that occurs, in order."""

_INVALID_ESCAPE = re.compile(r"%(?![0-9a-fA-F]{2})")
_CURSOR = re.compile(r"([0-9]{1,19})(?:\.([0-9a-zA-Z_-]{1,64}))?", re.ASCII)
_MAX_REPEATED_NAME = 32
"""Characters of an unknown parameter's name that its error repeats."""


def parse_query(text: str, allowed: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the parameters of a query. `allowed`: how often each may occur; `access_token` may always occur once.

    Raises `PeerError` (bad_message) for a parameter that is unknown or occurs too often, and for a name or value that
    is not percent-encoded UTF-8. The text of the error contains no values.
    """
    found: dict[str, list[str]] = {}
    for pair in text.split("&"):
        if not pair:
            continue
        given, _, value = pair.partition("=")
        name = _decode(given, "a parameter's name")
        limit = 1 if name == ACCESS_TOKEN else allowed.get(name, 0)
        if not limit:
            known = ", ".join(allowed) or "none"
            raise _bad(f"there is no parameter `{name[:_MAX_REPEATED_NAME]}` here (known: {known})")
        values = found.setdefault(name, [])
        if len(values) == limit:
            raise _bad(f"`{name}` may occur once" if limit == 1 else f"`{name}` may occur {limit} times")
        values.append(_decode(value, f"`{name}`"))
    return found


def find_access_token(text: str) -> str | None:
    """Return the `access_token` of a query, or None without one. Raises `PeerError` if it occurs twice or is invalid.

    The other parameters are not checked.
    """
    pairs = (pair.partition("=") for pair in text.split("&"))
    values = [value for name, _, value in pairs if unquote_to_bytes(name) == ACCESS_TOKEN.encode()]
    if len(values) > 1:
        raise _bad(f"`{ACCESS_TOKEN}` may occur once")
    return _decode(values[0], f"`{ACCESS_TOKEN}`") if values else None


def single(parameters: Parameters, name: str) -> str | None:
    """Return the value of a parameter that may occur once, or None without it."""
    values = parameters.get(name)
    return values[0] if values else None


def flag(parameters: Parameters, name: str) -> bool:
    """Return whether a parameter is `1`. Without it, or with `0`: False. Raises `PeerError` (bad_message)."""
    text = single(parameters, name)
    if text not in (None, "0", "1"):
        raise _bad(f"`{name}` is 0 or 1")
    return text == "1"


def since(parameters: Parameters) -> tuple[int, str | None] | None:
    """Return the seq and the epoch to resume after; None without `since`. Raises `PeerError` (bad_message).

    Both `since=SEQ&epoch=EPOCH` and `since=SEQ.EPOCH` are accepted. Without an epoch, it is None.
    """
    text, epoch = single(parameters, "since"), single(parameters, "epoch")
    if text is None:
        if epoch is not None:
            raise _bad("`epoch` has no meaning without `since`")
        return None
    cursor = parse_cursor(text)
    if cursor is None:
        raise _bad("`since` is not a seq, as in `since=17`, and not a cursor, as in `since=17.EPOCH`")
    if epoch is None:
        return cursor
    if cursor[1] not in (None, epoch):
        raise _bad("`since` and `epoch` name different epochs")
    return cursor[0], epoch


def distinct_patterns(values: Sequence[str]) -> list[str]:
    """Return each pattern once, in order. Raises `PeerError` (invalid_pattern) for one that is not valid."""
    patterns = list(dict.fromkeys(values))
    for pattern in patterns:
        check_pattern(pattern)
    return patterns


def parse_cursor(text: str) -> tuple[int, str | None] | None:
    """Return the seq and the epoch of a cursor, `SEQ.EPOCH` or `SEQ`; None for any other text."""
    match = _CURSOR.fullmatch(text)
    if match is None or int(match[1]) > MAX_NUMBER:
        return None
    return int(match[1]), match[2]


def format_cursor(seq: int, epoch: str) -> str:
    """Return a cursor as a text that `parse_cursor` parses."""
    return f"{seq}.{epoch}"


def parse_query_as(text: str, kind: type[S]) -> S:
    """Return the parameters of a query as a struct, each of whose fields may occur once.

    Raises `PeerError` (bad_message), also for a value that does not have the type of its field.
    """
    found = parse_query(text, dict.fromkeys(kind.__struct_fields__, 1))
    given = {name: values[0] for name, values in found.items() if name != ACCESS_TOKEN}
    return convert_parameters(given, kind)


def convert_parameters(given: Mapping[str, str | Sequence[str]], kind: type[S]) -> S:
    """Return texts as a struct. Raises `PeerError` (bad_message) for a value that does not have the type of its field.

    A number is written as in JSON, and a boolean as `true` or `false`.
    """
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$.")
        raise _bad(f"`{place.rstrip('`')}`: {text[:1].lower()}{text[1:]}" if place else text) from None


def decode_percent(text: str, what: str) -> str:
    """Decode percent-encoded UTF-8. Raises `PeerError` (bad_message), whose text names `what`."""
    if _INVALID_ESCAPE.search(text):
        raise _bad(f"{what} has a `%` without two hexadecimal digits")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise _bad(f"{what} is not UTF-8") from None


def _decode(text: str, what: str) -> str:
    return decode_percent(text.replace("+", " "), what)


def _bad(message: str) -> PeerError:
    return PeerError(ErrorCode.BAD_MESSAGE, message)
