"""The protection of notifications: every role that may connect to the database hears all of them, and may send any.

Only the owner of the schema can read the secret of the log, `catbus.head.notification_secret`. It is the source of

- the MAC of notifications that `catbus.notify` sends: HMAC-SHA256 over the channel and the text,
- the keys with which replicas encrypt: AES-256-GCM, one key for each replica and channel. Each replica derives its key
  from 16 random bytes and counts its nonces, so no nonce is used twice with one key,
- the mask of role keys in notifications of `catbus.note_role_changes`.
"""

from __future__ import annotations

import hmac
import secrets
from base64 import b64decode, b64encode
from hashlib import sha256
from itertools import count
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

LOG_CHANNEL = "catbus"
"""The channel of notifications of the log."""
EPHEMERAL_CHANNEL = "catbus_ephemeral"
"""The channel of the ephemeral relay."""
ROLES_CHANNEL = "catbus_roles"
"""The channel of notifications of role changes."""
PRESENCE_CHANNEL = "catbus_presence"
"""The channel of notifications of changed memberships."""

ENCRYPTION_OVERHEAD = 16 + 8 + 16
"""Bytes that encryption adds to a text: the incarnation, the number, the tag."""
_HEADER_LENGTH = 32
"""Characters of base64 that hold the incarnation and the number."""
_MAC_LENGTH = 44
_MAX_NOTIFICATION = 7999
"""Bytes that a notification can have."""


class ForgedNotificationError(ValueError):
    """A notification that no replica of this log has sent, or a repeated one."""


class TokenHeader(NamedTuple):
    """The replica that encrypted a text, and the number of the text among those of that replica."""

    incarnation: bytes
    number: int


class NotificationKeys:
    """The secret of a log, and the keys derived from it."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._key = sha256(self._secret).digest()

    # Notifications that SQL sends

    def sign(self, channel: str, shown: str, enclosed: str = "") -> str:
        """The notification that `catbus.notify` sends. `shown` contains no space."""
        return " ".join([shown, self._mac(channel, shown, enclosed), enclosed]).rstrip(" ")

    def verify(self, channel: str, payload: str) -> tuple[str, str]:
        """The shown and the enclosed text of a notification of `catbus.notify`. Raises `ForgedNotificationError`."""
        shown, _, rest = payload.partition(" ")
        mac, _, enclosed = rest.partition(" ")
        if len(mac) != _MAC_LENGTH or len(payload) > _MAX_NOTIFICATION:
            raise ForgedNotificationError("a notification without a MAC")
        if not hmac.compare_digest(mac.encode(), self._mac(channel, shown, enclosed).encode()):
            raise ForgedNotificationError("the MAC is not that of the log")
        return shown, enclosed

    def unmask_role(self, shown: str) -> bytes:
        """The role key in a verified notification."""
        raw = bytes.fromhex(shown)
        mask = hmac.digest(self._key, f"mask of {ROLES_CHANNEL} {raw[:16].hex()}".encode(), "sha256")
        return bytes(a ^ b for a, b in zip(raw[16:], mask, strict=True))

    def _mac(self, channel: str, shown: str, enclosed: str) -> str:
        text = f"{channel} {shown} {enclosed}".encode(errors="surrogatepass")
        return b64encode(hmac.digest(self._key, text, "sha256")).decode()

    # Text that replicas encrypt

    def decrypt(self, channel: str, token: str, bound: str = "") -> bytes:
        """Decrypt a token of a `NotificationEncrypter`, with the same `bound`. Raises `ForgedNotificationError`."""
        header = read_token_header(token)
        try:
            ciphertext = b64decode(token[_HEADER_LENGTH:], validate=True)
            return self.cipher(channel, header.incarnation).decrypt(_nonce(header.number), ciphertext, bound.encode())
        except (ValueError, InvalidTag):
            raise ForgedNotificationError("not encrypted with the secret of the log") from None

    def cipher(self, channel: str, incarnation: bytes) -> AESGCM:
        """The cipher of one replica on one channel. HKDF-SHA256 (RFC 5869) derives its key: one block of output."""
        extracted = hmac.digest(incarnation, self._secret, "sha256")
        return AESGCM(hmac.digest(extracted, f"{channel}\x01".encode(), "sha256"))


class NotificationEncrypter:
    """Encrypts the texts of one replica on one channel."""

    def __init__(self, channel: str) -> None:
        self.incarnation = secrets.token_bytes(16)
        self._channel = channel
        self._numbers = count(1)

    def encrypt(self, keys: NotificationKeys, text: bytes, bound: str = "") -> str:
        """The token for a text, in base64. It can be decrypted with the same `bound` only."""
        number = next(self._numbers)
        ciphertext = keys.cipher(self._channel, self.incarnation).encrypt(_nonce(number), text, bound.encode())
        return b64encode(self.incarnation + number.to_bytes(8) + ciphertext).decode()


def read_token_header(token: str) -> TokenHeader:
    """The header of a token. It is authentic only if the token can be decrypted. Raises `ForgedNotificationError`."""
    try:
        raw = b64decode(token[:_HEADER_LENGTH], validate=True)
    except ValueError:
        raise ForgedNotificationError("no encrypted text") from None
    if len(raw) != 24:
        raise ForgedNotificationError("no encrypted text")
    return TokenHeader(raw[:16], int.from_bytes(raw[16:]))


def random_keys() -> NotificationKeys:
    """The keys of no log: they verify nothing, and nobody can decrypt what they encrypt."""
    return NotificationKeys(secrets.token_hex(32))


def _nonce(number: int) -> bytes:
    return number.to_bytes(12)
