"""A Hypothesis state machine that drives a broker over any connection and compares it with the reference model.

Several clients connect, subscribe, publish, get other grants, lose their connection, leave and resume, in random order.
After each step every client must have received exactly what the model expects.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar, cast

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from ..auth.grants import Grants
from ..auth.tokens import sign
from .blocking_connection import BlockingConnection
from .hostile_client import attack
from .protocol_client import Message, ProtocolClient
from .reference_model import ModelMessage, ModelSession, ReferenceModel, matches
from .strategies import cut, hostile_streams

CHANNELS = ("a", "a.b", "a.b.c", "ab", "b")
PATTERNS = ("*", "a", "a.*", "a.b", "a.b.*", "b", "b.*")
ALL = Grants(("*",), ("*",))

some_channels = st.sampled_from(CHANNELS)
some_patterns = st.sampled_from(PATTERNS)
some_grants = st.just(ALL) | st.builds(
    Grants,
    read=st.lists(some_patterns, max_size=3, unique=True).map(tuple),
    write=st.lists(some_patterns, max_size=3, unique=True).map(tuple),
)
cuts = st.lists(st.integers(0, 80), max_size=3).map(sorted)
some_pieces = hostile_streams().flatmap(cut)

F = TypeVar("F", bound=Callable[..., Any])


def recorded(step: F) -> F:
    """Record this step and its arguments in `steps`, so that `replay` can take it again."""

    @wraps(step)
    def wrapper(self: BrokerMachine, **arguments: Any) -> Any:
        self.steps.append((step.__name__, arguments))
        return step(self, **arguments)

    return cast(F, wrapper)


class BrokerMachine(RuleBasedStateMachine):
    """Drives a broker. Subclasses define `connect`, which opens a connection, and the `secret` that signs tokens.

    The broker may have any number of replicas, and `connect` may connect to any of them. No one else may publish while
    the machine runs; with a `root`, all channels are below it, and no one else may publish there. Override `token` if
    the secret is unknown. If `token` then returns the same grants for every request, set `varied_grants` to False.
    Hostile clients publish below `hostile_root`, which must be outside `root`; without one they publish nothing. Run
    the machine as `MyMachine.TestCase`, with unittest or pytest.
    """

    secret = ""
    root = ""
    varied_grants = True
    hostile_root = ""
    reply_timeout = 10.0
    """Seconds to wait for a reply."""
    delivery_timeout = 5.0
    """Seconds to wait for acknowledged messages, which may come through another replica."""

    def connect(self) -> BlockingConnection:
        """Open a connection without authenticating."""
        raise NotImplementedError

    def token(self, name: str, grants: Grants) -> str:
        """Return a token with these grants for the client id `name`."""
        return sign(self.secret, client_id=name, grants=grants)

    clients: Bundle[str] = Bundle("clients")
    absent: Bundle[str] = Bundle("absent")

    def __init__(self) -> None:
        super().__init__()
        self.model = ReferenceModel()
        self.steps: list[tuple[str, dict[str, Any]]] = []
        """The steps taken so far: names of methods and their arguments."""
        self._clients: dict[str, ProtocolClient] = {}
        self._sessions: dict[str, ModelSession] = {}
        self._absent: dict[str, ProtocolClient] = {}
        self._names = (f"client-{number}" for number in itertools.count(1))
        self._payloads = itertools.count(1)
        self._ids = itertools.count(1)
        self._producers = itertools.count(1)
        self._ephemeral: dict[int, tuple[str, str | None]] = {}
        """Published ephemeral messages: channel and sender, by payload."""

    def teardown(self) -> None:
        for client in self._clients.values():
            client.connection.close()

    def _below_root(self, name: str) -> str:
        """Return a channel or pattern below the root."""
        return f"{self.root}.{name}" if self.root else name

    # Connecting and disconnecting

    @initialize(target=clients)
    @recorded
    def connect_first_client(self) -> str:
        """Connect a client with all grants. From here on no one else publishes."""
        return self._open(next(self._names), ALL)

    @rule(target=clients, grants=some_grants)
    @recorded
    def connect_client(self, grants: Grants) -> str:
        return self._open(next(self._names), grants if self.varied_grants else ALL)

    @rule(name=consumes(clients), target=absent)
    @recorded
    def leave(self, name: str) -> str:
        client = self._absent[name] = self._clients.pop(name)
        client.connection.close()
        del self.model.sessions[name]
        return name

    @rule(name=consumes(absent), target=clients)
    @recorded
    def connect_client_again(self, name: str) -> str:
        """Connect again, and resume every subscription at its cursor."""
        self._reconnect(self._absent.pop(name))
        return name

    def _open(self, name: str, grants: Grants) -> str:
        client, grants = self._connect(name), self._grants_below_root(grants)
        client.authenticate(self.token(name, grants))
        if not self._sessions:
            self.model = ReferenceModel(client.head)
        session = ModelSession(client.client_id, grants, next(self._producers))
        self._sessions[name] = self.model.sessions[name] = session
        return name

    def _reconnect(self, lost: ProtocolClient) -> ProtocolClient:
        before = self._sessions[lost.name]
        client = self._connect(lost.name)
        client.authenticate(self.token(lost.name, before.grants), lost.producer)
        assert client.producer == lost.producer, "a reconnecting client keeps the producer that it sends"
        session = ModelSession(client.client_id, before.grants, before.producer)
        self._sessions[lost.name] = self.model.sessions[lost.name] = session
        for pattern, cursor in lost.cursors.items():
            self._subscribe(lost.name, pattern, cursor, ())
        return client

    def _connect(self, name: str) -> ProtocolClient:
        client = self._clients[name] = ProtocolClient(self.connect(), name, self._ids, self.reply_timeout)
        return client

    def _grants_below_root(self, grants: Grants) -> Grants:
        return Grants(tuple(map(self._below_root, grants.read)), tuple(map(self._below_root, grants.write)))

    # Subscribing

    @rule(name=clients, pattern=some_patterns, places=cuts)
    @recorded
    def subscribe(self, name: str, pattern: str, places: list[int]) -> None:
        self._subscribe(name, self._below_root(pattern), None, places)

    @rule(name=clients, pattern=some_patterns, back=st.integers(0, 10))
    @recorded
    def subscribe_since(self, name: str, pattern: str, back: int) -> None:
        self._subscribe(name, self._below_root(pattern), max(self.model.base, self.model.head - back), ())

    def _subscribe(self, name: str, pattern: str, since: int | None, places: Iterable[int]) -> None:
        client = self._clients[name]
        request: Message = {"type": "subscribe", "pattern": pattern}
        if since is not None:
            request |= {"since": since, "epoch": client.epoch}
        reply = client.request(request, places)
        if self.model.subscribe(name, pattern, since):
            assert reply["type"] == "subscribed", reply
            if since is None:
                # A lagging replica replies with its own position, and delivers from there.
                assert self.root or reply["seq"] <= self.model.head, f"{reply}, and the head is {self.model.head}"
                self.model.subscribe(name, pattern, reply["seq"])
            client.cursors[pattern] = self.model.sessions[name].subscriptions[pattern].since
        else:
            assert (reply["type"], reply.get("code")) == ("subscribe_error", "unauthorized"), reply

    @rule(name=clients, pattern=some_patterns)
    @recorded
    def unsubscribe(self, name: str, pattern: str) -> None:
        client, pattern = self._clients[name], self._below_root(pattern)
        reply = client.request({"type": "unsubscribe", "pattern": pattern})
        if self.model.unsubscribe(name, pattern):
            assert reply["type"] == "unsubscribed", reply
            del client.cursors[pattern]
        else:
            assert (reply["type"], reply.get("code")) == ("subscribe_error", "invalid_pattern"), reply

    # Changing grants

    @precondition(lambda self: self.varied_grants)
    @rule(name=clients, grants=some_grants)
    @recorded
    def replace_grants(self, name: str, grants: Grants) -> None:
        """Authenticate again with a newer token. Subscriptions that it does not cover end."""
        self._replace_grants(name, self._grants_below_root(grants), lambda: None)

    @precondition(lambda self: self.varied_grants)
    @rule(name=clients, other=clients, grants=some_grants, channels=st.lists(some_channels, min_size=1, max_size=20))
    @recorded
    def replace_grants_while_publishing(self, name: str, other: str, grants: Grants, channels: list[str]) -> None:
        """The same while another client publishes. An ending subscription must have received everything before."""
        if name != other:
            requests = self._send_publishes(other, channels)
            self._replace_grants(name, self._grants_below_root(grants), lambda: self._wait_replies(other, requests))

    def _replace_grants(self, name: str, grants: Grants, meanwhile: Callable[[], None]) -> None:
        client = self._clients[name]
        client.authenticate(self.token(name, grants))
        meanwhile()
        client.ping()
        expected = {pattern: self.model.expected(name, pattern, cursor) for pattern, cursor in client.cursors.items()}
        ended = self.model.replace_grants(name, grants)
        revoked, client.revoked = client.revoked, {}
        assert revoked.keys() == ended, f"{set(revoked)} was revoked, and {ended} should have been"
        for pattern, received in revoked.items():
            compare(received, expected[pattern])
            del client.cursors[pattern]

    # Publishing, and requesting history

    @rule(name=clients, channel=some_channels, echo=st.booleans(), places=cuts)
    @recorded
    def publish(self, name: str, channel: str, echo: bool, places: list[int]) -> None:
        payload = {"n": next(self._payloads), "text": '"}{\\'}
        request = {"type": "publish", "channel": self._below_root(channel), "payload": payload}
        reply = self._clients[name].request(request | ({} if echo else {"echo": False}), places)
        self._check_published(name, request, reply, echo=echo)

    @rule(name=clients, channels=st.lists(some_channels, min_size=2, max_size=20))
    @recorded
    def publish_many(self, name: str, channels: list[str]) -> None:
        """Publish several messages without waiting for replies in between."""
        self._wait_replies(name, self._send_publishes(name, channels))

    @rule(name=clients, channels=st.lists(some_channels, min_size=1, max_size=10), end=st.integers(0, 900))
    @recorded
    def abort_connection_while_publishing(self, name: str, channels: list[str], end: int) -> None:
        """Close the connection in the middle of publishing, then retry. Nothing may be missing or repeated."""
        client, head = self._clients[name], self.model.head
        requests = self._publishes(name, channels)
        client.connection.send(b"".join(json.dumps(request).encode() for request in requests)[:end])
        client.connection.close()
        again = self._reconnect(client)
        for request in requests:
            again.send({**request, "retry": True, "after": head, "epoch": client.epoch})
        self._wait_replies(name, requests)

    def _publishes(self, name: str, channels: Iterable[str]) -> list[Message]:
        """Return publish requests with ids, for those channels that the client may publish to."""
        client, session = self._clients[name], self.model.sessions[name]
        return [
            client.with_id({"type": "publish", "channel": channel, "payload": next(self._payloads)})
            for channel in map(self._below_root, channels)
            if session.may_write(channel)
        ]

    def _send_publishes(self, name: str, channels: Iterable[str]) -> list[Message]:
        requests = self._publishes(name, channels)
        for request in requests:
            self._clients[name].send(request)
        return requests

    def _wait_replies(self, name: str, requests: Iterable[Message]) -> None:
        """Wait for the replies. The seqs must be in the order of the requests."""
        for request in requests:
            self._check_published(name, request, self._clients[name].wait_reply(request))

    def _check_published(self, name: str, request: Message, reply: Message, *, echo: bool = True) -> None:
        channel, payload, head = request["channel"], request["payload"], self.model.head
        seq = reply.get("seq") if self.root else None
        wanted = self.model.publish(name, channel, payload, echo=echo, seq=seq)
        if wanted is None:
            assert (reply["type"], reply.get("code")) == ("publish_error", "unauthorized"), reply
        else:
            assert (reply["type"], reply.get("seq")) == ("published", wanted), f"{reply}, and it should be {wanted}"
            assert wanted > head, f"{reply}, after {head} was acknowledged"

    @rule(name=clients, channel=some_channels)
    @recorded
    def publish_ephemeral(self, name: str, channel: str) -> None:
        """Publish an ephemeral message. Sessions receive it at most once, and may miss it."""
        channel, payload, session = self._below_root(channel), next(self._payloads), self.model.sessions[name]
        self._ephemeral[payload] = channel, session.client_id
        reply = self._clients[name].request(
            {"type": "publish", "channel": channel, "payload": payload, "ephemeral": True}
        )
        if session.may_write(channel):
            assert (reply["type"], "seq" in reply) == ("published", False), reply
        else:
            del self._ephemeral[payload]
            assert (reply["type"], reply.get("code")) == ("publish_error", "unauthorized"), reply

    @rule(name=clients, pattern=some_patterns, limit=st.integers(1, 5))
    @recorded
    def history(self, name: str, pattern: str, limit: int) -> None:
        client, pattern = self._clients[name], self._below_root(pattern)
        deadline = time.monotonic() + self.delivery_timeout
        while True:
            reply = client.request({"type": "history", "pattern": pattern, "limit": limit})
            wanted = self.model.history(name, pattern, limit)
            if wanted is None:
                assert (reply["type"], reply.get("code")) == ("error", "unauthorized"), reply
                return
            assert reply["type"] == "history", reply
            # Messages from before the machine started may precede its own.
            found = [each for each in reply["messages"] if each["seq"] > self.model.base]
            if _identities(found) == _identities(wanted):
                return
            assert time.monotonic() < deadline, f"history of {pattern} is {found}, and it should be {wanted}"

    # Hostile clients

    @rule(pieces=some_pieces)
    @recorded
    def attack_anonymously(self, pieces: list[bytes]) -> None:
        """Send invalid input without authenticating. It must not affect other clients."""
        attack(self.connect(), pieces, self.reply_timeout)

    @precondition(lambda self: self.varied_grants)
    @rule(pieces=some_pieces)
    @recorded
    def attack_authenticated(self, pieces: list[bytes]) -> None:
        """Send invalid input after authenticating. Its messages must not reach the other clients' channels."""
        write: tuple[str, ...] = ()
        if self.hostile_root:
            write = (f"{self.hostile_root}.*",)
            there = f'"channel":"{self.hostile_root}.'.encode()
            pieces = [piece.replace(b'"channel":"', there) for piece in pieces]
        token = self.token("hostile", Grants(read=(self._below_root("*"),), write=write))
        attack(self.connect(), pieces, self.reply_timeout, token=token)

    # What must hold after each step

    @invariant()
    def every_client_has_its_messages(self) -> None:
        for name, client in self._clients.items():
            deadline = time.monotonic() + self.delivery_timeout
            client.ping()
            for pattern, cursor in client.cursors.items():
                wanted = self.model.expected(name, pattern, cursor)
                while not compare(client.received[pattern], wanted) and time.monotonic() < deadline:
                    client.ping()
                received = client.received[pattern]
                assert compare(received, wanted), (
                    f"{name} received {received} for {pattern} after {cursor}, expected {wanted}"
                )
                client.received[pattern] = []
                client.cursors[pattern] = self.model.head
            for message in client.ephemeral:
                self._check_ephemeral(name, message)
            client.ephemeral = []

    def _check_ephemeral(self, name: str, message: Message) -> None:
        pattern, payload = message["pattern"], message["payload"]
        found = message["channel"], message.get("sender")
        assert self._ephemeral.get(payload) == found, f"{name} received {message}, which no client has published"
        assert matches(pattern, message["channel"]), f"{name} got {message}"
        ephemeral_received = self._clients[name].ephemeral_received
        assert (pattern, payload) not in ephemeral_received, f"{name} got {message} twice"
        ephemeral_received.add((pattern, payload))


def _identities(messages: Iterable[Message] | Iterable[ModelMessage]) -> list[tuple[Any, ...]]:
    """Return what must be equal in received and expected messages."""
    return [
        (each.seq, each.channel, each.payload, each.sender)
        if isinstance(each, ModelMessage)
        else (each["seq"], each["channel"], each["payload"], each.get("sender"))
        for each in messages
    ]


def compare(received: list[Message], wanted: list[ModelMessage]) -> bool:
    """Return whether all expected messages were received. Raises `AssertionError` if what came is no prefix of them."""
    found, expected = _identities(received), _identities(wanted)
    assert found == expected[: len(found)], f"received {found}, expected {expected}"
    return len(found) == len(expected)
