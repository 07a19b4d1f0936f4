"""What protects notifications: every role that may connect to the database hears all of them, and may send any.

The secret of the log, in `catbus.head.notification_secret`, is readable for the owner of the schema alone. From it come

- the MAC by which a notification is known to come from `catbus.notify`, HMAC-SHA256 over its channel and its text,
- the key by which one replica encrypts what it sends on one channel, AES-256-GCM. Each replica derives a key of its own
  from 16 random bytes and counts its nonces, so no nonce is ever used twice with one key,
- the mask under which `catbus.note_role_changes` names a role.
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
"""The channel of notifications that tell of the log."""
EPHEMERAL_CHANNEL = "catbus_ephemeral"
"""The channel of the ephemeral relay."""
ROLES_CHANNEL = "catbus_roles"
"""The channel on which the triggers of the roles notify."""

OVERHEAD = 16 + 8 + 16
"""Bytes of an encrypted text beside the text: the incarnation, its number, the tag."""
_HEADER = 32
"""Characters of base64 in which incarnation and number stand."""
_MAC = 44
_LONGEST = 7999
"""Bytes that a notification can have."""


class ForgedNotificationError(ValueError):
    """A notification that no replica of this log has sent, or one that was sent before."""


class TokenHeader(NamedTuple):
    """Which replica encrypted a text, and its number among those of that replica."""

    incarnation: bytes
    number: int


class NotificationKeys:
    """The secret of a log, and what is derived from it."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._key = sha256(self._secret).digest()

    # Notifications that SQL sends

    def sign(self, channel: str, shown: str, enclosed: str = "") -> str:
        """The notification that `catbus.notify` sends for these: `shown` is a word."""
        return " ".join([shown, self._mac(channel, shown, enclosed), enclosed]).rstrip(" ")

    def verify(self, channel: str, payload: str) -> tuple[str, str]:
        """What is shown and what is enclosed in a notification of `catbus.notify`. Raises `ForgedError`."""
        shown, _, rest = payload.partition(" ")
        mac, _, enclosed = rest.partition(" ")
        if len(mac) != _MAC or len(payload) > _LONGEST:
            raise ForgedNotificationError("a notification without a MAC")
        if not hmac.compare_digest(mac.encode(), self._mac(channel, shown, enclosed).encode()):
            raise ForgedNotificationError("the MAC is not the log's")
        return shown, enclosed

    def read_role(self, shown: str) -> bytes:
        """The key of the role that a verified notification shows."""
        raw = bytes.fromhex(shown)
        mask = hmac.digest(self._key, f"mask of {ROLES_CHANNEL} {raw[:16].hex()}".encode(), "sha256")
        return bytes(a ^ b for a, b in zip(raw[16:], mask, strict=True))

    def _mac(self, channel: str, shown: str, enclosed: str) -> str:
        text = f"{channel} {shown} {enclosed}".encode(errors="surrogatepass")
        return b64encode(hmac.digest(self._key, text, "sha256")).decode()

    # What replicas encrypt

    def decrypt(self, channel: str, token: str, bound: str = "") -> bytes:
        """The text that a `Sealer` has encrypted, bound to the same. Raises `ForgedError`."""
        stamp = read_token_header(token)
        try:
            sealed = b64decode(token[_HEADER:], validate=True)
            return self.cipher(channel, stamp.incarnation).decrypt(_nonce(stamp.number), sealed, bound.encode())
        except (ValueError, InvalidTag):
            raise ForgedNotificationError("not encrypted with the secret of the log") from None

    def cipher(self, channel: str, incarnation: bytes) -> AESGCM:
        """The cipher of one replica on one channel. HKDF-SHA256 (RFC 5869) derives its key: one block of output."""
        extracted = hmac.digest(incarnation, self._secret, "sha256")
        return AESGCM(hmac.digest(extracted, f"{channel}\x01".encode(), "sha256"))


class NotificationEncrypter:
    """Encrypts what one replica sends on one channel."""

    def __init__(self, channel: str) -> None:
        self.incarnation = secrets.token_bytes(16)
        self._channel = channel
        self._numbers = count(1)

    def encrypt(self, seal: NotificationKeys, text: bytes, bound: str = "") -> str:
        """The text as base64, with what is needed to decrypt it."""
        number = next(self._numbers)
        sealed = seal.cipher(self._channel, self.incarnation).encrypt(_nonce(number), text, bound.encode())
        return b64encode(self.incarnation + number.to_bytes(8) + sealed).decode()


def read_token_header(token: str) -> TokenHeader:
    """What an encrypted text says of itself; true only if it can be decrypted. Raises `ForgedError`."""
    try:
        raw = b64decode(token[:_HEADER], validate=True)
    except ValueError:
        raise ForgedNotificationError("no encrypted text") from None
    if len(raw) != 24:
        raise ForgedNotificationError("no encrypted text")
    return TokenHeader(raw[:16], int.from_bytes(raw[16:]))


def random_keys() -> NotificationKeys:
    """The seal of no log: nothing is believed, and nobody can read what is encrypted."""
    return NotificationKeys(secrets.token_hex(32))


def _nonce(number: int) -> bytes:
    return number.to_bytes(12)
