"""The checker finds every promise that is broken, and nothing where none is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .checker import PROMISES, Report, judge
from .history import (
    Answered,
    AnyEvent,
    Began,
    Complete,
    Ended,
    Entry,
    Epoch,
    Gapped,
    Granted,
    Healed,
    Hurt,
    Linked,
    Lost,
    Message,
    Noticed,
    Published,
    Received,
    Revoked,
)

OLD, NEW = "old", "new"
START = 1000.0


class Story:
    """Two epochs of which the second begins after seq 3: what was 4 and 5 in the first is lost, and others come."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []
        self.entries: list[Entry] = []

    def add(self, kind: Callable[..., AnyEvent], at: float, /, **fields: Any) -> None:
        self.events.append(kind(at=START + at, **fields))

    def publish(self, number: int, seq: int, at: float, *, channel: str = "a.b", publisher: str = "p") -> None:
        self.add(Published, at, publisher=publisher, number=number, channel=channel)
        self.add(Answered, at + 0.01, publisher=publisher, number=number, seq=seq)

    def append(self, epoch: str, seq: int, number: int, channel: str = "a.b", publisher: str = "p") -> None:
        entry = Entry(at=START + 900, epoch=epoch, seq=seq, channel=channel, message=(publisher, number))
        self.entries.append(entry)

    def begin(self, cursor: int, epoch: str, at: float, who: str = "s") -> None:
        self.add(Began, at, subscriber=who, pattern="a.*", cursor=cursor, epoch=epoch)

    def receive(self, seq: int, message: Message, at: float, epoch: str = OLD, who: str = "s", **fields: Any) -> None:
        fields = {"channel": "a.b", "sent": START + at - 0.02, "pattern": "a.*"} | fields
        self.add(Received, at, subscriber=who, epoch=epoch, seq=seq, message=message, **fields)

    def gap(self, first: int, last: int, epoch: str, reason: str, at: float, who: str = "s") -> None:
        fields = {"epoch": epoch, "first": first, "last": last, "reason": reason}
        self.add(Gapped, at, subscriber=who, pattern="a.*", **fields)

    def hurt(self, number: int, kind: str, at: float, end: float, replica: str = "r") -> None:
        self.add(Hurt, at, number=number, kind=kind, replica=replica, flying=1)
        self.add(Healed, end, number=number)

    def judge(self) -> Report:
        self.events.sort(key=lambda event: event.at)
        epochs = [Epoch(at=START + 900, epoch=OLD, after=0), Epoch(at=START + 900, epoch=NEW, after=3)]
        return judge([*self.events, *epochs, *self.entries], database_only={"database killed", "listener silent"})


def tell() -> Story:
    """A story in which everything is as promised, and much of it looks as if it were not."""
    story = Story()
    story.add(Linked, 0.0, client="s", replica="r", transport="websocket")
    story.add(Noticed, 0.0, replica="r", available=True)
    story.begin(0, OLD, 0.0)
    for number in (1, 2, 3):
        story.publish(number, number, number)
        story.append(OLD, number, number)
        story.receive(number, ("p", number), number + 0.02)
    # Two that are lost with their database: one acknowledged, one in doubt.
    story.publish(4, 4, 4.0)
    story.add(Published, 4.1, publisher="p", number=5, channel="a.b")
    story.add(Answered, 9.0, publisher="p", number=5, refusal="unknown")
    story.receive(5, ("p", 5), 4.2)
    story.hurt(1, "database killed", 5.0, 6.0, replica="")
    story.gap(4, 3, NEW, "epoch", 7.0)
    # One in doubt that is in the log all the same, one that was refused, and one to another channel.
    story.add(Published, 8.0, publisher="p", number=6, channel="a.b")
    story.add(Answered, 8.5, publisher="p", number=6, refusal="unknown")
    story.append(NEW, 4, 6)
    story.append(NEW, 100, 10, "d")
    story.add(Published, 8.05, publisher="p", number=10, channel="d")
    story.add(Answered, 8.06, publisher="p", number=10, refusal="unknown")
    story.receive(4, ("p", 6), 8.1, NEW)
    story.add(Published, 8.2, publisher="p", number=7, channel="a.b")
    story.add(Answered, 8.3, publisher="p", number=7, refusal="unavailable")
    story.publish(8, 5, 8.6, channel="c")
    story.append(NEW, 5, 8, "c")
    story.add(Complete, 9.0, subscriber="s", pattern="a.*", epoch=NEW, seq=5)
    # Who was away while the epoch changed, and had not more than what is the same, goes on without a gap.
    story.begin(0, OLD, 0.0, "t")
    for number in (1, 2, 3):
        story.receive(number, ("p", number), 3.5, who="t")
    story.begin(3, OLD, 9.0, "t")
    story.receive(4, ("p", 6), 9.1, NEW, "t")
    # Who was away for long, and begins with what is left of the log.
    story.begin(0, OLD, 0.0, "u")
    story.publish(9, 6, 100.0)
    story.append(NEW, 6, 9)
    for who in ("s", "t"):
        story.receive(6, ("p", 9), 100.02, NEW, who)
    story.gap(1, 5, NEW, "retention", 100.0, "u")
    story.receive(6, ("p", 9), 100.03, NEW, "u")
    # Permissions: two withdrawals and a message in time, one publish refused.
    story.add(Granted, 120.0, role="x", began=START + 119.9, read=("a.*",), write=("a.*",))
    story.begin(6, NEW, 120.0, "x/s")
    story.add(Granted, 130.0, role="x", began=START + 129.9, read=(), write=())
    story.add(Revoked, 130.1, subscriber="x/s", pattern="a.*")
    story.publish(1, 7, 129.8, publisher="x/p")
    story.append(NEW, 7, 1, publisher="x/p")
    for who in ("s", "t", "u", "x/s"):
        story.receive(7, ("x/p", 1), 129.9, NEW, who)
    story.add(Granted, 140.0, role="x", began=START + 139.9, read=("a.*",), write=("a.*",))
    # A listener that was silent for long, and noticed; ephemeral messages.
    story.hurt(2, "listener silent", 200.0, 206.0)
    story.add(Noticed, 204.0, replica="r", available=False)
    story.receive(0, ("e", 1), 210.0, NEW, sent=0.0, session=1)
    story.receive(0, ("e", 1), 210.0, NEW, sent=0.0, session=2)
    story.add(Ended, 300.0, epoch=NEW, head=7, floor=1, stayed=("s", "t", "u"))
    return story


