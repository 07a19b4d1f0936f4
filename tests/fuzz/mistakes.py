"""Mistakes that a broker can be made to make, in its own process. `BrokerMachine` has to find each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from catbus.auth.tokens import Grants
from catbus.delivery import fan_out, send_queue, subscription, topic_tree
from catbus.errors import PeerError
from catbus.log import MemoryLog
from catbus.protocol import json_splitter
from catbus.protocol import wire_messages as wire
from catbus.session import driver as client_module
from catbus.session import state_machine

Patch = pytest.MonkeyPatch


def every(number: int, mistaken: Callable[..., Any], right: Callable[..., Any]) -> Callable[..., Any]:
    """Right, but for every so many times."""
    count = 0

    def go(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return (mistaken if count % number == 0 else right)(*args, **kwargs)

    return go


def drop_a_message(patch: Patch) -> None:
    patch.setattr(send_queue.Mailbox, "offer", every(7, lambda self, run: True, send_queue.Mailbox.offer))


def swap_two(patch: Patch) -> None:
    right = subscription.find_hits

    def swapped(tree: Any, entries: Sequence[Any]) -> Any:
        return {group: hits[::-1] for group, hits in right(tree, entries).items()}

    for module in (subscription, fan_out):
        patch.setattr(module, "find_hits", swapped)


def repeat_at_the_seam(patch: Patch) -> None:
    right = fan_out.Delivery.subscribe

    def early(self: Any, held: Any, pattern: str, since: int | None = None, epoch: str | None = None) -> None:
        right(self, held, pattern, since if since is None else max(0, since - 1), epoch)

    patch.setattr(fan_out.Delivery, "subscribe", early)


def be_off_by_one(patch: Patch) -> None:
    right = fan_out.Delivery.subscribe

    def late(self: Any, held: Any, pattern: str, since: int | None = None, epoch: str | None = None) -> None:
        right(self, held, pattern, since if since is None else min(self.position, since + 1), epoch)

    patch.setattr(fan_out.Delivery, "subscribe", late)


def leak_a_grant(patch: Patch) -> None:
    patch.setattr(Grants, "may_read", lambda self, pattern: bool(self.read) or pattern == "b")


def go_on_after_revoking(patch: Patch) -> None:
    patch.setattr(client_module.Client, "_withdraw", lambda self, patterns, before, grants: None)


def match_ones_own_prefix(patch: Patch) -> None:
    right = topic_tree.TopicTree.match

    def more(self: Any, channel: str) -> Any:
        return [*right(self, channel), *(g for g in self.groups() if g.pattern == f"{channel}.*")]

    patch.setattr(topic_tree.TopicTree, "match", more)


def answer_somebody_else(patch: Patch) -> None:
    right = state_machine.Session.settled

    def other(self: Any, append: Any, outcome: Any) -> None:
        append.id = append.id and append.id + 1
        right(self, append, outcome)

    patch.setattr(state_machine.Session, "settled", every(5, other, right))


def go_on_after_unsubscribing(patch: Patch) -> None:
    right = client_module.Client._take_out

    def forget(self: Any, pattern: str) -> Any:
        held = self._subscriptions.get(pattern)
        return held if held is not None else right(self, pattern)

    patch.setattr(client_module.Client, "_take_out", forget)


def stumble_over_a_split_object(patch: Patch) -> None:
    right = json_splitter.Framer.feed

    def whole(self: Any, data: bytes) -> Any:
        if self.__class__ is json_splitter.Framer and self._decode is wire.decode_client and data.strip()[-1:] != b"}":
            raise RuntimeError("half an object")
        return right(self, data)

    patch.setattr(json_splitter.Framer, "feed", whole)


def publish_what_is_sent_again(patch: Patch) -> None:
    right = MemoryLog._take

    def anew(self: Any, append: Any, entries: Any) -> Any:
        append.producer = None
        return right(self, append, entries)

    patch.setattr(MemoryLog, "_take", anew)


def stumble_over_nonsense(patch: Patch) -> None:
    def fail(error: Exception) -> PeerError:
        raise RuntimeError("nobody has thought of that")

    patch.setattr(json_splitter, "refusal", fail)


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
    publish_what_is_sent_again,
    stumble_over_nonsense,
]
