"""Secrets that can be guessed. A broker that others can reach does not start with one."""

from __future__ import annotations

import re
from itertools import pairwise

from .settings import Config

SHORTEST_SECRET = 32
"""Bytes, as RFC 7518 asks of a key for HS256. `openssl rand -hex 32` gives 64, and half of them would do."""

MAKE_ONE = "openssl rand -hex 32"

_FEWEST_CHARACTERS = 8
"""Different ones. 32 random hexadecimal digits have fewer once in a hundred million times."""
_FEWEST_OF_ITS_OWN = 12
"""Letters and digits that are left without the words below."""
_EXAMPLES = frozenset(
    {
        "an example secret, not for use",
        "development-secret-of-docker-compose",
        "development-secret-of-the-dev-overlay",
        "your-secure-signing-secret",
    }
)
"""Secrets that our own documents and manifests show to everybody."""
# The longer first: an expression takes the first that fits.
_WORD = re.compile(
    "development|placeholder|characters|production|insecure|password|security|default|example|replace|"
    "signing|catbus|change|enough|passwd|please|random|secret|secure|string|admin|bytes|least|super|"
    "token|value|hmac|long|must|prod|sign|some|test|than|this|very|with|your|dev|for|jwt|key|not|the|use|"
    "at|in|is|me|my|of|to"
)
_NOT_OF_WORDS = re.compile(r"[\W_]+")


def weakness(secret: str) -> str | None:
    """Why a secret can be guessed, as the end of a sentence; None for one that has no known weakness."""
    data = secret.encode(errors="surrogatepass")
    if secret in _EXAMPLES:
        return "stands in the documentation"
    if len(data) < SHORTEST_SECRET:
        return f"has fewer than {SHORTEST_SECRET} bytes"
    if len(set(data)) < _FEWEST_CHARACTERS or (data + data).find(data, 1) < SHORTEST_SECRET:
        return "repeats itself"
    steps = sum(abs(one - next_one) <= 1 for one, next_one in pairwise(data))
    if steps > len(data) * 3 / 4:
        return "follows the alphabet"
    if len(_WORD.sub("", _NOT_OF_WORDS.sub("", secret.lower()))) < _FEWEST_OF_ITS_OWN:
        return "is made of words that stand for a secret"
    return None


def find_weak_secrets(config: Config) -> list[str]:
    """A sentence for each secret that can be guessed. It does not show the secret."""
    auth = config.auth
    several = len(auth.secrets) > 1
    named = [(f"secret {number}" if several else "the secret", each) for number, each in enumerate(auth.secrets, 1)]
    if auth.admin_key is not None:
        named.append(("the admin key", auth.admin_key))
    return [f"{name} {why}" for name, each in named if (why := weakness(each))]
