"""Members of channels that stay, members that never come back, and clients that watch them all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import inf
from typing import Any

import trio

from catbus.client import Backoff, Refused, open_bus
from catbus.errors import Disconnected
from tests.postgres.processes import token as sign_token

from .clients import TRANSPORTS, LoadState, RawClient
from .history import MemberAnnounced, MemberJoined, MemberLeft, MembersListed, MembersShown, now
from .replica_slots import ReplicaSlot

ROOMS = "rooms.*"
STAYING = 6
MORTALS = 6
SETTLE_TIMEOUT = 90.0
"""Seconds within which a member is gone, even if its replica was killed at the end."""


class Member(RawClient):
    """A client that is a member of a channel, on each connection."""

    def __init__(self, state: LoadState, name: str, transport: str, channel: str) -> None:
        super().__init__(state, name, transport, ROOMS)
        self._channel = channel

    def _handle(self, message: dict[str, Any]) -> dict[str, Any] | None:
        if message["type"] == "auth_ok":
            self.record_connected()
            return {"type": "join", "channel": self._channel, "info": {"name": self.name}, "id": 1}
        assert message["type"] != "error", message
        if message["type"] == "joined":
            self.state.history.add(MemberJoined(at=now(), member=self.name, replica=self.replica))
        return None


class PresenceWatcher(RawClient):
    """A client that watches all members, without the client library: it records every announcement."""

    def __init__(self, state: LoadState, name: str, transport: str) -> None:
        super().__init__(state, name, transport, ROOMS)
        self._snapshot: list[str] = []
        self.present: set[str] = set()
        """The members that it knows."""

    def _handle(self, message: dict[str, Any]) -> dict[str, Any] | None:
        history = self.state.history
        kind = message["type"]
        if kind == "auth_ok":
            self.record_connected()
            self._snapshot = []
            return {"type": "subscribe", "pattern": ROOMS, "presence": True, "id": 1}
        if kind == "members":
            self._snapshot += [member["client_id"] for member in message["members"]]
            if message.get("complete"):
                members, self._snapshot = tuple(self._snapshot), []
                self.present = set(members)
                history.add(MembersShown(at=now(), watcher=self.name, replica=self.replica, members=members))
        elif kind == "presence" and message["action"] != "update":
            member, joined = message["client_id"], message["action"] == "join"
            (self.present.add if joined else self.present.discard)(member)
            history.add(MemberAnnounced(at=now(), watcher=self.name, member=member, joined=joined))
        return None


async def come_and_go(member: Member) -> None:
    """Close the connection again and again, and come back within the grace. In the end, stay."""
    state = member.state
    while True:
        with trio.move_on_after(inf if state.load_ended.is_set() else state.rng.uniform(2, 6)):
            await member.stay_connected()
        member.record_left()
        state.history.add(MemberLeft(at=now(), member=member.name))
        await trio.sleep(state.rng.uniform(1, 4))


async def live_and_die(state: LoadState, name: str, transport: str) -> None:
    """Join under a new name each time, and leave without a word: with the connection, or with the replica."""
    for life in count(1):
        if state.load_ended.is_set():
            return
        member = Member(state, f"{name}-{life}", transport, "rooms.mortals")
        try:
            with trio.move_on_after(state.rng.uniform(6, 20)):
                await member.connect_once()
        finally:
            member.record_left()
            state.history.add(MemberLeft(at=now(), member=member.name))
        with trio.move_on_after(state.rng.uniform(0.5, 2)):
            await state.load_ended.wait()


def start_members(state: LoadState, subscribers: trio.Nursery, publishers: trio.Nursery) -> Sequence[PresenceWatcher]:
    """Start all members and their watchers. Returns the watchers."""
    for number in range(STAYING):
        member = Member(state, f"stays-{number}", TRANSPORTS[number % 2], f"rooms.{number % 3}")
        subscribers.start_soon(member.stay_connected)
        state.staying.add(member.name)
    for transport in TRANSPORTS:
        member = Member(state, f"{transport}-comes-and-goes", transport, "rooms.0")
        subscribers.start_soon(come_and_go, member)
        state.staying.add(member.name)
    for number in range(MORTALS):
        publishers.start_soon(live_and_die, state, f"mortal-{number}", TRANSPORTS[number % 2])
    watchers = [PresenceWatcher(state, f"{transport}-watcher", transport) for transport in TRANSPORTS]
    for watcher in watchers:
        subscribers.start_soon(watcher.stay_connected)
    return watchers


async def list_members(state: LoadState, watchers: Sequence[PresenceWatcher]) -> None:
    """Ask every replica for all members, until all know only those that stay, or for a time.

    Watchers are told later: a member that has left stays with them for its grace.
    """
    limit = trio.current_time() + SETTLE_TIMEOUT
    while True:
        listed = {slot.name: await _list_members(slot) for slot in state.slots}
        known = [*map(set, listed.values()), *(watcher.present for watcher in watchers)]
        if trio.current_time() > limit or all(members == state.staying for members in known):
            break
        await trio.sleep(0.5)
    for replica, members in listed.items():
        state.history.add(
            MembersListed(at=now(), replica=replica, members=tuple(members), expected=tuple(sorted(state.staying)))
        )


async def _list_members(slot: ReplicaSlot) -> Sequence[str]:
    """Return the members that one replica knows; none if it does not answer."""
    with trio.move_on_after(5):
        try:
            async with open_bus(
                lambda: slot.dial("websocket"), token=sign_token("lister"), reconnect=Backoff(0.1, 1.0)
            ) as bus:
                return sorted(member.client_id or "" for member in await bus.members(ROOMS))
        except* (Disconnected, Refused):
            pass
    return []