def test_a_sound_history_is_found_sound_and_every_promise_is_looked_at() -> None:
    report = tell().judge()
    assert not report.broken, str(report)
    assert {name for name, promise in report.promises.items() if not promise.checked} == set()
    assert report.counts["acknowledged messages that were lost with their database"] == 1
    for text in PROMISES.values():
        assert text in str(report)


def change(story: Story, kind: type, wanted: dict[str, Any], **fields: Any) -> None:
    """Change the one event that is as wanted."""
    events = story.entries if kind is Entry else story.events
    (index,) = [
        index
        for index, event in enumerate(events)
        if isinstance(event, kind) and all(getattr(event, name) == value for name, value in wanted.items())
    ]
    found = events[index]
    values = {name: getattr(found, name) for name in found.__struct_fields__} | fields
    events[index] = kind(**values)  # type: ignore[call-overload, assignment]


BREACHES: dict[str, Callable[[Story], object]] = {
    "acknowledged": lambda story: change(story, Answered, {"number": 9}, seq=5),
    "refused": lambda story: change(story, Answered, {"number": 6}, refusal="unavailable"),
    "once": lambda story: story.append(NEW, 8, 9),
    "ordered": lambda story: (story.append(NEW, 9, 2, "d", "q"), story.append(NEW, 10, 1, "d", "q")),
    "agreed": lambda story: change(story, Received, {"subscriber": "t", "seq": 6}, message=("p", 99)),
    "increasing": lambda story: story.receive(6, ("p", 9), 101.0, NEW, "u"),
    "whole": lambda story: change(story, Received, {"subscriber": "s", "seq": 2}, subscriber="nobody"),
    "kept": lambda story: change(story, Gapped, {"subscriber": "u"}, last=6),
    "complete": lambda story: (story.append(NEW, 8, 11), change(story, Ended, {}, head=8)),
    "prompt": lambda story: change(story, Received, {"subscriber": "t", "seq": 6}, sent=START + 94.0),
    "readable": lambda story: story.receive(8, ("p", 11), 135.0, NEW, "x/s"),
    "writable": lambda story: story.publish(2, 8, 135.0, publisher="x/p"),
    "connected": lambda story: story.add(Lost, 5.5, client="s", replica="r"),
    "noticed": lambda story: change(story, Noticed, {"available": False}, at=START + 205.5),
    "ephemeral": lambda story: story.receive(0, ("e", 1), 211.0, NEW, sent=0.0, session=1),
}

COMPANIONS = {
    "kept": {"increasing"},
    "once": {"complete"},
}
"""What is broken with it, and rightly so."""


def test_there_is_a_breach_of_every_promise() -> None:
    assert set(BREACHES) == set(PROMISES)


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_found(name: str) -> None:
    story = tell()
    BREACHES[name](story)
    if name in ("readable", "writable"):
        story.append(NEW, 8, *((11,) if name == "readable" else (2, "a.b", "x/p")))
    report = story.judge()
    assert name in report.broken, str(report)
    assert set(report.broken) <= {name} | COMPANIONS.get(name, set()), str(report)
    assert report.promises[name].told


@pytest.mark.parametrize(
    ("name", "event"),
    [
        ("whole", Complete(at=START + 9.2, subscriber="t", pattern="a.*", epoch=NEW, seq=6)),
        ("whole", Began(at=START + 99.0, subscriber="t", pattern="a.*", cursor=6, epoch=NEW)),
        ("whole", Gapped(
            at=START + 99.0, subscriber="t", pattern="a.*", epoch=NEW, first=7, last=6, reason="retention"
        )),
        ("whole", Complete(at=START + 6.5, subscriber="s", pattern="a.*", epoch=NEW, seq=5)),
        ("connected", Lost(at=START + 250.0, client="s", replica="r")),
    ],
)  # fmt: skip
def test_other_breaches_are_found(name: str, event: AnyEvent) -> None:
    story = tell()
    story.events.append(event)
    assert name in story.judge().broken


def test_what_is_reported_is_measured() -> None:
    story = tell()
    story.hurt(3, "replica killed", 220.0, 222.0)
    story.add(Lost, 220.1, client="s", replica="r")
    story.publish(11, 8, 221.0)
    story.append(NEW, 8, 11)
    story.receive(8, ("p", 11), 221.02, NEW)
    report = story.judge()
    assert report.figures["replica killed to caught up"].values == [pytest.approx(1.02)]
    assert report.figures["listener silent to noticed"].values == [pytest.approx(4.0)]
    assert report.figures["permission withdrawn to `revoked`"].values == [pytest.approx(0.1)]
    assert report.faults == {"database killed": [1], "listener silent": [1], "replica killed": [1]}
