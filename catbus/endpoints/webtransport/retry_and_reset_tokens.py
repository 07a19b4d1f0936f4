"""The Retry tokens and the stateless reset tokens of a QUIC server, which it recognizes without storing them.

Both are derived from the secret that the replicas share, so each replica accepts the tokens of the others.
"""

from __future__ import annotations

import hashlib
import hmac
import os

RETRY_TOKEN_LIFETIME = 10.0
"""Seconds for which a Retry token is valid, and by which the clocks of replicas may differ."""

_TIME = 8
_MAC = 16


class StatelessTokens:
    """Makes and verifies the tokens. Without a secret, the tokens are valid in this process only."""

    def __init__(self, secret: str | None) -> None:
        root = secret.encode() if secret else os.urandom(32)
        self._retry_key = _mac(root, b"catbus quic retry")
        self._reset_key = _mac(root, b"catbus quic stateless reset")

    def reset_token(self, connection_id: bytes) -> bytes:
        """Return the 16 bytes that reset the connection with this ID (RFC 9000, section 10.3.2)."""
        return _mac(self._reset_key, connection_id)[:_MAC]

    def retry_token(self, address: tuple[str, int], original: bytes, retry_source: bytes, now: float) -> bytes:
        """Make a token for a client at `address` that chose the ID `original` and must now use `retry_source`."""
        issued = int(now * 1000).to_bytes(_TIME, "big")
        return issued + self._sign(address, original, retry_source, issued) + original

    def read_retry_token(self, token: bytes, address: tuple[str, int], retry_source: bytes, now: float) -> bytes | None:
        """Return the `original` of a valid token that this client got, or None for any other token."""
        issued, mac, original = token[:_TIME], token[_TIME : _TIME + _MAC], token[_TIME + _MAC :]
        if len(mac) < _MAC or not hmac.compare_digest(mac, self._sign(address, original, retry_source, issued)):
            return None
        return original if abs(now - int.from_bytes(issued, "big") / 1000) <= RETRY_TOKEN_LIFETIME else None

    def _sign(self, address: tuple[str, int], original: bytes, retry_source: bytes, issued: bytes) -> bytes:
        text = f"{address[0]} {address[1]}".encode()
        parts = b"".join(bytes([len(part)]) + part for part in (text, retry_source, issued))
        return _mac(self._retry_key, parts + original)[:_MAC]


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, hashlib.sha256)
