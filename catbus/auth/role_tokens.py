"""Role tokens: tokens without claims, each of which stands for a role in the database."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from hashlib import sha256
from typing import Protocol

from .base64url import decode_base64url, encode_base64url
from .grants import Identity

HANDLE_DIGITS = 12
"""Hexadecimal digits of a role's key that are its handle."""

_PREFIX = b"role-"
_RANDOM_BYTES = 16


class RoleSource(Protocol):
    """The store of the roles."""

    async def find(self, keys: Collection[bytes]) -> Mapping[bytes, Identity]:
        """Look up the identities of the roles with these keys, as of now. Keys without a role are left out.

        Raises `Unavailable`, within seconds, if the roles cannot be read.
        """

    @property
    def changes(self) -> int:
        """A number that rises whenever a role may have changed."""

    @property
    def checked(self) -> float:
        """The Trio time up to which all changes are known."""

    async def wait_changes(self) -> Collection[bytes] | None:
        """Wait for changes since the last call. Returns the keys of the roles that changed; None: any may have."""


def make_role_token() -> str:
    """Make a new, random `role-` token. It has no claims: the store keeps its key and its grants."""
    return (_PREFIX + encode_base64url(os.urandom(_RANDOM_BYTES))).decode()


def role_key(token: str) -> bytes | None:
    """The hash under which the role of a `role-` token is kept; None for a text that is not exactly a role token.

    The token cannot be found from its key.
    """
    given = token.encode(errors="surrogatepass")
    if not given.startswith(_PREFIX):
        return None
    data = decode_base64url(given.removeprefix(_PREFIX))
    return sha256(given).digest() if data is not None and len(data) == _RANDOM_BYTES else None


def role_handle(key: bytes) -> str:
    """The short name of a role, for people."""
    return key.hex()[:HANDLE_DIGITS]


def role_digits(name: str) -> str | None:
    """The first hexadecimal digits of the key of a role that is named by its token or its handle; None for neither.

    A handle may have more digits than it needs.
    """
    key = role_key(name)
    if key is not None:
        return key.hex()
    return name.lower() if re.fullmatch(rf"[0-9a-fA-F]{{{HANDLE_DIGITS},64}}", name) else None
