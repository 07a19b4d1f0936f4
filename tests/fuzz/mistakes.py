"""Mistakes that are planted in a broker of this process. `BrokerMachine` has to find each of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from catbus.auth.grants import Grants
from catbus.delivery import send_queue, subscription, topic_tree
from catbus.delivery.fan_out import Delivery
from catbus.delivery.subscription import Subscription
from catbus.errors import PeerError
from catbus.log import Append, Entry, MemoryLog, Outcome
from catbus.protocol import json_splitter
from catbus.protocol import wire_messages as wire
from catbus.session import state_machine
from catbus.session.driver import SessionDriver
from catbus.session.session_subscriptions import SessionSubscriptions
from tests.mistakes import MistakePlanter

T = TypeVar("T")


def every(number: int, wrong: Callable[..., T], right: Callable[..., T]) -> Callable[..., T]:
    """Return a function that calls `wrong` every `number`-th time, and `right` otherwise."""
    count = 0

    def either(*args: Any, **kwargs: Any) -> T:
        nonlocal count
        count += 1
        return (wrong if count % number == 0 else right)(*args, **kwargs)

    return either


def drop_a_message(planter: MistakePlanter) -> None:
    planter.replace(send_queue.SendQueue, "offer", every(7, lambda self, run: True, send_queue.SendQueue.offer))


def deliver_a_batch_in_reverse_order(planter: MistakePlanter) -> None:
    right = subscription.find_hits

    def reversed_hits(tree: topic_tree.TopicTree[Subscription], entries: Sequence[Entry]) -> Any:
        return {group: hits[::-1] for group, hits in right(tree, entries).items()}

    planter.replace(subscription, "find_hits", reversed_hits)


def repeat_a_message_when_catching_up(planter: MistakePlanter) -> None:
    right = Delivery.subscribe

    def early(
        self: Delivery, subscription: Subscription, pattern: str, since: int | None = None, epoch: str | None = None
    ) -> None:
        right(self, subscription, pattern, since if since is None else max(0, since - 1), epoch)

    planter.replace(Delivery, "subscribe", early)


def skip_a_message_when_catching_up(planter: MistakePlanter) -> None:
    right = Delivery.subscribe

    def late(
        self: Delivery, subscription: Subscription, pattern: str, since: int | None = None, epoch: str | None = None
    ) -> None:
        right(self, subscription, pattern, since if since is None else min(self.position, since + 1), epoch)

    planter.replace(Delivery, "subscribe", late)


def allow_reading_without_a_grant(planter: MistakePlanter) -> None:
    def may_read(self: Grants, pattern: str) -> bool:
        return bool(self.read) or pattern == "b"

    planter.replace(Grants, "may_read", may_read)


def deliver_after_revocation(planter: MistakePlanter) -> None:
    def revoke(self: SessionDriver, patterns: Collection[str], before: Grants, grants: Grants) -> None:
        pass

    planter.replace(SessionDriver, "_revoke", revoke)


def match_the_prefix_of_a_pattern(planter: MistakePlanter) -> None:
    right = topic_tree.TopicTree.match

    def more(self: topic_tree.TopicTree[Any], channel: str) -> Iterable[Any]:
        return [*right(self, channel), *(group for group in self.groups() if group.pattern == f"{channel}.*")]

    planter.replace(topic_tree.TopicTree, "match", more)


def reply_with_the_wrong_id(planter: MistakePlanter) -> None:
    right = state_machine.Session.settled

    def other(self: state_machine.Session, append: Append, outcome: Outcome) -> None:
        append.id = append.id and append.id + 1
        right(self, append, outcome)

    planter.replace(state_machine.Session, "settled", every(5, other, right))


def deliver_after_unsubscribe(planter: MistakePlanter) -> None:
    def remove(self: SessionSubscriptions, pattern: str) -> Subscription | None:
        return self._session.remove_subscription(pattern)

    planter.replace(SessionSubscriptions, "_remove", remove)


def fail_on_a_split_object(planter: MistakePlanter) -> None:
    right = json_splitter.JsonSplitter.feed

    def whole(self: json_splitter.JsonSplitter[Any], data: bytes) -> Iterator[Any]:
        if (
            self.__class__ is json_splitter.JsonSplitter
            and self._decode is wire.decode_client
            and data.strip()[-1:] != b"}"
        ):
            raise RuntimeError("half an object")
        return right(self, data)

    planter.replace(json_splitter.JsonSplitter, "feed", whole)


def publish_a_retry_twice(planter: MistakePlanter) -> None:
    right = MemoryLog._take

    def anew(self: MemoryLog, append: Append, entries: list[Entry]) -> Outcome:
        append.producer = None
        return right(self, append, entries)

    planter.replace(MemoryLog, "_take", anew)


def fail_on_malformed_input(planter: MistakePlanter) -> None:
    def fail(error: Exception, data: bytes = b"") -> PeerError:
        raise RuntimeError("malformed input")

    planter.replace(json_splitter, "decoding_error", fail)


MISTAKES = [
    drop_a_message,
    deliver_a_batch_in_reverse_order,
    repeat_a_message_when_catching_up,
    skip_a_message_when_catching_up,
    allow_reading_without_a_grant,
    deliver_after_revocation,
    match_the_prefix_of_a_pattern,
    reply_with_the_wrong_id,
    deliver_after_unsubscribe,
    fail_on_a_split_object,
    publish_a_retry_twice,
    fail_on_malformed_input,
]
