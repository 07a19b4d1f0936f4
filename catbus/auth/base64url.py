"""Base64url without padding (RFC 4648, section 5)."""

from __future__ import annotations

import binascii
from base64 import b64decode, urlsafe_b64encode


def encode_base64url(data: bytes) -> bytes:
    """Encode bytes, without padding."""
    return urlsafe_b64encode(data).rstrip(b"=")


def decode_base64url(text: bytes) -> bytes | None:
    """Decode a text that `encode_base64url` can have made; return None for any other text."""
    try:
        data = b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        return None
    return data if encode_base64url(data) == text else None
