"""The rules of `BrokerMachine` about clients of the first version of the protocol (section 15 of the specification)."""

from __future__ import annotations

import time
from typing import Any

from hypothesis.stateful import Bundle, consumes, invariant, precondition, rule

from ..auth.grants import Grants
from .first_version_client import FirstVersionClient
from .machine_state import ALL, MachineState, recorded, several_patterns, some_channels, some_grants, some_patterns
from .protocol_client import Message, ProtocolClient
from .reference_model import ModelSession, matches


class FirstVersionRules(MachineState):
    """Connects clients that know no cursors: they get one copy of a message, whatever number of patterns match."""

    first_version_clients: Bundle[str] = Bundle("first_version_clients")

    def __init__(self) -> None:
        super().__init__()
        self._first_version: dict[str, FirstVersionClient] = {}

    def teardown(self) -> None:
        for client in self._first_version.values():
            client.connection.close()
        super().teardown()

    @rule(target=first_version_clients, grants=some_grants, patterns=several_patterns)
    @recorded
    def connect_first_version_client(self, grants: Grants, patterns: list[str]) -> str:
        """Connect, and subscribe to several patterns, which may overlap."""
        name, grants = next(self._names), self._grants_below_root(grants if self.varied_grants else ALL)
        client = FirstVersionClient(self.connect_first_version(), name, self._ids, self.reply_timeout)
        self._first_version[name] = client
        client.authenticate(self.token(name, grants))
        self.model.sessions[name] = ModelSession(client.client_id, grants, next(self._producers))
        for pattern in patterns:
            self._subscribe_first_version(name, self._below_root(pattern))
        return name

    @rule(name=consumes(first_version_clients))
    @recorded
    def leave_first_version(self, name: str) -> None:
        self._first_version.pop(name).connection.close()
        del self.model.sessions[name]

    @rule(name=first_version_clients, pattern=some_patterns)
    @recorded
    def subscribe_first_version(self, name: str, pattern: str) -> None:
        self._subscribe_first_version(name, self._below_root(pattern))

    def _subscribe_first_version(self, name: str, pattern: str) -> None:
        client = self._first_version[name]
        reply = client.request({"type": "subscribe", "pattern": pattern}, "subscribed", "subscribe_error")
        kind = "subscribed" if self.model.subscribe(name, pattern) else "subscribe_error"
        assert (reply["type"], reply["pattern"]) == (kind, pattern), reply
        client.begun = self.model.head

    @rule(name=first_version_clients, pattern=some_patterns)
    @recorded
    def unsubscribe_first_version(self, name: str, pattern: str) -> None:
        """Unsubscribe. It is no error without a subscription."""
        client, pattern = self._first_version[name], self._below_root(pattern)
        reply = client.request({"type": "unsubscribe", "pattern": pattern}, "unsubscribed", "subscribe_error")
        assert (reply["type"], reply["pattern"]) == ("unsubscribed", pattern), reply
        self.model.unsubscribe(name, pattern)

    @rule(name=first_version_clients, channel=some_channels)
    @recorded
    def publish_first_version(self, name: str, channel: str) -> None:
        channel, payload = self._below_root(channel), next(self._payloads)
        request = {"type": "publish", "channel": channel, "payload": payload}
        reply = self._first_version[name].request(request, "published", "publish_error")
        allowed = self.model.sessions[name].may_write(channel)
        assert (reply["type"], reply["channel"]) == ("published" if allowed else "publish_error", channel), reply
        if allowed:
            # The reply has no seq. Others may publish outside of a root, so that it does not follow from the model.
            self.model.publish(name, channel, payload, seq=self._find_seq(channel, payload) if self.root else None)

    def _find_seq(self, channel: str, payload: int) -> int:
        """Return the seq of the newest message of a channel, which has this payload."""
        reader = ProtocolClient(self.connect(), "reader", self._ids, self.reply_timeout)
        reader.authenticate(self.token("reader", self._grants_below_root(ALL)))
        deadline = time.monotonic() + self.delivery_timeout
        try:
            while True:
                reply = reader.request({"type": "history", "pattern": channel, "limit": 1})
                found = [message["seq"] for message in reply["messages"] if message["payload"] == payload]
                if found:
                    return int(found[0])
                assert time.monotonic() < deadline, f"{payload} was acknowledged, and {channel} ends with {reply}"
        finally:
            reader.connection.close()

    @precondition(lambda self: self.varied_grants)
    @rule(name=first_version_clients, grants=some_grants)
    @recorded
    def replace_grants_first_version(self, name: str, grants: Grants) -> None:
        """Authenticate again. The client is told of each subscription that ends by `subscribe_error`."""
        client, grants = self._first_version[name], self._grants_below_root(grants)
        client.authenticate(self.token(name, grants))
        client.ping()
        ended, client.withdrawn = client.withdrawn, set()
        assert ended == self.model.replace_grants(name, grants), f"{ended} ended, with {grants}"

    @invariant()
    def every_first_version_client_has_its_messages(self) -> None:
        for name, client in self._first_version.items():
            wanted = [(each.channel, each.payload) for each in self.model.expected_once(name, client.compared)]
            found: list[tuple[str, Any]] = []
            deadline = time.monotonic() + self.delivery_timeout
            while True:
                client.ping()
                for message in client.take():
                    self._add_first_version(name, client, message, found)
                assert found == wanted[: len(found)], f"{name} received {found}, expected {wanted}"
                if len(found) == len(wanted):
                    break
                assert time.monotonic() < deadline, f"{name} received {found}, expected {wanted}"
            assert not client.withdrawn, f"{client.withdrawn} of {name} ended"
            client.compared = self.model.head

    def _add_first_version(
        self, name: str, client: FirstVersionClient, message: Message, found: list[tuple[str, Any]]
    ) -> None:
        """Add a message to those that were found, unless it is ephemeral or from before the subscription."""
        channel, payload = message["channel"], message["payload"]
        patterns = self.model.sessions[name].subscriptions
        if isinstance(payload, int) and payload in self._ephemeral:
            self._check_ephemeral(name, message, patterns, client.ephemeral_received)
            return
        assert (channel, payload) not in client.seen, f"{name} received {message} twice"
        client.seen.append((channel, payload))
        # A lagging replica delivers from its own position, of which these clients do not learn.
        early = any(
            (each.channel, each.payload) == (channel, payload) and each.seq <= client.begun for each in self.model.log
        )
        if not (early and any(matches(pattern, channel) for pattern in patterns)):
            found.append((channel, payload))
