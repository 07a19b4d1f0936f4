"""A state machine for Hypothesis that drives a broker through any connections, and compares it with the model.

Several clients come, subscribe, publish, are allowed more or less, are cut off, leave and go on where they were, in any
order; after each step every one of them has exactly what the model says.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, TypeVar, cast

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from ..auth.tokens import Grants, sign
from .connections import Connection
from .hostile import attack
from .model import Entry, Model, Session, matches
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

Message = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])


def recorded(step: F) -> F:
    """Have the machine remember that it took this step, and with what: `replay` takes it again."""

    @wraps(step)
    def go(self: BrokerMachine, **arguments: Any) -> Any:
        self.steps.append((step.__name__, arguments))
        return step(self, **arguments)

    return cast(F, go)


class Client:
    """One client's end: what it was told, and what its subscriptions got since somebody looked.

    `ids` go on over all connections of a client: a publish is known by its producer and its id (section 9.1).
    """

    def __init__(self, connection: Connection, name: str, ids: Iterator[int], patience: float) -> None:
        self.connection = connection
        self.name = name
        self.patience = patience
        self.client_id: str | None = None
        self.producer = ""
        self.head = 0
        self.epoch = ""
        self.cursors: dict[str, int] = {}
        """By pattern: up to where everything has been compared."""
        self.got: dict[str, list[Message]] = {}
        self.ephemeral: list[Message] = []
        self.heard: set[tuple[str, int]] = set()
        """Ephemeral messages that came: pattern and payload."""
        self.revoked: dict[str, list[Message]] = {}
        """What had come by then."""
        self._ids = ids
        self._replies: list[Message] = []

    def say(self, message: Message, places: Iterable[int] = ()) -> None:
        """Send an object, cut at these places."""
        data = json.dumps(message).encode()
        ends = [min(place, len(data)) for place in places]
        for start, end in zip([0, *ends], [*ends, len(data)], strict=True):
            if start < end:
                self.connection.send(data[start:end])

    def numbered(self, message: Message) -> Message:
        return {**message, "id": next(self._ids)}

    def ask(self, message: Message, places: Iterable[int] = ()) -> Message:
        """Send a request, and return the answer to it."""
        request = self.numbered(message)
        self.say(request, places)
        return self.answer(request)

    def answer(self, request: Message) -> Message:
        return self.wait(lambda reply: reply.get("id") == request["id"], f"an answer to {request}")

    def authenticate(self, token: str, producer: str | None = None) -> None:
        message = {"type": "auth", "token": token, "protocol": 1}
        self.say(message | ({"producer": producer} if producer else {}))
        reply = self.wait(lambda reply: reply["type"] in ("auth_ok", "auth_error"), "an answer to auth")
        assert reply["type"] == "auth_ok", reply
        self.client_id, self.producer = reply["client_id"], reply["producer"]
        self.head, self.epoch = reply["head"], reply["epoch"]

    def ping(self) -> None:
        """Hear all that was sent before now."""
        number = next(self._ids)
        self.say({"type": "ping", "seq": number})
        self.wait(lambda reply: (reply["type"], reply.get("seq")) == ("pong", number), "a pong")

    def wait(self, wanted: Callable[[Message], bool], what: str) -> Message:
        deadline = time.monotonic() + self.patience
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

    def _take(self, found: Message) -> None:
        kind, pattern = found["type"], found.get("pattern", "")
        if kind in ("message", "revoked"):
            assert pattern in self.got, f"{self.name} got {found}, to which it does not subscribe"
        if kind == "message":
            (self.got[pattern] if "seq" in found else self.ephemeral).append(found)
        elif kind == "revoked":
            self.revoked[pattern] = self.got.pop(pattern)
        elif kind == "subscribed":
            self.got[found["pattern"]] = []
            self._replies.append(found)
        elif kind == "unsubscribed":
            self.got.pop(found["pattern"], None)
            self._replies.append(found)
        elif kind not in ("live", "head", "goaway"):
            self._replies.append(found)


class BrokerMachine(RuleBasedStateMachine):
    """Subclass it with `connect`, which opens a `Connection`, and with the `secret` that tokens are signed with.

    The broker may have any number of replicas, and `connect` may lead to any of them. Nobody else may publish
    meanwhile, unless there is a `root`: then all channels are below it, and only there must nobody else publish.
    Whoever has no secret overrides `token`; where that returns a token for everything below `root` whatever it is
    asked for, `varied` is to be False. Hostile clients publish below `hostile_root`, which has to be
    elsewhere, or nothing where there is none. `MyMachine.TestCase` is what unittest and pytest run.
    """

    secret = ""
    root = ""
    varied = True
    hostile_root = ""
    patience = 10.0
    """Seconds for an answer."""
    settling = 5.0
    """Seconds for messages to arrive that have been acknowledged: through another replica, say."""

    def connect(self) -> Connection:
        """Open a connection, on which nobody has authenticated."""
        raise NotImplementedError

    def token(self, name: str, grants: Grants) -> str:
        """A token with these grants, for the client id `name`."""
        return sign(self.secret, client_id=name, grants=grants)

    clients: Bundle[str] = Bundle("clients")
    absent: Bundle[str] = Bundle("absent")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.steps: list[tuple[str, dict[str, Any]]] = []
        """What has been done: names of methods and their arguments."""
        self._clients: dict[str, Client] = {}
        self._sessions: dict[str, Session] = {}
        self._gone: dict[str, Client] = {}
        self._names = (f"client-{number}" for number in itertools.count(1))
        self._payloads = itertools.count(1)
        self._ids = itertools.count(1)
        self._producers = itertools.count(1)
        self._shouts: dict[int, tuple[str, str | None]] = {}
        """Ephemeral messages: channel and sender, by payload."""

    def teardown(self) -> None:
        for client in self._clients.values():
            client.connection.close()

    def _place(self, name: str) -> str:
        """A channel or a pattern, below the root."""
        return f"{self.root}.{name}" if self.root else name

    # Coming and leaving

    @initialize(target=clients)
    @recorded
    def begin(self) -> str:
        """Somebody who may do everything; from here on the log is ours."""
        return self._open(next(self._names), ALL)

    @rule(target=clients, grants=some_grants)
    @recorded
    def come(self, grants: Grants) -> str:
        return self._open(next(self._names), grants if self.varied else ALL)

    @rule(name=consumes(clients), target=absent)
    @recorded
    def leave(self, name: str) -> str:
        client = self._gone[name] = self._clients.pop(name)
        client.connection.close()
        del self.model.sessions[name]
        return name

    @rule(name=consumes(absent), target=clients)
    @recorded
    def come_back(self, name: str) -> str:
        """On another connection, from where every subscription was."""
        self._come_back(self._gone.pop(name))
        return name

    def _open(self, name: str, grants: Grants) -> str:
        client, grants = self._connect(name), self._given(grants)
        client.authenticate(self.token(name, grants))
        if not self._sessions:
            self.model = Model(client.head)
        session = Session(client.client_id, grants, next(self._producers))
        self._sessions[name] = self.model.sessions[name] = session
        return name

    def _come_back(self, gone: Client) -> Client:
        before = self._sessions[gone.name]
        client = self._connect(gone.name)
        client.authenticate(self.token(gone.name, before.grants), gone.producer)
        assert client.producer == gone.producer, "who comes back has the producer that it showed"
        session = Session(client.client_id, before.grants, before.producer)
        self._sessions[gone.name] = self.model.sessions[gone.name] = session
        for pattern, cursor in gone.cursors.items():
            self._subscribe(gone.name, pattern, cursor, ())
        return client

    def _connect(self, name: str) -> Client:
        client = self._clients[name] = Client(self.connect(), name, self._ids, self.patience)
        return client

    def _given(self, grants: Grants) -> Grants:
        return Grants(tuple(map(self._place, grants.read)), tuple(map(self._place, grants.write)))

    # Subscribing

    @rule(name=clients, pattern=some_patterns, places=cuts)
    @recorded
    def subscribe(self, name: str, pattern: str, places: list[int]) -> None:
        self._subscribe(name, self._place(pattern), None, places)

    @rule(name=clients, pattern=some_patterns, back=st.integers(0, 10))
    @recorded
    def subscribe_since(self, name: str, pattern: str, back: int) -> None:
        self._subscribe(name, self._place(pattern), max(self.model.base, self.model.head - back), ())

    def _subscribe(self, name: str, pattern: str, since: int | None, places: Iterable[int]) -> None:
        client = self._clients[name]
        request: Message = {"type": "subscribe", "pattern": pattern}
        if since is not None:
            request |= {"since": since, "epoch": client.epoch}
        reply = client.ask(request, places)
        if self.model.subscribe(name, pattern, since):
            assert reply["type"] == "subscribed", reply
            if since is None:
                # A replica may be behind; then it says so, and delivers from there.
                assert self.root or reply["seq"] <= self.model.head, f"{reply}, and the head is {self.model.head}"
                self.model.subscribe(name, pattern, reply["seq"])
            client.cursors[pattern] = self.model.sessions[name].subscriptions[pattern].since
        else:
            assert (reply["type"], reply.get("code")) == ("subscribe_error", "unauthorized"), reply

    @rule(name=clients, pattern=some_patterns)
    @recorded
    def unsubscribe(self, name: str, pattern: str) -> None:
        client, pattern = self._clients[name], self._place(pattern)
        reply = client.ask({"type": "unsubscribe", "pattern": pattern})
        if self.model.unsubscribe(name, pattern):
            assert reply["type"] == "unsubscribed", reply
            del client.cursors[pattern]
        else:
            assert (reply["type"], reply.get("code")) == ("subscribe_error", "invalid_pattern"), reply

    # Being allowed more or less

    @precondition(lambda self: self.varied)
    @rule(name=clients, grants=some_grants)
    @recorded
    def regrant(self, name: str, grants: Grants) -> None:
        """A newer token, which allows something else: what it does not cover ends."""
        self._regrant(name, self._given(grants), lambda: None)

    @precondition(lambda self: self.varied)
    @rule(name=clients, other=clients, grants=some_grants, channels=st.lists(some_channels, min_size=1, max_size=20))
    @recorded
    def regrant_amid_messages(self, name: str, other: str, grants: Grants, channels: list[str]) -> None:
        """The same, while another client publishes: what ends has had all that came before."""
        if name != other:
            requests = self._say_publishes(other, channels)
            self._regrant(name, self._given(grants), lambda: self._settle(other, requests))

    def _regrant(self, name: str, grants: Grants, meanwhile: Callable[[], None]) -> None:
        client = self._clients[name]
        client.authenticate(self.token(name, grants))
        meanwhile()
        client.ping()
        owed = {pattern: self.model.owed(name, pattern, cursor) for pattern, cursor in client.cursors.items()}
        ended = self.model.regrant(name, grants)
        revoked, client.revoked = client.revoked, {}
        assert revoked.keys() == ended, f"{set(revoked)} was revoked, and {ended} should have been"
        for pattern, got in revoked.items():
            compare(got, owed[pattern])
            del client.cursors[pattern]

    # Publishing, and asking

    @rule(name=clients, channel=some_channels, echo=st.booleans(), places=cuts)
    @recorded
    def publish(self, name: str, channel: str, echo: bool, places: list[int]) -> None:
        payload = {"n": next(self._payloads), "text": '"}{\\'}
        request = {"type": "publish", "channel": self._place(channel), "payload": payload}
        reply = self._clients[name].ask(request | ({} if echo else {"echo": False}), places)
        self._published(name, request, reply, echo=echo)

    @rule(name=clients, channels=st.lists(some_channels, min_size=2, max_size=20))
    @recorded
    def publish_many(self, name: str, channels: list[str]) -> None:
        """One after the other, without waiting for an answer in between."""
        self._settle(name, self._say_publishes(name, channels))

    @rule(name=clients, channels=st.lists(some_channels, min_size=1, max_size=10), end=st.integers(0, 900))
    @recorded
    def be_cut_off(self, name: str, channels: list[str], end: int) -> None:
        """The connection ends somewhere amid publishing; after another one nothing is missing, nor there twice."""
        client, head = self._clients[name], self.model.head
        requests = self._publishes(name, channels)
        client.connection.send(b"".join(json.dumps(request).encode() for request in requests)[:end])
        client.connection.close()
        again = self._come_back(client)
        for request in requests:
            again.say({**request, "retry": True, "after": head, "epoch": client.epoch})
        self._settle(name, requests)

    def _publishes(self, name: str, channels: Iterable[str]) -> list[Message]:
        """Numbered requests for those channels to which the client may publish."""
        client, session = self._clients[name], self.model.sessions[name]
        return [
            client.numbered({"type": "publish", "channel": channel, "payload": next(self._payloads)})
            for channel in map(self._place, channels)
            if session.may_write(channel)
        ]

    def _say_publishes(self, name: str, channels: Iterable[str]) -> list[Message]:
        requests = self._publishes(name, channels)
        for request in requests:
            self._clients[name].say(request)
        return requests

    def _settle(self, name: str, requests: Iterable[Message]) -> None:
        """Hear the answers; the seqs have to be in the order of the requests."""
        for request in requests:
            self._published(name, request, self._clients[name].answer(request))

    def _published(self, name: str, request: Message, reply: Message, *, echo: bool = True) -> None:
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
        """To who is there, at most once: nobody has to get it."""
        channel, payload, session = self._place(channel), next(self._payloads), self.model.sessions[name]
        self._shouts[payload] = channel, session.client_id
        reply = self._clients[name].ask({"type": "publish", "channel": channel, "payload": payload, "ephemeral": True})
        if session.may_write(channel):
            assert (reply["type"], "seq" in reply) == ("published", False), reply
        else:
            del self._shouts[payload]
            assert (reply["type"], reply.get("code")) == ("publish_error", "unauthorized"), reply

    @rule(name=clients, pattern=some_patterns, limit=st.integers(1, 5))
    @recorded
    def history(self, name: str, pattern: str, limit: int) -> None:
        client, pattern = self._clients[name], self._place(pattern)
        deadline = time.monotonic() + self.settling
        while True:
            reply = client.ask({"type": "history", "pattern": pattern, "limit": limit})
            wanted = self.model.history(name, pattern, limit)
            if wanted is None:
                assert (reply["type"], reply.get("code")) == ("error", "unauthorized"), reply
                return
            assert reply["type"] == "history", reply
            # What was there before the log was ours may stand before it.
            found = [each for each in reply["messages"] if each["seq"] > self.model.base]
            if identities(found) == identities(wanted):
                return
            assert time.monotonic() < deadline, f"history of {pattern} is {found}, and it should be {wanted}"

    # What nobody should do

    @rule(pieces=some_pieces)
    @recorded
    def be_hostile(self, pieces: list[bytes]) -> None:
        """Somebody who shows no token sends anything: no harm comes of it to anybody else."""
        attack(self.connect(), pieces, self.patience)

    @precondition(lambda self: self.varied)
    @rule(pieces=some_pieces)
    @recorded
    def be_hostile_from_within(self, pieces: list[bytes]) -> None:
        """The same of a client with a token. Nothing that it publishes may get among what the others do."""
        write: tuple[str, ...] = ()
        if self.hostile_root:
            write = (f"{self.hostile_root}.*",)
            there = f'"channel":"{self.hostile_root}.'.encode()
            pieces = [piece.replace(b'"channel":"', there) for piece in pieces]
        token = self.token("hostile", Grants(read=(self._place("*"),), write=write))
        attack(self.connect(), pieces, self.patience, token=token)

    # What has to hold

    @invariant()
    def everyone_has_what_it_is_owed(self) -> None:
        for name, client in self._clients.items():
            deadline = time.monotonic() + self.settling
            client.ping()
            for pattern, cursor in client.cursors.items():
                wanted = self.model.owed(name, pattern, cursor)
                while not compare(client.got[pattern], wanted) and time.monotonic() < deadline:
                    client.ping()
                got = client.got[pattern]
                assert compare(got, wanted), f"{name} got {got} for {pattern} after {cursor}, and is owed {wanted}"
                client.got[pattern] = []
                client.cursors[pattern] = self.model.head
            for message in client.ephemeral:
                self._check_ephemeral(name, message)
            client.ephemeral = []

    def _check_ephemeral(self, name: str, message: Message) -> None:
        pattern, payload = message["pattern"], message["payload"]
        found = message["channel"], message.get("sender")
        assert self._shouts.get(payload) == found, f"{name} got {message}, which nobody has published"
        assert matches(pattern, message["channel"]), f"{name} got {message}"
        heard = self._clients[name].heard
        assert (pattern, payload) not in heard, f"{name} got {message} twice"
        heard.add((pattern, payload))


def identities(messages: Iterable[Message] | Iterable[Entry]) -> list[tuple[Any, ...]]:
    """What has to be the same of a message that came, and of the one in the model."""
    return [
        (each.seq, each.channel, each.payload, each.sender)
        if isinstance(each, Entry)
        else (each["seq"], each["channel"], each["payload"], each.get("sender"))
        for each in messages
    ]


def compare(got: list[Message], wanted: list[Entry]) -> bool:
    """Whether these are those messages. What is there already has to be their beginning."""
    found, owed = identities(got), identities(wanted)
    assert found == owed[: len(found)], f"got {found}, and {owed} is owed"
    return len(found) == len(owed)
