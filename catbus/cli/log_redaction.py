"""The redaction of secrets in log lines and error messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from structlog.typing import EventDict, WrappedLogger

_FIRST_KEYS = ("timestamp", "level", "logger", "event")
_SECRET_KEY = re.compile(r"secret|token|passw|admin_?key|api_?key|authorization|cookie|credential", re.IGNORECASE)
_SECRET_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(sub|role)-[\w-]{16,}(?:\.[\w-]*)?"), r"\1-***"),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), "eyJ***"),
    (re.compile(r"\b(Bearer|Basic)\s+\S+", re.IGNORECASE), r"\1 ***"),
    (re.compile(r"(://[^\s/:@]*):[^\s/]*@"), r"\1:***@"),
    (re.compile(r"(\w*(?:secret|token|passw(?:or)?d|api_?key)\w*[\"']?\s*[=:]\s*)[^\s&;,]+", re.IGNORECASE), r"\1***"),
)
_SUSPICIOUS = re.compile(r"sub-|role-|eyJ|bearer|basic|://|secret|token|passw|api_?key", re.IGNORECASE)
"""Each of the patterns contains one of these. Searching for all at once is much cheaper than for each pattern."""


def redact_events(secrets: Iterable[str]) -> Callable[[WrappedLogger, str, EventDict], EventDict]:
    """Make a structlog processor that redacts `secrets`, the values of secret keys, and text in the form of a token."""
    known = sorted({secret for secret in secrets if secret}, key=len, reverse=True)

    def hide(key: str, value: object) -> object:
        match value:
            case str():
                return "***" if key and _SECRET_KEY.search(key) else redact_text(value, known)
            case bytes():
                return hide(key, value.decode(errors="replace"))
            case dict():
                return {each: hide(str(each), inner) for each, inner in value.items()}
            case list() | tuple() | set() | frozenset():
                return [hide(key, inner) for inner in value]
            case None | bool() | int() | float():
                return value
            case _:
                return redact_text(str(value), known)

    def process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        # The keys that every line has come first, in the same order.
        keys = [key for key in _FIRST_KEYS if key in event] + [key for key in event if key not in _FIRST_KEYS]
        return {key: hide("" if key in ("event", "exception") else key, event[key]) for key in keys}

    return process


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Redact `secrets` in a text, and everything that looks like a token or a password."""
    for secret in secrets:
        text = text.replace(secret, "***")
    if _SUSPICIOUS.search(text):
        for pattern, instead in _SECRET_PATTERNS:
            text = pattern.sub(instead, text)
    return text
