"""catbus.testing.BrokerMachine: it agrees with the broker, and with no broker that makes a mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test

from catbus import delivery, framing, mailbox, session, subscription, topics, wire
from catbus.auth import Grants
from catbus.hub import client as client_module
from catbus.testing import BrokerMachine, TestBroker, WebSocketConnection, open_test_broker
from catbus.testing import machine as machine_module

QUICK = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
# What was found need not be made small: with mistakes that are made now and then only, it is another one each time.
FINDING = settings(QUICK, max_examples=300, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)


def machine_for(broker: TestBroker) -> type[BrokerMachine]:
    class Machine(BrokerMachine):
        secret = broker.secret

        def connect(self) -> WebSocketConnection:
            return WebSocketConnection(broker.url)

    return Machine


@pytest.fixture(scope="module")
def broker() -> Iterator[TestBroker]:
    with open_test_broker() as broker:
        yield broker


def test_the_broker_does_what_the_model_does(broker: TestBroker) -> None:
    run_state_machine_as_test(machine_for(broker), settings=QUICK)


# Brokers that make a mistake


def every(number: int, mistaken: Callable[..., Any], right: Callable[..., Any]) -> Callable[..., Any]:
    """Right, but for every so many times."""
    count = 0

    def go(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return (mistaken if count % number == 0 else right)(*args, **kwargs)

    return go


Patch = pytest.MonkeyPatch


def drop_a_message(patch: Patch) -> None:
    patch.setattr(mailbox.Mailbox, "offer", every(7, lambda self, run: True, mailbox.Mailbox.offer))


def swap_two(patch: Patch) -> None:
    right = subscription.find_hits

    def swapped(tree: Any, entries: Sequence[Any]) -> Any:
        return {group: hits[::-1] for group, hits in right(tree, entries).items()}

    for module in (subscription, delivery):
        patch.setattr(module, "find_hits", swapped)


def repeat_at_the_seam(patch: Patch) -> None:
    right = delivery.Delivery.subscribe

    def early(self: Any, held: Any, pattern: str, since: int | None = None, epoch: str | None = None) -> None:
        right(self, held, pattern, since if since is None else max(0, since - 1), epoch)

    patch.setattr(delivery.Delivery, "subscribe", early)


def be_off_by_one(patch: Patch) -> None:
    right = delivery.Delivery.subscribe

    def late(self: Any, held: Any, pattern: str, since: int | None = None, epoch: str | None = None) -> None:
        right(self, held, pattern, since if since is None else min(self.position, since + 1), epoch)

    patch.setattr(delivery.Delivery, "subscribe", late)


def leak_a_grant(patch: Patch) -> None:
    patch.setattr(Grants, "may_read", lambda self, pattern: bool(self.read) or pattern == "b")


def go_on_after_revoking(patch: Patch) -> None:
    patch.setattr(client_module.Client, "_withdraw", lambda self, patterns, before, grants: None)


def match_ones_own_prefix(patch: Patch) -> None:
    right = topics.TopicTree.match

    def more(self: Any, channel: str) -> Any:
        return [*right(self, channel), *(g for g in self.groups() if g.pattern == f"{channel}.*")]

    patch.setattr(topics.TopicTree, "match", more)


def answer_somebody_else(patch: Patch) -> None:
    right = session.Session.settled

    def other(self: Any, append: Any, outcome: Any) -> None:
        append.id = append.id and append.id + 1
        right(self, append, outcome)

    patch.setattr(session.Session, "settled", every(5, other, right))


def go_on_after_unsubscribing(patch: Patch) -> None:
    right = client_module.Client._take_out

    def forget(self: Any, pattern: str) -> Any:
        held = self._subscriptions.get(pattern)
        return held if held is not None else right(self, pattern)

    patch.setattr(client_module.Client, "_take_out", forget)


def stumble_over_a_split_object(patch: Patch) -> None:
    right = framing.Framer.feed

    def whole(self: Any, data: bytes) -> Any:
        if self.__class__ is framing.Framer and self._decode is wire.decode_client and data.strip()[-1:] != b"}":
            raise RuntimeError("half an object")
        return right(self, data)

    patch.setattr(framing.Framer, "feed", whole)


MISTAKES = [
    drop_a_message,
    swap_two,
    repeat_at_the_seam,
    be_off_by_one,
    leak_a_grant,
    go_on_after_revoking,
    match_ones_own_prefix,
    answer_somebody_else,
    go_on_after_unsubscribing,
    stumble_over_a_split_object,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(mistake: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "PATIENCE", 1.0)
    monkeypatch.setattr(machine_module, "SETTLING", 0.3)
    with open_test_broker() as broker, monkeypatch.context() as patch:
        mistake(patch)
        with pytest.raises((AssertionError, ExceptionGroup, Flaky)):
            run_state_machine_as_test(machine_for(broker), settings=FINDING)
