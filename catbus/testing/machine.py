"""A state machine for Hypothesis that drives a broker through any connections, and compares it with the model.

Several clients come, subscribe, publish, are allowed more or less, leave and go on where they were, in any order; after
each step every one of them has exactly what the model says.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from ..auth import Grants, sign
from .model import Entry, Model, Session

PATIENCE = 10.0
"""Seconds for an answer."""
SETTLING = 5.0
"""Seconds for messages to arrive that have been acknowledged: through another replica, say."""

CHANNELS = ("a", "a.b", "a.b.c", "ab", "b")
PATTERNS = ("*", "a", "a.*", "a.b", "a.b.*", "b", "b.*")

some_patterns = st.lists(st.sampled_from(PATTERNS), max_size=3, unique=True).map(tuple)
some_grants = st.just(Grants(("*",), ("*",))) | st.builds(Grants, read=some_patterns, write=some_patterns)
cuts = st.lists(st.integers(0, 80), max_size=3).map(sorted)


class Connection(Protocol):
    """A connection to a broker, whatever carries it. The methods block."""

    def send(self, data: bytes) -> None:
        """Send bytes, which are not whole objects, as one piece."""

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next object; None when the broker has closed the connection. Raises `TimeoutError`."""

    def close(self) -> None:
        """Close it."""


