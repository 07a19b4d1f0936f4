"""The checker finds every promise that is broken, and nothing where none is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .history import (
    REMOVAL,
    Answered,
    AnyEvent,
    CaughtUp,
    Connected,
    ConnectionLost,
    DatabaseStatusLogged,
    Effect,
    FaultBegan,
    FaultEnded,
    GapAnnounced,
    LogEntry,
    LogEpoch,
    MapShown,
    MemberAnnounced,
    MemberJoined,
    MemberLeft,
    MembersListed,
    MembersShown,
    Message,
    Published,
    Received,
    RoleChanged,
    RunEnded,
    SubscriptionBegan,
    SubscriptionRevoked,
)
from .history_checker import check_history
from .mistakes import assert_mistakes_fit
from .report import PROMISES, Report

OLD, NEW = "old", "new"
START = 1000.0
COUNTER = "counters.a"
INCREMENTS = {102: ("w1", 1), 103: ("w2", 2)}


class HistoryBuilder:
    """Two epochs of which the second begins after seq 3: what was 4 and 5 in the first is lost, and others come."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []
        self.entries: list[LogEntry] = []

    def add(self, kind: Callable[..., AnyEvent], at: float, /, **fields: Any) -> None:
        self.events.append(kind(at=START + at, **fields))

    def publish(self, number: int, seq: int, at: float, *, channel: str = "a.b", publisher: str = "p") -> None:
        self.add(Published, at, publisher=publisher, number=number, channel=channel)
        self.add(Answered, at + 0.01, publisher=publisher, number=number, seq=seq)

    def append(self, epoch: str, seq: int, number: int, channel: str = "a.b", publisher: str = "p") -> None:
        entry = LogEntry(at=START + 900, epoch=epoch, seq=seq, channel=channel, message=(publisher, number))
        self.entries.append(entry)

    def begin(self, cursor: int, epoch: str, at: float, who: str = "s") -> None:
        self.add(SubscriptionBegan, at, subscriber=who, pattern="a.*", cursor=cursor, epoch=epoch)

    def receive(self, seq: int, message: Message, at: float, epoch: str = OLD, who: str = "s", **fields: Any) -> None:
        fields = {"channel": "a.b", "sent": START + at - 0.02, "pattern": "a.*"} | fields
        self.add(Received, at, subscriber=who, epoch=epoch, seq=seq, message=message, **fields)

    def gap(self, first: int, last: int, epoch: str, reason: str, at: float, who: str = "s") -> None:
        fields = {"epoch": epoch, "first": first, "last": last, "reason": reason}
        self.add(GapAnnounced, at, subscriber=who, pattern="a.*", **fields)

    def increment(self, publisher: str, number: int, at: float, value: int, expect: int, read: Message | None) -> None:
        fields = {"channel": COUNTER, "value": value, "expect": expect, "read": read}
        self.add(Published, at, publisher=publisher, number=number, **fields)

    def show_map(self, at: float, seq: int = 0) -> None:
        """A map shows the increment with this seq, or nothing."""
        self.add(MapShown, at, watcher="m", shown={COUNTER: (seq, NEW, *INCREMENTS[seq])} if seq else {})

    def announce(self, at: float, member: str, *, joined: bool) -> None:
        self.add(MemberAnnounced, at, watcher="w", member=member, joined=joined)

    def add_fault(self, number: int, kind: str, at: float, end: float, replica: str = "r") -> None:
        self.add(FaultBegan, at, number=number, kind=kind, replica=replica, in_flight=1)
        self.add(FaultEnded, end, number=number)

    def check_history(self) -> Report:
        self.events.sort(key=lambda event: event.at)
        epochs = [LogEpoch(at=START + 900, epoch=OLD, after=0), LogEpoch(at=START + 900, epoch=NEW, after=3)]
        return check_history(
            [*self.events, *epochs, *self.entries], database_only={"database killed", "listener silent"}
        )


