"""Channels and the patterns that match them.

A channel is dot-separated segments: `project.abc123.updates`. A pattern is a channel, or a channel followed by `.*`
(everything below it, at any depth, and not itself), or `*` alone (everything but reserved channels).

Channels that begin with `_` are reserved: only the broker publishes to them, and a pattern or grant has to name them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..error_codes import ErrorCode
from ..errors import PeerError

MAX_LENGTH = 255
"""Bytes that a channel or a pattern may have."""

ERASED = "_erased"
"""The channel of messages whose contents were erased."""

MAX_SEGMENTS = 32
"""Segments that a channel or a pattern may have; the `*` of a pattern is one."""

_SEGMENTS = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_INVALID_CHARACTER = re.compile(r"[^A-Za-z0-9_.-]")


def check_channel(text: str) -> None:
    """Raise `PeerError` (invalid_channel) if `text` is not a channel."""
    fault = _fault(text, text)
    if fault is not None:
        raise PeerError(ErrorCode.INVALID_CHANNEL, f"not a channel: {_clip(text)}: {fault}")


def check_pattern(text: str) -> None:
    """Raise `PeerError` (invalid_pattern) if `text` is not a pattern."""
    if text == "*":
        return
    fault = _fault(text, text.removesuffix(".*"))
    if fault is not None:
        raise PeerError(ErrorCode.INVALID_PATTERN, f"not a pattern: {_clip(text)}: {fault}")


def is_reserved(text: str) -> bool:
    """Whether a valid channel is reserved for the broker, or a valid pattern matches reserved channels."""
    return text.startswith("_")


def matches(pattern: str, channel: str) -> bool:
    """Whether a pattern matches a channel. Both must be valid."""
    if pattern == "*":
        return not is_reserved(channel)
    if pattern.endswith(".*"):
        return channel.startswith(pattern[:-1])
    return channel == pattern


def selectors(text: str) -> Iterator[str]:
    """All patterns that match a valid channel, the widest first; for a valid pattern, all patterns that cover it."""
    if text != "*" and not is_reserved(text):
        yield "*"
    end = text.find(".")
    while end > 0:
        wildcard = text[: end + 1] + "*"
        if wildcard != text:
            yield wildcard
        end = text.find(".", end + 1)
    yield text


def covers(grant: str, pattern: str) -> bool:
    """Whether `grant` matches every channel that `pattern` matches. Both must be valid patterns."""
    # A pattern with a wildcard has the prefix of all channels that it matches, so `matches` works for it, too.
    return matches(grant, pattern)


def prefix_range(pattern: str) -> tuple[str, str] | None:
    """The bounds (`>=`, `<`) in byte order of the channels that `a.b.*` matches; None for a channel and for `*`."""
    if not pattern.endswith(".*"):
        return None
    return pattern[:-1], pattern[:-2] + "/"


def channel_range(pattern: str, after: str | None = None) -> tuple[str, str]:
    """The bounds (`>=`, `<`) in byte order of the channels above `after` that a pattern matches.

    The range of `*` also contains reserved channels, which it does not match.
    """
    low, high = ("", "\x7f") if pattern == "*" else prefix_range(pattern) or (pattern, pattern + "\x01")
    # No character of a channel is below "-".
    return (low if after is None else max(low, after + "\x01")), high


def _fault(text: str, channel: str) -> str | None:
    if _SEGMENTS.fullmatch(channel) and len(text) <= MAX_LENGTH and text.count(".") < MAX_SEGMENTS:
        return None
    if not text:
        return "it is empty"
    if len(text) > MAX_LENGTH:
        return f"longer than {MAX_LENGTH} bytes"
    invalid = _INVALID_CHARACTER.search(channel)
    if invalid is None:
        return f"more than {MAX_SEGMENTS} segments" if _SEGMENTS.fullmatch(channel) else "a segment is empty"
    if invalid[0] == "*":
        return "a wildcard may only be the last segment of a pattern"
    return f"{invalid[0]!a} is not allowed"


def _clip(text: str) -> str:
    return ascii(text if len(text) <= 64 else text[:61] + "...")
