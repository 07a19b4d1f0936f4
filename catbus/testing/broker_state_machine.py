"""A Hypothesis state machine that drives a broker over any connection and compares it with the reference model.

Several clients connect, subscribe, publish, get other grants, lose their connection, leave and resume, in random order.
After each step every client must have received exactly what the model expects.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable

from hypothesis import strategies as st
from hypothesis.stateful import consumes, initialize, invariant, precondition, rule

from ..auth.grants import Grants
from ..close_codes import CloseCode
from .event_stream_rules import EventStreamRules
from .first_version_rules import FirstVersionRules
from .hostile_client import attack
from .machine_state import (
    ALL,
    CHANNELS,
    PATTERNS,
    MachineState,
    compare,
    has_administrator,
    identities,
    recorded,
    some_channels,
    some_grants,
    some_patterns,
)
from .presence_rules import PresenceRules
from .protocol_client import Message, ProtocolClient
from .reference_model import ModelSession, ReferenceModel
from .retained_rules import RetainedRules
from .strategies import cut, hostile_streams

cuts = st.lists(st.integers(0, 80), max_size=3).map(sorted)
some_options = st.lists(st.sampled_from(["stream", "datagrams", "presence"]), unique=True)
some_pieces = hostile_streams().flatmap(cut)


class BrokerMachine(EventStreamRules, FirstVersionRules, PresenceRules, RetainedRules):
    """Drives a broker. Subclasses define `connect`, which opens a connection, and the `secret` that signs tokens.

    The broker may have any number of replicas, and `connect` may connect to any of them. No one else may publish while
    the machine runs; with a `root`, all channels are below it, and no one else may publish there. Override `token` if
    the secret is unknown. If `token` then returns the same grants for every request, set `varied_grants` to False.
    Hostile clients publish below `hostile_root`, which must be outside `root`; without one they publish nothing. Run
    the machine as `MyMachine.TestCase`, with unittest or pytest.

    Some clients are only driven if the machine is told how:

    - with an `http_url`, the origin of an HTTP endpoint, clients open event streams, and an administrator disconnects
      clients; for several replicas override `open_events`, and set `one_replica` to False;
    - with `roles`, clients have roles, which `set_role` changes.

    `connect_first_version` connects clients of the first version of the protocol.
    """

    clients, absent = MachineState.clients, MachineState.absent

    def __init__(self) -> None:
        super().__init__()
        self._absent: dict[str, ProtocolClient] = {}

    def teardown(self) -> None:
        for client in self._clients.values():
            client.connection.close()
        super().teardown()

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

    @precondition(lambda self: self.roles)
    @rule(target=clients, grants=some_grants)
    @recorded
    def connect_client_with_role(self, grants: Grants) -> str:
        """Connect a client whose grants are those of a role, which changes while it is connected."""
        name = next(self._names)
        self._role_tokens[name] = self.set_role(name, self._grants_below_root(grants))
        return self._open(name, grants)

    @rule(name=consumes(clients), target=absent)
    @recorded
    def leave(self, name: str) -> str:
        client = self._absent[name] = self._clients.pop(name)
        client.connection.close()
        self.model.end_session(name)
        return name

    @rule(name=consumes(absent), target=clients)
    @recorded
    def connect_client_again(self, name: str) -> str:
        """Connect again, resume every subscription at its cursor, and join the channels again."""
        self._reconnect(self._absent.pop(name))
        return name

    @has_administrator
    @rule(name=clients)
    @recorded
    def disconnect_as_administrator(self, name: str) -> None:
        """Have the session closed, connect again, and resume every subscription at its cursor."""
        client = self._clients[name]
        self.disconnect(name)
        code = client.wait_closed()
        assert code == CloseCode.DISCONNECTED, f"{name} was closed with {code}"
        self._reconnect(client)

    def _open(self, name: str, grants: Grants) -> str:
        client, grants = self._connect(name), self._grants_below_root(grants)
        client.authenticate(self._present_token(name, grants))
        if not self._sessions:
            self.model = ReferenceModel(client.head)
            self._read_retained(client)
        session = ModelSession(client.client_id, grants, next(self._producers))
        self._sessions[name] = self.model.sessions[name] = session
        return name

    def _reconnect(self, lost: ProtocolClient) -> ProtocolClient:
        before = self._sessions[lost.name]
        client = self._connect(lost.name)
        client.authenticate(self._present_token(lost.name, before.grants), lost.producer)
        assert client.producer == lost.producer, "a reconnecting client keeps the producer that it sends"
        session = ModelSession(client.client_id, before.grants, before.producer)
        self._sessions[lost.name] = self.model.sessions[lost.name] = session
        for pattern, cursor in lost.cursors.items():
            options = ["presence"] if pattern in lost.watched else []
            if pattern in lost.states and pattern not in lost.incomplete:
                client.states[pattern] = lost.states[pattern]
                options.append("retained")
            self._subscribe(lost.name, pattern, cursor, (), options)
        self._join_again(lost.name, before.channels)
        return client

    def _present_token(self, name: str, grants: Grants) -> str:
        return self._role_tokens.get(name) or self.token(name, grants)

    def _connect(self, name: str) -> ProtocolClient:
        client = self._clients[name] = ProtocolClient(self.connect(), name, self._ids, self.reply_timeout)
        return client

    # Subscribing

    @rule(name=clients, pattern=some_patterns, places=cuts, options=some_options)
    @recorded
    def subscribe(self, name: str, pattern: str, places: list[int], options: list[str]) -> None:
        """Subscribe, over WebTransport perhaps on a stream of its own or with ephemeral messages as datagrams."""
        self._subscribe(name, self._below_root(pattern), None, places, options)

    @rule(name=clients, pattern=some_patterns, back=st.integers(0, 10), options=some_options)
    @recorded
    def subscribe_since(self, name: str, pattern: str, back: int, options: list[str]) -> None:
        since = max(self.model.base, self.model.head - back)
        self._subscribe(name, self._below_root(pattern), since, (), options)

    def _subscribe(
        self, name: str, pattern: str, since: int | None, places: Iterable[int] = (), options: Iterable[str] = ()
    ) -> None:
        client = self._clients[name]
        request: Message = {"type": "subscribe", "pattern": pattern, **dict.fromkeys(options, True)}
        if "datagrams" in options:
            client.datagram_patterns.add(pattern)
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
        """Authenticate again with a newer token, or change the role. Subscriptions that are not covered end."""
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
        if name in self._role_tokens:
            self._role_tokens[name] = self.set_role(name, grants)
        else:
            client.authenticate(self.token(name, grants))
        meanwhile()
        if name in self._role_tokens:
            self._wait_role(client, ModelSession(client.client_id, grants, 0))
        client.ping()
        expected = {pattern: self.model.expected(name, pattern, cursor) for pattern, cursor in client.cursors.items()}
        ended, left = self.model.replace_grants(name, grants), self.model.end_memberships(name)
        deadline = time.monotonic() + self.delivery_timeout
        while len(client.revoked) + len(client.left) < len(ended) + len(left) and time.monotonic() < deadline:
            # `revoked` on a stream of its own may come after `pong`.
            client.ping()
        self._check_left(client, left)
        revoked, client.revoked = client.revoked, {}
        assert revoked.keys() == ended, f"{set(revoked)} was revoked, and {ended} should have been"
        for pattern, received in revoked.items():
            compare(received, expected[pattern])
            del client.cursors[pattern]

    def _wait_role(self, client: ProtocolClient, session: ModelSession) -> None:
        """Wait until a changed role has exactly the permissions of the session."""
        deadline = time.monotonic() + self.delivery_timeout
        for pattern in map(self._below_root, PATTERNS):
            while (found := self._may_read(client, pattern)) != session.may_read(pattern):
                assert time.monotonic() < deadline, f"{client.name} may read {pattern}: {found}, with {session.grants}"
        for channel in map(self._below_root, CHANNELS):
            while (found := self._may_write(client, channel)) != session.may_write(channel):
                assert time.monotonic() < deadline, f"{client.name} may write {channel}: {found}, with {session.grants}"

    def _may_read(self, client: ProtocolClient, pattern: str) -> bool:
        reply = client.request({"type": "history", "pattern": pattern, "limit": 1})
        assert (reply["type"], reply.get("code")) in (("history", None), ("error", "unauthorized")), reply
        return bool(reply["type"] == "history")

    def _may_write(self, client: ProtocolClient, channel: str) -> bool:
        payload = next(self._payloads)
        self._ephemeral[payload] = channel, client.client_id
        reply = client.request({"type": "publish", "channel": channel, "payload": payload, "ephemeral": True})
        if reply["type"] == "published":
            assert "seq" not in reply, reply
            return True
        del self._ephemeral[payload]
        assert (reply["type"], reply.get("code")) == ("publish_error", "unauthorized"), reply
        return False

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

    @rule(name=clients, channel=some_channels)
    @recorded
    def publish_ephemeral(self, name: str, channel: str) -> None:
        """Publish an ephemeral message. Sessions receive it at most once, and may miss it."""
        channel = self._below_root(channel)
        allowed = self._may_write(self._clients[name], channel)
        assert allowed == self.model.sessions[name].may_write(channel), f"{name} may write {channel}: {allowed}"

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
            if identities(found) == identities(wanted):
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

    def check(self) -> None:
        """Compare what all clients have received with the model. Raises `AssertionError`."""
        self.every_client_has_its_messages()
        self.every_event_stream_has_its_messages()
        self.every_first_version_client_has_its_messages()

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
                if pattern in client.states:
                    self._check_state(client, pattern)
            for message in client.ephemeral:
                known = client.ephemeral_received.setdefault(message["pattern"], set())
                self._check_ephemeral(name, message, [message["pattern"]], known)
            client.ephemeral = []
