"""A client of the first version of the protocol over a blocking connection."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from .blocking_connection import BlockingConnection
from .protocol_client import Message

FIELDS = {
    "auth_ok": {"client_id"},
    "auth_error": {"message"},
    "subscribed": {"pattern"},
    "unsubscribed": {"pattern"},
    "subscribe_error": {"pattern", "message"},
    "published": {"channel"},
    "publish_error": {"channel", "message"},
    "message": {"channel", "payload"},
    "pong": {"seq"},
    "error": {"message"},
}
"""The messages of the first version, and all their fields besides `type` (section 7)."""


class FirstVersionClient:
    """One such client of the state machine, and what it has received since the last comparison."""

    def __init__(self, connection: BlockingConnection, name: str, ids: Iterator[int], reply_timeout: float) -> None:
        self.connection = connection
        self.name = name
        self.client_id: str | None = None
        self.received: list[Message] = []
        self.withdrawn: set[str] = set()
        """Patterns of subscriptions that the broker has ended."""
        self.compared = 0
        """The seq up to which received and expected messages were compared."""
        self.begun = 0
        """The head at the last subscribe. A lagging replica may deliver messages up to here."""
        self.seen: list[tuple[str, Any]] = []
        """All messages of the log that it has received: channel and payload."""
        self.ephemeral_received: set[Any] = set()
        self._ids = ids
        self._reply_timeout = reply_timeout

    def send(self, message: Message) -> None:
        """Send an object in a piece of its own, as these clients do."""
        self.connection.send(json.dumps(message).encode())

    def request(self, message: Message, *kinds: str) -> Message:
        """Send a request, and return the next reply of one of these types. Replies have no ids."""
        self.send(message)
        return self._wait(lambda reply: reply["type"] in kinds, message)

    def authenticate(self, token: str) -> None:
        reply = self.request({"type": "auth", "token": token}, "auth_ok", "auth_error")
        assert reply["type"] == "auth_ok", reply
        self.client_id = reply["client_id"]

    def ping(self) -> None:
        """Wait for everything that the broker sent before now."""
        number = next(self._ids)
        self.send({"type": "ping", "seq": number})
        self._wait(lambda reply: (reply["type"], reply.get("seq")) == ("pong", number), "a ping")

    def take(self) -> list[Message]:
        """Return what was received since the last call."""
        received, self.received = self.received, []
        return received

    def _wait(self, wanted: Callable[[Message], bool], what: object) -> Message:
        deadline = time.monotonic() + self._reply_timeout
        while True:
            try:
                found = self.connection.receive(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise AssertionError(f"{self.name} waits for a reply to {what}") from None
            assert found is not None, f"the broker closed {self.name}'s connection, which waited for a reply to {what}"
            kind = found["type"]
            assert FIELDS.get(kind) == found.keys() - {"type"}, f"{found} is not of the first version"
            if wanted(found):
                return found
            if kind == "message":
                self.received.append(found)
            else:
                assert kind == "subscribe_error", f"{self.name} received {found}, which it did not request"
                self.withdrawn.add(found["pattern"])
