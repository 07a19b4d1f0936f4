"""The rules of `BrokerMachine` about retained messages: conditional publishes, and subscriptions to the state."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from .machine_state import MachineState, recorded, some_channels, some_patterns
from .protocol_client import Message, ProtocolClient


class RetainedRules(MachineState):
    """Publishes retained messages, and subscribes to the state."""

    clients = MachineState.clients

    def _read_retained(self, client: ProtocolClient) -> None:
        """Tell the model what was retained before the machine started. The client may read everything."""
        pattern = self._below_root("*")
        client.request({"type": "subscribe", "pattern": pattern, "retained": True})
        client.wait_snapshot(pattern)
        self.model.retained_before = client.states.pop(pattern)
        client.request({"type": "unsubscribe", "pattern": pattern})

    @rule(
        name=clients,
        channel=some_channels,
        remove=st.booleans(),
        expect=st.sampled_from([None, "present", "present", "another"]),
    )
    @recorded
    def publish_retained(self, name: str, channel: str, remove: bool, expect: str | None) -> None:
        """Publish or remove a retained message, perhaps over the one that is there, or over one that is not."""
        channel = self._below_root(channel)
        present = self.model.retained([channel]).get(channel, 0)
        payload: Any = None if remove else next(self._payloads)
        request: Message = {"type": "publish", "channel": channel, "payload": payload, "retain": True}
        if expect is not None:
            request["expect"] = present if expect == "present" else present + 1
        reply = self._clients[name].request(request)
        if expect == "another" and self.model.sessions[name].may_write(channel):
            found = reply["type"], reply.get("code"), reply.get("seq")
            assert found == ("publish_error", "conflict", present), f"{reply}, and {present} is retained"
        else:
            self._check_published(name, request, reply)

    @rule(name=clients, pattern=some_patterns)
    @recorded
    def subscribe_to_state(self, name: str, pattern: str) -> None:
        """Subscribe with a snapshot. It must have the state of its cursor, but for channels that changed since."""
        client, pattern = self._clients[name], self._below_root(pattern)
        reply = client.request({"type": "subscribe", "pattern": pattern, "retained": True})
        if not self.model.subscribe(name, pattern):
            assert (reply["type"], reply.get("code")) == ("subscribe_error", "unauthorized"), reply
            client.forget_state(pattern)
            return
        assert reply["type"] == "subscribed", reply
        self.model.subscribe(name, pattern, reply["seq"])
        client.cursors[pattern] = reply["seq"]
        client.wait_snapshot(pattern)

    def _check_state(self, client: ProtocolClient, pattern: str) -> None:
        """Compare the state that a subscription shows with the model. It has received all messages."""
        wanted, found = self.model.retained([pattern]), client.states[pattern]
        assert found == wanted, f"{client.name} has the state {found} of {pattern}, and it should be {wanted}"