def sound_history() -> HistoryBuilder:
    """A story in which everything is as promised, and much of it looks as if it were not."""
    history = HistoryBuilder()
    history.add(Connected, 0.0, client="s", replica="r", transport="websocket")
    history.add(DatabaseStatusLogged, 0.0, replica="r", available=True)
    history.begin(0, OLD, 0.0)
    for number in (1, 2, 3):
        history.publish(number, number, number)
        history.append(OLD, number, number)
        history.receive(number, ("p", number), number + 0.02)
    # Two that are lost with their database: one acknowledged, one in doubt.
    history.publish(4, 4, 4.0)
    history.add(Published, 4.1, publisher="p", number=5, channel="a.b")
    history.add(Answered, 9.0, publisher="p", number=5, refusal="unknown")
    history.receive(5, ("p", 5), 4.2)
    history.add_fault(1, "database killed", 5.0, 6.0, replica="")
    history.gap(4, 3, NEW, "epoch", 7.0)
    # One in doubt that is in the log all the same, one that was refused, and one to another channel.
    history.add(Published, 8.0, publisher="p", number=6, channel="a.b")
    history.add(Answered, 8.5, publisher="p", number=6, refusal="unknown")
    history.append(NEW, 4, 6)
    history.append(NEW, 100, 10, "d")
    history.add(Published, 8.05, publisher="p", number=10, channel="d")
    history.add(Answered, 8.06, publisher="p", number=10, refusal="unknown")
    history.receive(4, ("p", 6), 8.1, NEW)
    history.add(Published, 8.2, publisher="p", number=7, channel="a.b")
    history.add(Answered, 8.3, publisher="p", number=7, refusal="unavailable")
    history.publish(8, 5, 8.6, channel="c")
    history.append(NEW, 5, 8, "c")
    history.add(CaughtUp, 9.0, subscriber="s", pattern="a.*", epoch=NEW, seq=5)
    # Who was away while the epoch changed, and had not more than what is the same, goes on without a gap.
    history.begin(0, OLD, 0.0, "t")
    for number in (1, 2, 3):
        history.receive(number, ("p", number), 3.5, who="t")
    history.begin(3, OLD, 9.0, "t")
    history.receive(4, ("p", 6), 9.1, NEW, "t")
    # Who was away for long, and begins with what is left of the log.
    history.begin(0, OLD, 0.0, "u")
    history.publish(9, 6, 100.0)
    history.append(NEW, 6, 9)
    for who in ("s", "t"):
        history.receive(6, ("p", 9), 100.02, NEW, who)
    history.gap(1, 5, NEW, "retention", 100.0, "u")
    history.receive(6, ("p", 9), 100.03, NEW, "u")
    # Permissions: two withdrawals and a message in time, one publish refused.
    history.add(RoleChanged, 120.0, role="x", began=START + 119.9, read=("a.*",), write=("a.*",))
    history.begin(6, NEW, 120.0, "x/s")
    history.add(RoleChanged, 130.0, role="x", began=START + 129.9, read=(), write=())
    history.add(SubscriptionRevoked, 130.1, subscriber="x/s", pattern="a.*")
    history.publish(1, 7, 129.8, publisher="x/p")
    history.append(NEW, 7, 1, publisher="x/p")
    for who in ("s", "t", "u", "x/s"):
        history.receive(7, ("x/p", 1), 129.9, NEW, who)
    history.add(RoleChanged, 140.0, role="x", began=START + 139.9, read=("a.*",), write=("a.*",))
    # A listener that was silent for long, and noticed; ephemeral messages.
    history.add_fault(2, "listener silent", 200.0, 206.0)
    history.add(DatabaseStatusLogged, 204.0, replica="r", available=False)
    history.receive(0, ("e", 1), 210.0, NEW, sent=0.0, session=1)
    history.receive(0, ("e", 1), 210.0, NEW, sent=0.0, session=2)
    tell_of_counters(history)
    tell_of_members(history)
    for seq, number in ((104, 12), (105, 13)):
        history.append(NEW, seq, number, "orders.x")
        history.add(Effect, 900.0, seq=seq, channel="orders.x", message=("p", number))
    history.add(RunEnded, 300.0, epoch=NEW, head=7, floor=1, stayed=("s", "t", "u", "m"))
    return history


