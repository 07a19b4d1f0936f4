"""The request of a delivery: its body, and the headers of Standard Webhooks 1.0. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from ..version import version

SECRET_PREFIX = "whsec_"
MESSAGES, TEST = "catbus.messages", "catbus.test"
"""The types of events: messages of a consumer, and a test."""

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class DeliveredMessage:
    """A message in a batch. `payload` is its JSON text, `at` is in milliseconds since 1970."""

    seq: int
    channel: str
    payload: str
    at: int
    sender: str | None


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request to be sent. `id` is the idempotency key: another attempt has the same one, and the same body."""

    id: str
    url: str
    body: bytes
    secrets: Sequence[str] = field(repr=False)

    def headers(self, now: float) -> dict[str, str]:
        """The headers for an attempt at the time `now`, in seconds since 1970."""
        timestamp = int(now)
        signatures = [sign(secret, self.id, timestamp, self.body) for secret in self.secrets]
        return {
            "Content-Type": "application/json",
            "User-Agent": f"Catbus/{version()}",
            "webhook-id": self.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join(signatures),
        }


def encode_messages(consumer: str, partition: int, made: datetime, messages: Sequence[DeliveredMessage]) -> bytes:
    """The body of a batch. `made` is when the batch was made, which is before its first attempt."""
    listed = [_encode_message(message) for message in messages]
    return _encode_event(MESSAGES, made, {"consumer": consumer, "partition": partition, "messages": listed})


def encode_test(consumer: str, now: datetime) -> bytes:
    """The body of a test."""
    return _encode_event(TEST, now, {"consumer": consumer})


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:  # noqa: A002
    """The signature of a request: Standard Webhooks, "Signature scheme"."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    digest = hmac.digest(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def _encode_message(message: DeliveredMessage) -> dict[str, Any]:
    found: dict[str, Any] = {
        "seq": message.seq,
        "channel": message.channel,
        "payload": msgspec.Raw(message.payload.encode()),
        "at": message.at,
    }
    return found if message.sender is None else {**found, "sender": message.sender}


def _encode_event(kind: str, time: datetime, data: Mapping[str, Any]) -> bytes:
    timestamp = time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return _encoder.encode({"type": kind, "timestamp": timestamp, "data": data})
