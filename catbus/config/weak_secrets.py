"""The detection of weak secrets. A broker that other machines can reach does not start with one."""

from __future__ import annotations

import re
from itertools import pairwise

from .settings import Config

MIN_SECRET_BYTES = 32
"""Bytes that RFC 7518 requires of a key for HS256. `openssl rand -hex 32` prints 64."""

SECRET_COMMAND = "openssl rand -hex 32"

_MIN_DIFFERENT_BYTES = 8
"""Of 32 random hexadecimal digits, one in a hundred million has fewer different characters."""
_MIN_CHARACTERS_OUTSIDE_WORDS = 12
"""Letters and digits that must remain when the words below are removed."""
_PUBLISHED_SECRETS = frozenset(
    {
        "an example secret, not for use",
        "development-secret-of-docker-compose",
        "development-secret-of-the-dev-overlay",
        "your-secure-signing-secret",
    }
)
"""Secrets that the documentation and the manifests of Catbus publish."""
# Longer words come first, because the expression takes the first alternative that matches.
_WORD = re.compile(
    "development|placeholder|characters|production|insecure|password|security|default|example|replace|"
    "signing|catbus|change|enough|passwd|please|random|secret|secure|string|admin|bytes|least|super|"
    "token|value|hmac|long|must|prod|sign|some|test|than|this|very|with|your|dev|for|jwt|key|not|the|use|"
    "at|in|is|me|my|of|to"
)
_SEPARATORS = re.compile(r"[\W_]+")


def find_weakness(secret: str) -> str | None:
    """Return why a secret is weak, as the end of a sentence, or None if it has no known weakness."""
    data = secret.encode(errors="surrogatepass")
    if secret in _PUBLISHED_SECRETS:
        return "is published in the documentation"
    if len(data) < MIN_SECRET_BYTES:
        return f"has fewer than {MIN_SECRET_BYTES} bytes"
    if len(set(data)) < _MIN_DIFFERENT_BYTES or (data + data).find(data, 1) < MIN_SECRET_BYTES:
        return "repeats the same characters"
    steps = sum(abs(one - next_one) <= 1 for one, next_one in pairwise(data))
    if steps > len(data) * 3 / 4:
        return "is a sequence of the alphabet"
    if len(_WORD.sub("", _SEPARATORS.sub("", secret.lower()))) < _MIN_CHARACTERS_OUTSIDE_WORDS:
        return "consists of placeholder words"
    return None


def find_weak_secrets(config: Config) -> list[str]:
    """Return a sentence for each weak secret. It does not show the secret."""
    auth = config.auth
    several = len(auth.secrets) > 1
    named = [(f"secret {number}" if several else "the secret", each) for number, each in enumerate(auth.secrets, 1)]
    if auth.admin_key is not None:
        named.append(("the admin key", auth.admin_key))
    return [f"{name} {why}" for name, each in named if (why := find_weakness(each))]