def tell_of_counters(history: HistoryBuilder) -> None:
    """Two writers increment a counter that was removed, both at first; one of them gets a conflict."""
    history.append(NEW, 101, REMOVAL[1], COUNTER, REMOVAL[0])
    history.show_map(220.0)
    history.increment("w1", 1, 220.1, 1, 0, None)
    history.increment("w2", 1, 220.1, 1, 0, None)
    history.add(Answered, 220.2, publisher="w1", number=1, seq=102)
    history.show_map(220.2, 102)
    history.add(Answered, 220.2, publisher="w2", number=1, seq=102, refusal="conflict")
    history.increment("w2", 2, 220.3, 2, 102, ("w1", 1))
    history.add(Answered, 220.4, publisher="w2", number=2, seq=103)
    history.show_map(220.4, 103)
    for seq, (publisher, number) in INCREMENTS.items():
        history.append(NEW, seq, number, COUNTER, publisher)


def tell_of_members(history: HistoryBuilder) -> None:
    """One loses its connection and comes back in time, one too late, one never, and one leaves for some seconds."""
    for member in ("here", "late", "pausing"):
        history.add(MemberJoined, 0.5, member=member, replica="r")
    history.add(MembersShown, 5.0, watcher="w", replica="q", members=("here", "late", "pausing"))
    history.add(MemberLeft, 240.0, member="pausing")
    history.add(MemberJoined, 244.0, member="pausing", replica="r")
    history.add_fault(11, "connections reset", 259.9, 260.0)
    for member, back in (("here", 262.0), ("late", 280.0)):
        history.add(ConnectionLost, 260.0, client=member, replica="r")
        history.add(MemberJoined, back, member=member, replica="r")
    history.announce(271.0, "late", joined=False)
    history.announce(280.1, "late", joined=True)
    history.add(MemberJoined, 282.0, member="mortal", replica="r")
    history.announce(282.1, "mortal", joined=True)
    history.add_fault(12, "replica killed", 290.0, 292.0)
    history.add(ConnectionLost, 290.1, client="mortal", replica="r")
    history.add(MemberLeft, 290.1, member="mortal")
    # The watcher is told by another replica again.
    history.add(MembersShown, 309.0, watcher="w", replica="p", members=("here", "late", "pausing", "mortal"))
    history.announce(310.0, "mortal", joined=False)
    there = ("here", "late", "pausing")
    history.add(MembersListed, 315.0, replica="p", members=there, expected=there)


def test_sound_history_passes_and_every_promise_is_checked() -> None:
    report = sound_history().check_history()
    assert not report.broken, str(report)
    assert {name for name, promise in report.promises.items() if not promise.checked} == set()
    assert report.counts["acknowledged messages that were lost with their database"] == 1
    for text in PROMISES.values():
        assert text in str(report)


def change(history: HistoryBuilder, kind: type, wanted: dict[str, Any], **fields: Any) -> None:
    """Change the one event that is as wanted."""
    events = history.entries if kind is LogEntry else history.events
    (index,) = [
        index
        for index, event in enumerate(events)
        if isinstance(event, kind) and all(getattr(event, name) == value for name, value in wanted.items())
    ]
    found = events[index]
    values = {name: getattr(found, name) for name in found.__struct_fields__} | fields
    events[index] = kind(**values)


