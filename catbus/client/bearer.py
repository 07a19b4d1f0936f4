"""A token, and when the next one is due. Pure."""

from __future__ import annotations

import base64

import msgspec

MARGIN = 30.0
"""How long, in seconds, before a token's time is over the next one is asked for."""

SHORTEST = 1.0
"""Seconds between two questions for a token, at the least."""


class _Claims(msgspec.Struct):
    exp: float | None = None


def find_expiry(token: str) -> float | None:
    """When a token's time is over, in seconds since 1970, where it says so itself. Nothing is verified."""
    if token.startswith("role-"):
        return None
    parts = token.split(".")
    if token.startswith("sub-"):
        body = parts[0].removeprefix("sub-")
    elif len(parts) == 3:
        body = parts[1]
    else:
        return None
    try:
        claims = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        try:
            return msgspec.json.decode(claims, type=_Claims).exp
        except msgspec.ValidationError:
            # Of two claims with one name the last counts, whatever the first is.
            return msgspec.convert(msgspec.json.decode(claims), _Claims).exp
    except ValueError:
        return None


def until_renewal(token: str, wall: float) -> float | None:
    """How long the next token can wait, in seconds; None: for ever. `wall` is in seconds since 1970."""
    expiry = find_expiry(token)
    if expiry is None:
        return None
    left = expiry - wall
    return max(SHORTEST, left - MARGIN if left > 2 * MARGIN else left / 2)
