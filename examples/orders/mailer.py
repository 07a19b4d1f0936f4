"""A mail service: it receives webhooks, and verifies that they come from the broker."""

import base64
import hashlib
import hmac
import json
import time
from email.message import Message
from typing import Any

TOLERANCE = 300
"""Seconds that the clocks of sender and receiver may differ."""


def verify(secret: str, headers: Message, body: bytes) -> list[dict[str, Any]] | None:
    """The messages of a request that is signed as Standard Webhooks has it; None if it is not. `standardwebhooks` does
    the same."""
    number, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE:
        return None
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.digest(key, f"{number}.{timestamp}.".encode() + body, hashlib.sha256)
    expected = f"v1,{base64.b64encode(digest).decode()}".encode()
    given = headers.get("webhook-signature", "").encode().split()
    if not any(hmac.compare_digest(expected, signature) for signature in given):
        return None
    messages: list[dict[str, Any]] = json.loads(body)["data"].get("messages", [])
    return messages
