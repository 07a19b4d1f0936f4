"""A client that speaks the protocol over a blocking connection, and keeps what it received."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .blocking_connection import BlockingConnection

Message = dict[str, Any]


class ProtocolClient:
    """One client of the state machine, and what it has received since the last comparison.

    `ids` continue over all connections of a client, because a publish is identified by producer and id (section 9.1).
    """

    def __init__(self, connection: BlockingConnection, name: str, ids: Iterator[int], reply_timeout: float) -> None:
        self.connection = connection
        self.name = name
        self.reply_timeout = reply_timeout
        self.client_id: str | None = None
        self.producer = ""
        self.head = 0
        self.epoch = ""
        self.cursors: dict[str, int] = {}
        """By pattern: the seq up to which received and expected messages were compared."""
        self.received: dict[str, list[Message]] = {}
        self.ephemeral: list[Message] = []
        self.ephemeral_received: dict[str, set[Any]] = {}
        """By pattern: payloads of received ephemeral messages."""
        self.datagram_patterns: set[str] = set()
        """Patterns that were subscribed to with datagrams."""
        self.revoked: dict[str, list[Message]] = {}
        """By pattern of a revoked subscription: what it had received."""
        self._ids = ids
        self._replies: list[Message] = []

    def send(self, message: Message, places: Iterable[int] = ()) -> None:
        """Send an object, split at these offsets."""
        data = json.dumps(message).encode()
        ends = [min(place, len(data)) for place in places]
        for start, end in zip([0, *ends], [*ends, len(data)], strict=True):
            if start < end:
                self.connection.send(data[start:end])

    def with_id(self, message: Message) -> Message:
        return {**message, "id": next(self._ids)}

    def request(self, message: Message, places: Iterable[int] = ()) -> Message:
        """Send a request with a new id, and return its reply."""
        request = self.with_id(message)
        self.send(request, places)
        return self.wait_reply(request)

    def wait_reply(self, request: Message) -> Message:
        return self.wait(lambda reply: reply.get("id") == request["id"], f"an answer to {request}")

    def authenticate(self, token: str, producer: str | None = None) -> None:
        message = {"type": "auth", "token": token, "protocol": 1}
        self.send(message | ({"producer": producer} if producer else {}))
        reply = self.wait(lambda reply: reply["type"] in ("auth_ok", "auth_error"), "an answer to auth")
        assert reply["type"] == "auth_ok", reply
        self.client_id, self.producer = reply["client_id"], reply["producer"]
        self.head, self.epoch = reply["head"], reply["epoch"]

    def ping(self) -> None:
        """Wait for everything that the broker sent before now."""
        number = next(self._ids)
        self.send({"type": "ping", "seq": number})
        self.wait(lambda reply: (reply["type"], reply.get("seq")) == ("pong", number), "a pong")

    def wait_closed(self) -> int | None:
        """Wait until the broker closes the connection, and return its code."""
        deadline = time.monotonic() + self.reply_timeout
        try:
            while self.connection.receive(max(0.0, deadline - time.monotonic())) is not None:
                pass
        except TimeoutError:
            raise AssertionError(f"the broker does not close {self.name}'s connection") from None
        return self.connection.code

    def wait(self, wanted: Callable[[Message], bool], what: str) -> Message:
        deadline = time.monotonic() + self.reply_timeout
        while True:
            for reply in self._replies:
                if wanted(reply):
                    self._replies.remove(reply)
                    return reply
            try:
                found = self.connection.receive(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise AssertionError(f"{self.name} waits for {what}, and received only {self._replies}") from None
            assert found is not None, f"the broker closed {self.name}'s connection, which waited for {what}"
            self._handle(found)

    def _handle(self, found: Message) -> None:
        kind, pattern = found["type"], found.get("pattern", "")
        if kind in ("message", "revoked"):
            # A datagram may arrive before `subscribed`, and after the last line of its subscription.
            stray = pattern in self.datagram_patterns and kind == "message" and "seq" not in found
            assert pattern in self.received or stray, f"{self.name} received {found} without a subscription"
        if kind == "message":
            (self.received[pattern] if "seq" in found else self.ephemeral).append(found)
        elif kind == "revoked":
            self.revoked[pattern] = self.received.pop(pattern)
        elif kind == "subscribed":
            self.received[found["pattern"]] = []
            self._replies.append(found)
        elif kind == "unsubscribed":
            self.received.pop(found["pattern"], None)
            self._replies.append(found)
        elif kind not in ("live", "head", "goaway"):
            self._replies.append(found)
