"""When a session is told, by `head`, up to which seq it is complete."""

from __future__ import annotations

import random

import trio

from ..delivery.fan_out import Delivery
from ..delivery.send_queue import SendQueue
from ..log import Log
from ..protocol.server_sent_events import COMMENT
from ..protocol.wire_messages import Head, ProtocolVersion
from .state_machine import Session

HEAD_INTERVAL = 15.0
"""Seconds without anything sent after which a session gets `head`."""


class HeadSender:
    """Sends `head` on the streams of one session, unless a subscription on them lags."""

    def __init__(self, session: Session, delivery: Delivery, log: Log) -> None:
        self._session = session
        self._delivery = delivery
        self._log = log
        self._sent = 0
        """The seq of the last `head` on the session's own stream."""
        self._next = trio.current_time() + random.uniform(0, HEAD_INTERVAL)  # noqa: S311 (no secret)

    def send_due(self, now: float) -> None:
        """Send `head` if it is due and nothing was sent for `HEAD_INTERVAL`."""
        if now >= self._next:
            self._next = now + HEAD_INTERVAL
            self.send(now - HEAD_INTERVAL)

    def send(self, quiet_since: float | None = None) -> None:
        """Send `head` on each stream, unless a subscription on it lags.

        With `quiet_since`, send only where nothing was sent since then, and where `head` is new to a subscription. An
        event stream gets a block each time, because proxies close a connection on which nothing is sent.
        """
        session, send_queue = self._session, self._session.send_queue
        if session.identity is None:
            return
        head = Head(self._delivery.position, self._log.epoch, self._delivery.at)
        shared = lagging = False
        for subscription in session.subscriptions.values():
            own = subscription.send_queue
            if own is send_queue:
                shared, lagging = True, lagging or subscription.lagging
            elif subscription.lagging or own.full or subscription.head_sent == head.seq:
                continue
            elif _is_quiet(own, quiet_since):
                subscription.head_sent = head.seq
                session.send(head, own)
        events = session.protocol is ProtocolVersion.EVENTS
        new = events or self._sent != head.seq
        if quiet_since is not None and not (shared and new and _is_quiet(send_queue, quiet_since)):
            return
        if events and not shared:
            return  # Its cursor would skip what the subscription is about to get.
        if not lagging:
            self._sent = head.seq
            session.send(head)
        elif events and not send_queue:
            send_queue.put(COMMENT)


def _is_quiet(send_queue: SendQueue, since: float | None) -> bool:
    """Return whether a send queue is empty and was last flushed before `since`; always True without `since`."""
    return since is None or (not send_queue and send_queue.lingers_until < since)
