"""Replicas, clients and faults on a virtual clock, and the model that says what watchers may be told.

The pure parts are the ones that run in a broker; the table is simulated. Times are in ticks of 0.1 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from math import ceil, inf

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from catbus.presence import Member, PresenceAction
from catbus.presence.batches import PresenceBatch
from catbus.protocol.channels import matches

from .simulated_node import GRACE, SimulatedNode
from .simulated_table import SimulatedTable

TICK = 0.1
WRITE_TIME = 0.3
"""Seconds after which the other replicas can know of a client that came back."""
RECOVERY = 60.0
"""Seconds after which everything has to be right, if no fault remains."""
REPLICAS = 2
CHANNELS = "a", "b.x", "b.y"
PATTERNS = "*", "a", "b.*", "b.x"
CLIENTS = 3
INFOS = None, b"1", b"2"

some_events = st.sampled_from(["nothing", "leave", "disconnect", "disconnect many", "move", "come back"])

Name = tuple[str, str]
"""A channel and the client_id of a member."""


class ModelWatcher:
    """A watcher, which checks each event against the model."""

    def __init__(self, machine: PresenceMachine, node: SimulatedNode, pattern: str) -> None:
        self.begun = False
        self.members: dict[Name, Member] = {}
        self.leaves: dict[Name, int] = {}
        self._machine = machine
        self._node = node
        self._pattern = pattern
        self.since = machine.now

    def begin_members(self, pattern: str) -> None:
        assert pattern == self._pattern
        assert not self.begun, "a pattern begins twice"
        self.begun = True
        self.members = {(each.channel, each.client_id or ""): each for each in self._node.present(pattern)}

    def note_member(self, pattern: str, action: PresenceAction, member: Member) -> None:
        assert pattern == self._pattern
        assert self.begun, "an event before the beginning"
        name = member.channel, member.client_id or ""
        known = self.members.get(name)
        assert (known is None) == (action == "join"), f"{action} of a member that is {known}"
        if action == "leave":
            assert known is not None
            assert member.sessions == 0
            del self.members[name]
            self.leaves[name] = self.leaves.get(name, 0) + 1
            self._machine.check_leave(self, name)
        else:
            assert member.sessions > 0
            assert known is None or (known.sessions, known.info) != (member.sessions, member.info)
            self.members[name] = member


@dataclass
class Absence:
    """A time in which no session of a client was visible in a channel. `until` is None while it lasts."""

    since: float
    explicit: bool
    until: float | None = None

    def allows_leave(self, now: float) -> bool:
        """Whether the client was away for so long that it may be announced as gone."""
        return self.explicit or (now if self.until is None else self.until) - self.since >= GRACE


@dataclass
class Session:
    """A session of a client."""

    node: SimulatedNode
    number: int
    client: str
    infos: dict[str, tuple[int, bytes | None]] = field(default_factory=dict)
    """By channel, the info and when it was given."""


class PresenceMachine(RuleBasedStateMachine):
    """Drives the replicas, and compares what watchers are told with what is true."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.table = SimulatedTable()
        self.nodes: list[SimulatedNode] = []
        self.sessions: list[Session] = []
        self.watchers: dict[tuple[SimulatedNode, str], ModelWatcher] = {}
        self.absences: dict[Name, list[Absence]] = {}
        self.explicit: set[Name] = set()
        self._late: list[tuple[str, PresenceBatch]] = []
        self._names = count(1)
        self._numbers = count(1)
        self._times = count(1)

    @initialize()
    def start(self) -> None:
        """Begin with members in all channels, and a watcher on each replica."""
        for number in range(REPLICAS):
            self._start_node()
            self.watch(number, "*")
        for number, channel in enumerate(CHANNELS):
            self.join(number, number, channel)
        self.run_for(3.0)

    def _start_node(self) -> SimulatedNode:
        node = SimulatedNode(f"r{next(self._names)}")
        self.nodes.append(node)
        return node

    # What is true

    def visible(self, name: Name) -> list[Session]:
        """The sessions of a client in a channel, on replicas that reach the table."""
        channel, client = name
        return [
            session
            for session in self.sessions
            if session.client == client and channel in session.infos and session.node.connected
        ]

    def _note_truth(self) -> None:
        """Note which members are absent, after anything has happened."""
        names = {(channel, f"c{client}") for channel in CHANNELS for client in range(CLIENTS)}
        for name in names:
            periods = self.absences.setdefault(name, [])
            absent = not periods or periods[-1].until is None
            if absent and not periods:
                periods.append(Absence(self.now, explicit=True))
            if self.visible(name):
                if periods[-1].until is None:
                    periods[-1].until = self.now
            elif periods[-1].until is not None:
                periods.append(Absence(self.now, name in self.explicit))
        self.explicit.clear()

    def check_leave(self, watcher: ModelWatcher, name: Name) -> None:
        """A leave is announced: the client was away for the grace, or has left, and each time is announced once."""
        allowed = [
            period
            for period in self.absences[name]
            if period.allows_leave(self.now) and (period.until is None or period.until >= watcher.since)
        ]
        assert watcher.leaves[name] <= len(allowed), f"{name} is announced as gone, but it was not"

    # What happens

    @rule(ticks=st.sampled_from([1, 2, 5, 11, 30, 70, 101, 130]), pages=st.sampled_from([100, 100, 100, 1, 2]))
    def pass_time(self, ticks: int, pages: int) -> None:
        for node in self.nodes:
            node.pages = pages
        self.run_for(ticks * TICK)

    def run_for(self, seconds: float) -> None:
        """Let time pass. Ticks in which nothing is due are skipped."""
        end = round(self.now + seconds, 1)
        while self.now < end:
            connected = [node for node in self.nodes if node.connected and self.table.available]
            due = min((max(node.next_time(), node.resumes_at) for node in connected), default=inf)
            self.now = min(end, max(round(self.now + TICK, 1), ceil(due / TICK) * TICK if due < inf else inf))
            self._work()

    def _work(self) -> None:
        for node in self._working():
            if node.write(self.table, self.now) is not None:
                self._notify()
        for node in self._working():
            node.read(self.table, self.now)

    def _working(self) -> Iterator[SimulatedNode]:
        working = [node for node in self.nodes if node.connected and self.now >= node.resumes_at]
        return iter(working if self.table.available else [])

    def _notify(self) -> None:
        for node in self.nodes:
            node.hinted |= not node.deaf

    @rule(
        client=st.integers(0, CLIENTS - 1),
        node=st.integers(0, 9),
        channel=st.sampled_from(CHANNELS),
        info=st.sampled_from(INFOS),
    )
    def join(self, client: int, node: int, channel: str, info: bytes | None = None) -> None:
        session = Session(self.nodes[node % len(self.nodes)], next(self._numbers), f"c{client}")
        self.sessions.append(session)
        self._join(session, channel, info)

    @rule(session=st.integers(0, 99), channel=st.sampled_from(CHANNELS), info=st.sampled_from(INFOS))
    def join_again(self, session: int, channel: str, info: bytes | None) -> None:
        if self.sessions:
            self._join(self.sessions[session % len(self.sessions)], channel, info)

    def _join(self, session: Session, channel: str, info: bytes | None) -> None:
        at = next(self._times)
        if channel not in session.infos or session.infos[channel][1] != info:
            session.infos[channel] = at, info
        session.node.own.join(session.number, channel, session.client, info, at)
        self._note_truth()

    @rule(session=st.integers(0, 99), channel=st.sampled_from(CHANNELS))
    def leave(self, session: int, channel: str) -> None:
        """A client leaves a channel with all its sessions, as an application does that closes a room."""
        if not self.sessions:
            return
        client = self.sessions[session % len(self.sessions)].client
        for each in self.sessions:
            if each.client == client and each.infos.pop(channel, None) is not None:
                each.node.own.leave(each.number, channel, explicit=True)
        self.explicit.add((channel, client))
        self._note_truth()

    @rule(session=st.integers(0, 99))
    def disconnect(self, session: int) -> None:
        if self.sessions:
            lost = self.sessions.pop(session % len(self.sessions))
            lost.node.own.leave_all(lost.number)
            self._note_truth()

    @rule(session=st.integers(0, 99), node=st.integers(0, 9), ticks=st.integers(0, 95))
    def move(self, session: int, node: int, ticks: int) -> None:
        """A client loses its connection, and comes back within the grace, on any replica."""
        if not self.sessions:
            return
        lost = self.sessions.pop(session % len(self.sessions))
        lost.node.own.leave_all(lost.number)
        self._note_truth()
        self.run_for(ticks * TICK)
        self._come_back(lost, node)

    def _come_back(self, lost: Session, node: int) -> None:
        connected = [each for each in self.nodes if each.connected]
        moved = Session(connected[node % len(connected)], next(self._numbers), lost.client)
        self.sessions.append(moved)
        for channel, (_, info) in lost.infos.items():
            self._join(moved, channel, info)

    @rule(node=st.integers(0, 9), pattern=st.sampled_from(PATTERNS))
    def watch(self, node: int, pattern: str) -> None:
        chosen = self.nodes[node % len(self.nodes)]
        if (chosen, pattern) not in self.watchers:
            watcher = self.watchers[chosen, pattern] = ModelWatcher(self, chosen, pattern)
            chosen.mirror.watch(pattern, watcher)

    @rule(node=st.integers(0, 9), pattern=st.sampled_from(PATTERNS))
    def unwatch(self, node: int, pattern: str) -> None:
        chosen = self.nodes[node % len(self.nodes)]
        watcher = self.watchers.pop((chosen, pattern), None)
        if watcher is not None:
            chosen.mirror.unwatch(pattern, watcher)

    # What goes wrong

    @rule(node=st.integers(0, 9), deaf=st.booleans())
    def lose_notifications(self, node: int, deaf: bool) -> None:
        self.nodes[node % len(self.nodes)].deaf = deaf

    @rule(node=st.integers(0, 9))
    def kill(self, node: int) -> None:
        """A replica ends at once. Another one takes its place."""
        self.run_for(WRITE_TIME)
        killed = self.nodes[node % len(self.nodes)]
        self.nodes.remove(killed)
        self.watchers = {place: watcher for place, watcher in self.watchers.items() if place[0] is not killed}
        self.sessions = [session for session in self.sessions if session.node is not killed]
        self._start_node()
        self._note_truth()

    @rule(node=st.integers(0, 9), seconds=st.sampled_from([1, 5, 14, 40, 100]), meanwhile=some_events)
    def cut(self, node: int, seconds: int, meanwhile: str) -> None:
        """A replica does not reach the table for some time. It keeps its clients."""
        self.run_for(WRITE_TIME)
        chosen = self.nodes[node % len(self.nodes)]
        chosen.cut()
        self._note_truth()
        self._run_with(meanwhile, seconds)
        chosen.connected = True
        self._note_truth()

    def _run_with(self, meanwhile: str, seconds: float) -> None:
        """Let time pass, in which one more thing happens."""
        self.run_for(seconds / 10)
        if self.sessions:
            match meanwhile:
                case "leave":
                    self.leave(0, next(iter(self.sessions[0].infos), CHANNELS[0]))
                case "disconnect":
                    self.disconnect(0)
                case "disconnect many":
                    while len(self.sessions) > 1:
                        self.disconnect(0)
                case "move":
                    lost = self.sessions.pop(0)
                    lost.node.own.leave_all(lost.number)
                    self._note_truth()
                    self.run_for(min(seconds / 2, 9.0))
                    if any(node.connected for node in self.nodes):
                        self._come_back(lost, 1)
        self.run_for(seconds * 0.9)

    @rule(node=st.integers(0, 9), lost=st.sampled_from(["batch", "reply", "late"]))
    def lose_write(self, node: int, lost: str) -> None:
        """A batch or its reply is lost with the connection. Or the batch arrives when a later one has been written."""
        chosen = self.nodes[node % len(self.nodes)]
        if not (chosen.connected and self.table.available):
            return
        batch = chosen.write(self.table, self.now, lost="reply" if lost == "reply" else "batch")
        chosen.connected = True
        if batch is not None and lost == "late":
            self._late.append((chosen.name, batch))

    @rule()
    def write_late(self) -> None:
        if self._late and self.table.available:
            name, batch = self._late.pop(0)
            self.table.write(name, batch, self.now)
            self._notify()

    @rule(
        seconds=st.sampled_from([0, 2, 15, 90]),
        crash=st.booleans(),
        meanwhile=some_events,
        delays=st.permutations([0.0, 0.9]),
    )
    def stop_database(self, seconds: int, crash: bool, meanwhile: str, delays: list[float]) -> None:
        """The database is away for some time. After a crash the table is empty. Replicas connect at different times."""
        lost = self.sessions[0] if self.sessions and meanwhile == "come back" else None
        if lost is not None:
            self.disconnect(0)
            self.run_for(WRITE_TIME)
        self.table.available = False
        for node in self.nodes:
            if node.connected:
                node.cut()
                node.connected = True
        if crash:
            self.table.crash()
            self._late.clear()
        if lost is not None:
            self.run_for(seconds / 10)
            self._come_back(lost, 1)
        self._run_with(meanwhile, seconds)
        self.table.available = True
        for node, delay in zip(self.nodes, delays, strict=True):
            node.resumes_at = self.now + delay

    # What must be true

    @invariant()
    def pages_have_what_was_announced(self) -> None:
        for (node, pattern), watcher in self.watchers.items():
            if watcher.begun:
                assert sorted(watcher.members.values(), key=lambda each: each.position) == node.present(pattern)

    def teardown(self) -> None:
        """Without further faults, all watchers get to know what is true."""
        for node in self.nodes:
            node.pages = 100
        self.run_for(RECOVERY)
        for (node, pattern), watcher in self.watchers.items():
            assert watcher.begun, f"{pattern} has not begun"
            found = {name: (each.sessions, each.info) for name, each in watcher.members.items()}
            assert found == self._truth(pattern), f"{node.name} {pattern}"

    def _truth(self, pattern: str) -> dict[Name, tuple[int, bytes | None]]:
        found: dict[Name, tuple[int, bytes | None]] = {}
        for channel in CHANNELS:
            for client in {session.client for session in self.sessions}:
                name = channel, client
                if matches(pattern, channel) and (sessions := self.visible(name)):
                    infos = [each.infos[channel] for each in sessions if each.infos[channel][1] is not None]
                    found[name] = len(sessions), max(infos)[1] if infos else None
        return found