BREACHES: dict[str, Callable[[HistoryBuilder], object]] = {
    "acknowledged": lambda history: change(history, Answered, {"number": 9}, seq=5),
    "refused": lambda history: change(history, Answered, {"number": 6}, refusal="unavailable"),
    "once": lambda history: history.append(NEW, 8, 9),
    "ordered": lambda history: (history.append(NEW, 9, 2, "d", "q"), history.append(NEW, 10, 1, "d", "q")),
    "agreed": lambda history: change(history, Received, {"subscriber": "t", "seq": 6}, message=("p", 99)),
    "increasing": lambda history: history.receive(6, ("p", 9), 101.0, NEW, "u"),
    "whole": lambda history: change(history, Received, {"subscriber": "s", "seq": 2}, subscriber="nobody"),
    "kept": lambda history: change(history, GapAnnounced, {"subscriber": "u"}, last=6),
    "complete": lambda history: (history.append(NEW, 8, 11), change(history, RunEnded, {}, head=8)),
    "prompt": lambda history: change(history, Received, {"subscriber": "t", "seq": 6}, sent=START + 94.0),
    "readable": lambda history: history.receive(8, ("p", 11), 135.0, NEW, "x/s"),
    "writable": lambda history: history.publish(2, 8, 135.0, publisher="x/p"),
    "connected": lambda history: history.add(ConnectionLost, 5.5, client="s", replica="r"),
    "noticed": lambda history: change(history, DatabaseStatusLogged, {"available": False}, at=START + 205.5),
    "ephemeral": lambda history: history.receive(0, ("e", 1), 211.0, NEW, sent=0.0, session=1),
    "counted": lambda history: change(history, Published, {"publisher": "w2", "number": 2}, expect=101),
    "conflicts": lambda history: change(history, Answered, {"publisher": "w2", "number": 1}, seq=0),
    "mapped": lambda history: history.show_map(220.5, 102),
    "stays": lambda history: (
        history.announce(261.0, "here", joined=False), history.announce(262.1, "here", joined=True)
    ),
    "gone": lambda history: change(history, MemberAnnounced, {"member": "mortal", "joined": False}, at=START + 321.0),
    "same members": lambda history: change(history, MembersListed, {}, members=("here",)),
    "processed": lambda history: change(history, Effect, {"seq": 105}, seq=104),
}  # fmt: skip

ACCOMPANYING = {
    "kept": {"increasing"},
    "once": {"complete"},
}
"""What is broken with it, and rightly so."""


def test_every_promise_has_a_violation() -> None:
    assert set(BREACHES) == set(PROMISES)


@pytest.mark.parametrize("name", BREACHES)
def test_checker_finds_a_violation(name: str) -> None:
    history = sound_history()
    BREACHES[name](history)
    if name in ("readable", "writable"):
        history.append(NEW, 8, *((11,) if name == "readable" else (2, "a.b", "x/p")))
    report = history.check_history()
    assert name in report.broken, str(report)
    assert set(report.broken) <= {name} | ACCOMPANYING.get(name, set()), str(report)
    assert report.promises[name].examples


@pytest.mark.parametrize(
    ("name", "event"),
    [
        ("whole", CaughtUp(at=START + 9.2, subscriber="t", pattern="a.*", epoch=NEW, seq=6)),
        ("whole", SubscriptionBegan(at=START + 99.0, subscriber="t", pattern="a.*", cursor=6, epoch=NEW)),
        ("whole", GapAnnounced(
            at=START + 99.0, subscriber="t", pattern="a.*", epoch=NEW, first=7, last=6, reason="retention"
        )),
        ("whole", CaughtUp(at=START + 6.5, subscriber="s", pattern="a.*", epoch=NEW, seq=5)),
        ("connected", ConnectionLost(at=START + 250.0, client="s", replica="r")),
        ("conflicts", Answered(at=START + 221.0, publisher="w2", number=1, seq=99, refusal="conflict")),
        ("mapped", MapShown(at=START + 221.0, watcher="m", shown={})),
        ("stays", MembersShown(at=START + 289.0, watcher="w", replica="r", members=("here", "pausing"))),
        ("gone", MemberAnnounced(at=START + 311.0, watcher="w", member="mortal", joined=False)),
        ("same members", MemberAnnounced(at=START + 312.0, watcher="w", member="mortal", joined=True)),
        ("processed", Effect(at=START + 901.0, seq=104, channel="orders.x", message=("p", 12))),
    ],
)  # fmt: skip
def test_checker_finds_other_violations(name: str, event: AnyEvent) -> None:
    history = sound_history()
    history.events.append(event)
    assert name in history.check_history().broken


