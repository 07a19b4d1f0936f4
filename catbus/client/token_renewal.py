"""Token renewal: when a token expires, and when to ask for the next one. Pure."""

from __future__ import annotations

import base64

import msgspec

RENEWAL_MARGIN = 30.0
"""Seconds before the expiry of a token at which the client asks for the next one."""

MIN_RENEWAL_DELAY = 1.0
"""The shortest time between two requests for a token, in seconds."""


class _TokenLifetime(msgspec.Struct):
    exp: float | None = None
    iat: float | None = None


def find_expiry(token: str) -> float | None:
    """Return when a token expires, in seconds since 1970, or None if it does not say. Nothing is verified."""
    return _claims(token).exp


def _claims(token: str) -> _TokenLifetime:
    if token.startswith("role-"):
        return _TokenLifetime()
    parts = token.split(".")
    if token.startswith("sub-"):
        body = parts[0].removeprefix("sub-")
    elif len(parts) == 3:
        body = parts[1]
    else:
        return _TokenLifetime()
    try:
        claims = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        try:
            return msgspec.json.decode(claims, type=_TokenLifetime)
        except msgspec.ValidationError:
            # Of two claims with the same name the last one counts, even if the first has another type.
            return msgspec.convert(msgspec.json.decode(claims), _TokenLifetime)
    except ValueError:
        return _TokenLifetime()


def renewal_delay(token: str, wall: float) -> float | None:
    """Return the seconds until the next token is needed, or None if never. `wall` is in seconds since 1970.

    The broker has just accepted the token. If it seems to be expired, or to last longer than its lifetime, the clock of
    this machine is wrong, and the token counts as just issued.
    """
    claims = _claims(token)
    if claims.exp is None:
        return None
    left = claims.exp - wall
    lifetime = None if claims.iat is None else claims.exp - claims.iat
    if lifetime is not None and lifetime > 0 and not 0 < left <= lifetime:
        left = lifetime
    elif left < -2 * RENEWAL_MARGIN:
        return RENEWAL_MARGIN
    return max(MIN_RENEWAL_DELAY, left - RENEWAL_MARGIN if left > 2 * RENEWAL_MARGIN else left / 2)