class Client:
    """One client's end: what it was told, and what its subscriptions got since somebody looked.

    `ids` go on over all connections of a client: a publish is known by its producer and its id (section 9.1).
    """

    def __init__(self, connection: Connection, name: str, ids: Iterator[int]) -> None:
        self.connection = connection
        self.name = name
        self.producer = ""
        self.head = 0
        self.epoch = ""
        self.cursors: dict[str, int] = {}
        """By pattern: up to where everything has been compared."""
        self.got: dict[str, list[dict[str, Any]]] = {}
        self.revoked: set[str] = set()
        self._ids = ids
        self._replies: list[dict[str, Any]] = []

    def say(self, message: dict[str, Any], places: Iterable[int] = ()) -> None:
        """Send an object, cut at these places."""
        data = json.dumps(message).encode()
        ends = [min(place, len(data)) for place in places]
        for start, end in zip([0, *ends], [*ends, len(data)], strict=True):
            if start < end:
                self.connection.send(data[start:end])

    def ask(self, message: dict[str, Any], places: Iterable[int] = ()) -> dict[str, Any]:
        """Send a request, and return the answer to it."""
        number = next(self._ids)
        self.say({**message, "id": number}, places)
        return self.wait(lambda reply: reply.get("id") == number, f"an answer to {message}")

    def authenticate(self, token: str, producer: str | None = None) -> dict[str, Any]:
        message = {"type": "auth", "token": token, "protocol": 1}
        self.say(message | ({"producer": producer} if producer else {}))
        reply = self.wait(lambda reply: reply["type"] in ("auth_ok", "auth_error"), "an answer to auth")
        assert reply["type"] == "auth_ok", reply
        self.producer, self.head, self.epoch = reply["producer"], reply["head"], reply["epoch"]
        return reply

    def ping(self) -> None:
        """Hear all that was sent before now."""
        number = next(self._ids)
        self.say({"type": "ping", "seq": number})
        self.wait(lambda reply: (reply["type"], reply.get("seq")) == ("pong", number), "a pong")

    def wait(self, wanted: Any, what: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while True:
            for reply in self._replies:
                if wanted(reply):
                    self._replies.remove(reply)
                    return reply
            try:
                found = self.connection.receive(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise AssertionError(f"{self.name} waits for {what}, and heard only {self._replies}") from None
            assert found is not None, f"{self.name} was cut off while it waited for {what}"
            self._take(found)

    def _take(self, found: dict[str, Any]) -> None:
        kind, pattern = found["type"], found.get("pattern")
        if kind == "message":
            assert pattern in self.got, f"{self.name} got {found}, to which it does not subscribe"
            self.got[pattern].append(found)
        elif kind == "revoked":
            assert pattern in self.got, f"{self.name} got {found}, to which it does not subscribe"
            self.revoked.add(pattern)
            del self.got[pattern]
        elif kind == "subscribed":
            self.got[pattern or ""] = []
            self._replies.append(found)
        elif kind == "unsubscribed":
            self.got.pop(pattern or "", None)
            self._replies.append(found)
        elif kind not in ("live", "head"):
            self._replies.append(found)


class BrokerMachine(RuleBasedStateMachine):
    """Subclass it with `connect`, which opens a `Connection`, and the `secret` that tokens are signed with.

    The broker may have any number of replicas, and `connect` may lead to any of them; nobody else publishes meanwhile.
    `MyMachine.TestCase` is what unittest and pytest run.
    """

    secret: str

    def connect(self) -> Connection:
        raise NotImplementedError

    clients: Bundle[str] = Bundle("clients")
    absent: Bundle[tuple[str, str, dict[str, int]]] = Bundle("absent")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self._clients: dict[str, Client] = {}
        self._sessions: dict[str, Session] = {}
        self._names = (f"client-{number}" for number in itertools.count(1))
        self._payloads = itertools.count(1)
        self._ids = itertools.count(1)
        self._producers = itertools.count(1)

    def teardown(self) -> None:
        for client in self._clients.values():
            client.connection.close()

    # Coming and leaving

    @initialize(target=clients)
    def begin(self) -> str:
        """Somebody who may do everything; from here on the log is ours."""
        return self._open(next(self._names), Grants(("*",), ("*",)))

    @rule(target=clients, grants=some_grants)
    def come(self, grants: Grants) -> str:
        return self._open(next(self._names), grants)

    def _open(self, name: str, grants: Grants, producer: str | None = None, number: int | None = None) -> str:
        client = Client(self.connect(), name, self._ids)
        self._clients[name] = client
        client.authenticate(self._token(name, grants), producer)
        if not self._sessions:
            self.model = Model(client.head)
        assert producer is None or client.producer == producer, "who comes back has the producer that it showed"
        session = Session(name, grants, next(self._producers) if number is None else number)
        self._sessions[name] = self.model.sessions[name] = session
        return name

    def _token(self, name: str, grants: Grants) -> str:
        return sign(self.secret, client_id=name, grants=grants)

    @rule(name=consumes(clients), target=absent)
    def leave(self, name: str) -> tuple[str, str, dict[str, int]]:
        client = self._clients.pop(name)
        client.connection.close()
        del self.model.sessions[name]
        return name, client.producer, client.cursors

    @rule(gone=consumes(absent), target=clients)
    def come_back(self, gone: tuple[str, str, dict[str, int]]) -> str:
        """On another connection, from where every subscription was."""
        name, producer, cursors = gone
        before = self._sessions[name]
        self._open(name, before.grants, producer, before.producer)
        for pattern, cursor in cursors.items():
            self._subscribe(name, pattern, cursor, ())
        return name

    # Subscribing

    @rule(name=clients, pattern=st.sampled_from(PATTERNS), places=cuts)
    def subscribe(self, name: str, pattern: str, places: list[int]) -> None:
        self._subscribe(name, pattern, None, places)

    @rule(name=clients, pattern=st.sampled_from(PATTERNS), back=st.integers(0, 10))
    def subscribe_since(self, name: str, pattern: str, back: int) -> None:
        self._subscribe(name, pattern, max(self.model.base, self.model.head - back), ())

    def _subscribe(self, name: str, pattern: str, since: int | None, places: Iterable[int]) -> None:
        client = self._clients[name]
        request: dict[str, Any] = {"type": "subscribe", "pattern": pattern}
        if since is not None:
            request |= {"since": since, "epoch": client.epoch}
        reply = client.ask(request, places)
        if self.model.subscribe(name, pattern, since):
            assert reply["type"] == "subscribed", reply
            if since is None:
                # A replica may be behind; then it says so, and delivers from there.
                assert reply["seq"] <= self.model.head
                self.model.subscribe(name, pattern, reply["seq"])
            client.cursors[pattern] = self.model.sessions[name].subscriptions[pattern].since
        else:
            assert (reply["type"], reply.get("code")) == ("subscribe_error", "unauthorized"), reply

    @rule(name=clients, pattern=st.sampled_from(PATTERNS))
    def unsubscribe(self, name: str, pattern: str) -> None:
        client = self._clients[name]
        reply = client.ask({"type": "unsubscribe", "pattern": pattern})
        if self.model.unsubscribe(name, pattern):
            assert reply["type"] == "unsubscribed", reply
            del client.cursors[pattern]
        else:
            assert (reply["type"], reply.get("code")) == ("subscribe_error", "invalid_pattern"), reply

    @rule(name=clients, grants=some_grants)
    def regrant(self, name: str, grants: Grants) -> None:
        """A newer token, which allows something else: what it does not cover ends."""
        client = self._clients[name]
        client.authenticate(self._token(name, grants))
        client.ping()
        ended = self.model.regrant(name, grants)
        assert client.revoked == ended, f"{client.revoked} was revoked, and {ended} should have been"
        client.revoked = set()
        for pattern in ended:
            del client.cursors[pattern]

    # Publishing, and asking

    @rule(name=clients, channel=st.sampled_from(CHANNELS), echo=st.booleans(), places=cuts)
    def publish(self, name: str, channel: str, echo: bool, places: list[int]) -> None:
        payload = {"n": next(self._payloads), "text": '"}{\\'}
        reply = self._clients[name].ask(
            {"type": "publish", "channel": channel, "payload": payload} | ({} if echo else {"echo": False}), places
        )
        seq = self.model.publish(name, channel, payload, echo=echo)
        if seq is None:
            assert (reply["type"], reply.get("code")) == ("publish_error", "unauthorized"), reply
        else:
            assert (reply["type"], reply.get("seq")) == ("published", seq), f"{reply}, and it should be {seq}"

    @rule(name=clients, channels=st.lists(st.sampled_from(CHANNELS), min_size=2, max_size=20))
    def publish_many(self, name: str, channels: list[str]) -> None:
        """One after the other, without waiting for an answer in between."""
        client, session = self._clients[name], self.model.sessions[name]
        allowed = [channel for channel in channels if session.may_write(channel)]
        numbers = [next(self._payloads) for _ in allowed]
        for channel, number in zip(allowed, numbers, strict=True):
            client.say({"type": "publish", "channel": channel, "payload": number})
        for channel, number in zip(allowed, numbers, strict=True):
            seq = self.model.publish(name, channel, number)
            reply = client.wait(lambda reply: reply["type"] in ("published", "publish_error"), "an acknowledgement")
            assert reply.get("seq") == seq, f"{reply}, and it should be {seq}"

    @rule(name=clients, pattern=st.sampled_from(PATTERNS), limit=st.integers(1, 5))
    def history(self, name: str, pattern: str, limit: int) -> None:
        client = self._clients[name]
        wanted = self.model.history(name, pattern, limit)
        deadline = time.monotonic() + SETTLING
        while True:
            reply = client.ask({"type": "history", "pattern": pattern, "limit": limit})
            if wanted is None:
                assert (reply["type"], reply.get("code")) == ("error", "unauthorized"), reply
                return
            found = [message["seq"] for message in reply["messages"] if message["seq"] > self.model.base]
            if found == [entry.seq for entry in wanted]:
                return
            assert time.monotonic() < deadline, f"history of {pattern} is {found}, and it should be {wanted}"

    # What has to hold

    @invariant()
    def everyone_has_what_it_is_owed(self) -> None:
        for name, client in self._clients.items():
            deadline = time.monotonic() + SETTLING
            client.ping()
            for pattern, cursor in client.cursors.items():
                wanted = self.model.owed(name, pattern, cursor)
                while not _same(client.got[pattern], wanted) and time.monotonic() < deadline:
                    client.ping()
                got = client.got[pattern]
                assert _same(got, wanted), f"{name} got {got} for {pattern} after {cursor}, and is owed {wanted}"
                client.got[pattern] = []
                client.cursors[pattern] = self.model.head


def _same(got: list[dict[str, Any]], wanted: list[Entry]) -> bool:
    """Whether these are those messages. What is there already has to be their beginning."""
    found = [(each["seq"], each["channel"], each["payload"], each.get("sender")) for each in got]
    owed = [(each.seq, each.channel, each.payload, each.sender) for each in wanted]
    assert found == owed[: len(found)], f"got {found}, and {owed} is owed"
    return len(found) == len(owed)