def test_increment_without_the_one_before_is_found() -> None:
    history = sound_history()
    change(history, Published, {"publisher": "w2", "number": 2}, value=3)
    assert history.check_history().broken == ["counted"]


@pytest.mark.parametrize(("read_at", "broken"), [(6.9, []), (60.0, ["counted"])])
def test_writer_may_expect_a_seq_that_a_new_epoch_gave_again(read_at: float, broken: list[str]) -> None:
    """It has read another message with this seq, before the new epoch was known."""
    history = sound_history()
    change(history, Published, {"publisher": "w2", "number": 2}, at=START + read_at, read=("w3", 7), value=9)
    assert history.check_history().broken == broken


@pytest.mark.parametrize(("sent_at", "broken"), [(6.9, []), (60.0, ["refused"])])
def test_attempt_on_its_way_may_succeed_in_a_log_that_was_set_back(sent_at: float, broken: list[str]) -> None:
    history = sound_history()
    history.append(NEW, 106, 1, "counters.b", "w2")
    change(history, Published, {"publisher": "w2", "number": 1}, at=START + sent_at, channel="counters.b")
    change(history, Answered, {"publisher": "w2", "number": 1}, seq=106)
    assert set(history.check_history().broken) - {"ordered", "conflicts", "mapped"} == set(broken)


def test_members_of_a_replica_without_its_database_are_away() -> None:
    history = sound_history()
    history.add_fault(13, "database killed", 100.0, 104.0, replica="")
    history.announce(115.0, "here", joined=False)
    history.announce(116.0, "here", joined=True)
    assert history.check_history().broken == ["stays"]
    history.add_fault(14, "database killed", 104.0, 106.0, replica="")
    assert history.check_history().broken == []


def test_outages_of_the_database_delay_the_announcement() -> None:
    history = sound_history()
    history.add_fault(13, "database killed", 300.0, 302.0, replica="")
    change(history, MemberAnnounced, {"member": "mortal", "joined": False}, at=START + 330.0)
    assert history.check_history().broken == []


@pytest.mark.parametrize(("received", "broken"), [((5, 6), []), ((6,), ["whole"])])
def test_subscription_to_several_patterns_has_the_messages_of_each(
    received: tuple[int, ...], broken: list[str]
) -> None:
    history = sound_history()
    several = "b.* a.* c"
    history.add(SubscriptionBegan, 8.5, subscriber="several", pattern=several, cursor=4, epoch=NEW)
    messages = {5: ("p", 8), 6: ("p", 9)}
    for seq in received:
        channel = {5: "c", 6: "a.b"}[seq]
        history.receive(
            seq, messages[seq], 100.02 + seq / 1000, NEW, "several", pattern=several, channel=channel, sent=START + 100
        )
    assert history.check_history().broken == broken


def test_report_has_measurements() -> None:
    history = sound_history()
    history.add_fault(3, "replica killed", 220.0, 222.0)
    history.add(ConnectionLost, 220.1, client="s", replica="r")
    history.publish(11, 8, 221.0)
    history.append(NEW, 8, 11)
    history.receive(8, ("p", 11), 221.02, NEW)
    report = history.check_history()
    assert report.measurements["replica killed to caught up"].values == [pytest.approx(1.02)]
    assert report.measurements["listener silent to noticed"].values == [pytest.approx(4.0)]
    assert report.measurements["permission withdrawn to `revoked`"].values == [pytest.approx(0.1)]
    assert report.faults == {
        "connections reset": [1], "database killed": [1], "listener silent": [1], "replica killed": [1, 1]
    }  # fmt: skip


def test_every_planted_mistake_fits_the_broker() -> None:
    assert_mistakes_fit()
