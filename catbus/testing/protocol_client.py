"""A client that speaks the protocol over a blocking connection, and keeps what it received."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .blocking_connection import BlockingConnection
from .known_members import KnownMembers

Message = dict[str, Any]


class ProtocolClient(KnownMembers):
    """One client of the state machine, and what it has received since the last comparison.

    `ids` continue over all connections of a client, because a publish is identified by producer and id (section 9.1).
    """

    def __init__(self, connection: BlockingConnection, name: str, ids: Iterator[int], reply_timeout: float) -> None:
        super().__init__(name)
        self.connection = connection
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
        self.states: dict[str, dict[str, int]] = {}
        """By pattern of a subscription with a snapshot: the seqs of the retained messages that it shows, by channel."""
        self.incomplete: set[str] = set()
        """The patterns whose snapshot is not complete."""
        self.revoked: dict[str, list[Message]] = {}
        """By pattern of a revoked subscription: what it had received."""
        self.watching: set[str] = set()
        """The patterns whose last `subscribe` had `presence`."""
        self.left: set[str] = set()
        """Channels of memberships that the broker has ended."""
        self._ids = ids
        self._replies: list[Message] = []

    def send(self, message: Message, places: Iterable[int] = ()) -> None:
        """Send an object, split at these offsets."""
        if message["type"] == "subscribe":
            (self.watching.add if message.get("presence") else self.watching.discard)(message["pattern"])
        if message["type"] == "subscribe":
            pattern = message["pattern"]
            known = self.forget_state(pattern)
            if message.get("retained"):
                resumed = "since" in message
                self.states[pattern] = known if resumed else {}
                self.incomplete |= set() if resumed else {pattern}
        data = json.dumps(message).encode()
        ends = [min(place, len(data)) for place in places]
        for start, end in zip([0, *ends], [*ends, len(data)], strict=True):
            if start < end:
                self.connection.send(data[start:end])

    def forget_state(self, pattern: str) -> dict[str, int]:
        """Forget the state that a subscription shows, and return it."""
        self.incomplete.discard(pattern)
        return self.states.pop(pattern, {})

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

    def wait_snapshot(self, pattern: str) -> None:
        """Wait until the snapshot of a subscription is complete, which `retained` says."""
        while pattern in self.incomplete:
            self.wait(lambda reply: reply["type"] == "retained" and reply["pattern"] == pattern, "a snapshot")

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
            if found.get("retain") and pattern in self.states:
                retain(self.states[pattern], found)
        elif kind == "revoked":
            self.revoked[pattern] = self.received.pop(pattern)
            self.forget_state(pattern)
            self.forget_members(pattern)
        elif kind == "subscribed":
            self.received[found["pattern"]] = []
            self.forget_members(pattern)
            if pattern in self.watching:
                self.begin_members(pattern)
            self._replies.append(found)
        elif kind == "unsubscribed":
            self.received.pop(found["pattern"], None)
            self.forget_state(pattern)
            self.forget_members(pattern)
            self._replies.append(found)
        elif kind == "retained":
            assert pattern in self.incomplete, f"{self.name} received {found}, and asked for no snapshot"
            for message in found["messages"]:
                assert message["retain"] and "pattern" not in message, message
                retain(self.states[pattern], message)
            if found["complete"]:
                self.incomplete.discard(pattern)
            self._replies.append(found)
        elif kind == "members" and pattern:
            self.add_page(found)
        elif kind == "presence":
            self.apply_change(found)
        elif kind == "left" and "id" not in found:
            self.left.add(found["channel"])
        elif kind not in ("live", "head", "goaway"):
            self._replies.append(found)


def retain(state: dict[str, int], message: Message) -> None:
    """Apply a retained message to the state that a subscription shows: the seqs of channels."""
    if message["payload"] is None:
        state.pop(message["channel"], None)
    else:
        state[message["channel"]] = message["seq"]
