"""Mistakes that are planted in a broker of this process. `BrokerMachine` has to find each of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from msgspec import structs

from catbus.auth.grants import Grants, Identity
from catbus.auth.live_permissions import LivePermissions
from catbus.close_codes import CloseCode
from catbus.delivery import send_queue, snapshot_page, subscription, topic_tree
from catbus.delivery.encoded_messages import EncodedMessages
from catbus.delivery.fan_out import Delivery
from catbus.delivery.subscription import Subscription
from catbus.endpoints.http.event_stream import EventStream
from catbus.endpoints.webtransport.webtransport_session import WebTransportSession
from catbus.errors import PeerError
from catbus.log import Append, Entry, MemoryLog, Outcome, RetainedMessages, RetainedPage
from catbus.protocol import json_splitter, server_sent_events
from catbus.protocol import wire_messages as wire
from catbus.replica import Replica
from catbus.session import state_machine
from catbus.session.driver import SessionDriver
from catbus.session.session_presence import SessionPresence
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


def leave_members_in_their_channels(planter: MistakePlanter) -> None:
    def leave(self: SessionPresence, channel: str, number: int | None = None) -> None:
        self._session.left(channel, number)

    planter.replace(SessionPresence, "leave", leave)


def fail_on_malformed_input(planter: MistakePlanter) -> None:
    def fail(error: Exception, data: bytes = b"") -> PeerError:
        raise RuntimeError("malformed input")

    planter.replace(json_splitter, "decoding_error", fail)


def skip_a_message_when_an_event_stream_resumes(planter: MistakePlanter) -> None:
    right = EventStream.subscribe

    async def late(
        self: EventStream,
        token: str,
        patterns: tuple[str, ...],
        cursor: tuple[int, str | None] | None,
        **options: Any,
    ) -> None:
        await right(self, token, patterns, cursor and (cursor[0] + 1, cursor[1]), **options)

    planter.replace(EventStream, "subscribe", every(2, late, right))


def send_an_id_ahead_of_its_messages(planter: MistakePlanter) -> None:
    right = server_sent_events.encode_event

    def ahead(reply: wire.Reply, epoch: str, **options: Any) -> bytes | None:
        if isinstance(reply, wire.Live | wire.Head):
            reply = structs.replace(reply, seq=reply.seq + 1)
        return right(reply, epoch, **options)

    planter.replace(server_sent_events, "encode_event", ahead)


def open_an_event_stream_without_a_grant(planter: MistakePlanter) -> None:
    def check_subscribe(self: state_machine.Session, patterns: Collection[str]) -> None:
        pass

    planter.replace(state_machine.Session, "check_subscribe", check_subscribe)


def leave_the_event_streams_of_a_disconnected_client_open(planter: MistakePlanter) -> None:
    right = SessionDriver.close

    def close(self: SessionDriver, code: CloseCode, reason: str) -> None:
        if self.transport != "sse" or code != CloseCode.DISCONNECTED:
            right(self, code, reason)

    planter.replace(SessionDriver, "close", close)


def leave_the_sessions_of_a_disconnected_client_open(planter: MistakePlanter) -> None:
    async def leave(self: Replica, client_id: str) -> int:
        return 1

    planter.replace(Replica, "disconnect_client", leave)


def deliver_a_copy_for_each_pattern_to_a_first_version_client(planter: MistakePlanter) -> None:
    def update(self: subscription.Subscription) -> None:
        self.merge_key = frozenset(self.patterns) if self.is_event_stream else None

    planter.replace(subscription.Subscription, "_update_merge_key", update)


def leave_a_message_out_of_a_snapshot(planter: MistakePlanter) -> None:
    right = MemoryLog.retained

    async def retained(self: MemoryLog, pattern: str, **options: Any) -> RetainedPage:
        page = await right(self, pattern, **options)
        return replace(page, entries=page.entries[1:])

    planter.replace(MemoryLog, "retained", retained)


def leave_a_message_out_of_the_snapshot_of_an_event_stream(planter: MistakePlanter) -> None:
    right = server_sent_events.encode_retained_event

    def shorter(messages: Iterable[bytes], complete: bool) -> bytes:
        return right(list(messages)[1:], complete)

    planter.replace(snapshot_page, "encode_retained_event", shorter)


def hide_leaves_from_event_streams(planter: MistakePlanter) -> None:
    right = server_sent_events.encode_event

    def joins_only(reply: wire.Reply, epoch: str, *, snapshot_follows: bool = False) -> bytes | None:
        hidden = isinstance(reply, wire.PresenceChange) and reply.action == "leave"
        return server_sent_events.COMMENT if hidden else right(reply, epoch, snapshot_follows=snapshot_follows)

    planter.replace(server_sent_events, "encode_event", joins_only)


def replace_any_retained_message(planter: MistakePlanter) -> None:
    def check(self: RetainedMessages, append: Append) -> None:
        pass

    planter.replace(RetainedMessages, "check", check)


def keep_a_removed_message(planter: MistakePlanter) -> None:
    right = RetainedMessages.replace

    def keep(self: RetainedMessages, entry: Entry, key: tuple[bytes, int] | None) -> None:
        if entry.payload != b"null":
            right(self, entry, key)

    planter.replace(RetainedMessages, "replace", keep)


def send_newer_fields_to_a_first_version_client(planter: MistakePlanter) -> None:
    right = wire.encode

    def newer(message: wire.Request | wire.Reply, protocol: wire.ProtocolVersion) -> bytes | None:
        return right(message, wire.ProtocolVersion.V1 if isinstance(message, wire.Subscribed) else protocol)

    planter.replace(server_sent_events, "encode", newer)


def hide_a_withdrawal_from_a_first_version_client(planter: MistakePlanter) -> None:
    right = wire.encode

    def silent(message: wire.Request | wire.Reply, protocol: wire.ProtocolVersion) -> bytes | None:
        first = protocol is wire.ProtocolVersion.FIRST
        return None if first and isinstance(message, wire.Revoked) else right(message, protocol)

    planter.replace(server_sent_events, "encode", silent)


def drop_the_messages_of_a_stream_of_its_own(planter: MistakePlanter) -> None:
    open_stream, offer = WebTransportSession.open_stream, send_queue.SendQueue.offer
    own: list[send_queue.SendQueue] = []

    def remember(
        self: WebTransportSession, on_stopped: Callable[[send_queue.SendQueue], None]
    ) -> send_queue.SendQueue | None:
        opened = open_stream(self, on_stopped)
        if opened is not None:
            own.append(opened)
        return opened

    def drop(self: send_queue.SendQueue, run: EncodedMessages) -> bool:
        return any(self is each for each in own) or offer(self, run)

    planter.replace(WebTransportSession, "open_stream", remember)
    planter.replace(send_queue.SendQueue, "offer", drop)


def send_a_datagram_and_its_message(planter: MistakePlanter) -> None:
    right = WebTransportSession.send_datagram

    def also(self: WebTransportSession, data: bytes) -> bool:
        right(self, data)
        return False

    planter.replace(WebTransportSession, "send_datagram", also)


def ignore_a_changed_role(planter: MistakePlanter) -> None:
    async def update(
        self: LivePermissions, keys: Collection[bytes], identities: Mapping[bytes, Identity], asked: int
    ) -> None:
        pass

    planter.replace(LivePermissions, "_update", update)


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
    leave_members_in_their_channels,
    skip_a_message_when_an_event_stream_resumes,
    send_an_id_ahead_of_its_messages,
    open_an_event_stream_without_a_grant,
    leave_the_event_streams_of_a_disconnected_client_open,
    leave_the_sessions_of_a_disconnected_client_open,
    deliver_a_copy_for_each_pattern_to_a_first_version_client,
    leave_a_message_out_of_a_snapshot,
    replace_any_retained_message,
    keep_a_removed_message,
    send_newer_fields_to_a_first_version_client,
    hide_a_withdrawal_from_a_first_version_client,
    leave_a_message_out_of_the_snapshot_of_an_event_stream,
    hide_leaves_from_event_streams,
]
WEBTRANSPORT_MISTAKES = [
    drop_the_messages_of_a_stream_of_its_own,
    send_a_datagram_and_its_message,
]
"""Mistakes that only clients over WebTransport find."""
ROLE_MISTAKES = [ignore_a_changed_role]
"""Mistakes that only clients with roles find."""
