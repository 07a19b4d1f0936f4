"""The rules of `BrokerMachine` about members of channels (section 9.4 of the specification)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from .known_members import Member
from .machine_state import MachineState, recorded, some_channels, some_patterns
from .protocol_client import ProtocolClient

clients = MachineState.clients


class PresenceRules(MachineState):
    """Makes clients join and leave channels, and compares the members that clients know with those of the model.

    A member whose connection has ended may be known for some time: its leave is announced after a grace.
    """

    @rule(name=clients, channel=some_channels, info=st.none() | st.integers(0, 9), leaves=st.booleans())
    @recorded
    def join(self, name: str, channel: str, info: int | None, leaves: bool) -> None:
        """Join a channel, perhaps leave it at once, and list its members."""
        channel = self._below_root(channel)
        self._join(name, channel, info)
        if leaves:
            self._leave(name, channel)
        self._check_listed(name, channel, 3)

    def _join(self, name: str, channel: str, info: Any) -> None:
        reply = self._clients[name].request({"type": "join", "channel": channel, "info": info})
        if self.model.join(name, channel, info):
            assert (reply["type"], reply.get("channel")) == ("joined", channel), reply
        else:
            assert (reply["type"], reply.get("code")) == ("error", "unauthorized"), reply

    @rule(name=clients, channel=some_channels)
    @recorded
    def leave_channel(self, name: str, channel: str) -> None:
        """End a membership. It is no error without one."""
        self._leave(name, self._below_root(channel))

    def _leave(self, name: str, channel: str) -> None:
        reply = self._clients[name].request({"type": "leave", "channel": channel})
        assert (reply["type"], reply.get("channel")) == ("left", channel), reply
        self.model.leave(name, channel)

    def _join_again(self, name: str, channels: Mapping[str, Any]) -> None:
        """Join what the client was a member of before it has lost its connection."""
        for channel, info in channels.items():
            self._join(name, channel, info)

    def _check_left(self, client: ProtocolClient, ended: set[str]) -> None:
        """Check that a client was told of exactly those memberships that have ended with its permission."""
        left, client.left = client.left, set()
        assert left == ended, f"{client.name} left {left}, and should have left {ended}"

    @rule(name=clients, pattern=some_patterns, limit=st.integers(1, 3))
    @recorded
    def list_members(self, name: str, pattern: str, limit: int) -> None:
        self._check_listed(name, self._below_root(pattern), limit)

    def _check_listed(self, name: str, pattern: str, limit: int) -> None:
        """Compare the members that a client lists, in pages, with those of the model."""
        client = self._clients[name]
        deadline = time.monotonic() + self.delivery_timeout
        while True:
            found = self._pages_of_members(client, pattern, limit)
            if not self.model.sessions[name].may_read(pattern):
                assert found is None, f"{name} may not read {pattern}, and got {found}"
                return
            wanted = self.model.members(pattern)
            if found == wanted:
                return
            assert time.monotonic() < deadline, f"the members of {pattern} are {found}, and should be {wanted}"

    def _pages_of_members(self, client: ProtocolClient, pattern: str, limit: int) -> dict[Member, Any] | None:
        """Read pages until the last one. Return the info of each member; None if the request is rejected."""
        found: dict[Member, Any] = {}
        after: dict[str, str] = {}
        while True:
            reply = client.request({"type": "members", "pattern": pattern, "limit": limit, **after})
            if reply["type"] == "error":
                assert reply["code"] == "unauthorized", reply
                return None
            assert "pattern" not in reply, reply
            assert len(reply["members"]) <= limit, reply
            found |= {member: state[1] for member, state in client.members_in(reply).items()}
            if "next" not in reply:
                return found
            after = {"after": reply["next"]}

    @invariant()
    def every_watcher_knows_the_members(self) -> None:
        for name, client in self._clients.items():
            for pattern in list(client.watched):
                deadline = time.monotonic() + self.delivery_timeout
                while not client.knows_members_of(self.model, pattern):
                    known, wanted = client.watched.get(pattern), self.model.members(pattern)
                    assert time.monotonic() < deadline, f"{name} knows of {pattern} {known}, and not {wanted}"
                    client.ping()
