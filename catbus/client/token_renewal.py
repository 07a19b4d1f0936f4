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
    iat: float | None = None


def find_expiry(token: str) -> float | None:
    """When a token's time is over, in seconds since 1970, where it says so itself. Nothing is verified."""
    return _claims(token).exp


def _claims(token: str) -> _Claims:
    if token.startswith("role-"):
        return _Claims()
    parts = token.split(".")
    if token.startswith("sub-"):
        body = parts[0].removeprefix("sub-")
    elif len(parts) == 3:
        body = parts[1]
    else:
        return _Claims()
    try:
        claims = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        try:
            return msgspec.json.decode(claims, type=_Claims)
        except msgspec.ValidationError:
            # Of two claims with one name the last counts, whatever the first is.
            return msgspec.convert(msgspec.json.decode(claims), _Claims)
    except ValueError:
        return _Claims()


def until_renewal(token: str, wall: float) -> float | None:
    """How long the next token can wait, in seconds; None: for ever. `wall` is in seconds since 1970.

    The broker has just taken the token. Where the time that is left is less than nothing, or more than the token was
    made for, this machine's clock is wrong, and the token counts as just made.
    """
    claims = _claims(token)
    if claims.exp is None:
        return None
    left = claims.exp - wall
    life = None if claims.iat is None else claims.exp - claims.iat
    if life is not None and life > 0 and not 0 < left <= life:
        left = life
    elif left < -2 * MARGIN:
        return MARGIN
    return max(SHORTEST, left - MARGIN if left > 2 * MARGIN else left / 2)
