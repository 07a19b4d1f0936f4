"""A subscriber over server-sent events. It has no client library: it trusts the ids that the broker sends."""

from __future__ import annotations

from math import inf
from typing import Any
from urllib.parse import urlencode

import msgspec
import trio

from catbus.client import Message
from catbus.close_codes import CloseCode
from tests.endpoints.event_source import EventSource
from tests.server_sent_events import Event

from .clients import PATTERNS, LoadClient, LoadState, record_received
from .history import CaughtUp, GapAnnounced, SubscriptionBegan, SubscriptionRevoked, now

HEAD_TIMEOUT = 2.0
"""Seconds to wait for the head of the response."""
SILENCE_LIMIT = 40.0
"""Seconds after which a stream without a block is given up. Section 14 promises one every 30 s."""
FIRST_RETRY = 0.5
"""Seconds between attempts until the broker has sent `retry`."""


class EventStreamClient(LoadClient):
    """A client of `/events`: one stream, and so one subscription with one cursor, for all its patterns.

    It reconnects after `retry` and resumes with `Last-Event-ID`. With a `lifetime`, it leaves after a random number of
    seconds between the two, and resumes elsewhere. `pause`: seconds that it takes for each block.
    """

    cursor = 0
    epoch = ""

    def __init__(
        self,
        state: LoadState,
        name: str,
        *patterns: str,
        token: str | None = None,
        lifetime: tuple[float, float] = (inf, inf),
        pause: float = 0.0,
    ) -> None:
        super().__init__(state, name, ["sse"], token)
        self._pattern = " ".join(patterns)
        self._target = "/events?" + urlencode([("pattern", pattern) for pattern in patterns])
        self._lifetime = lifetime
        self._pause = pause
        self._last_id = ""
        self._retry = FIRST_RETRY
        self._session = 0

    async def run(self) -> None:
        rng = self.state.rng
        while True:
            least, most = self._lifetime
            with trio.move_on_after(inf if least == inf else rng.uniform(least, most)) as stay:
                await self._read_stream()
            if stay.cancelled_caught:
                self.record_left()
            self.record_lost()
            await trio.sleep(rng.uniform(0, 0.5) if stay.cancelled_caught else self._retry)

    async def _read_stream(self) -> None:
        """Read one stream to its end."""
        slot = self.choose_slot()
        self._last_dialled = slot.name, "sse"
        headers = [("Authorization", f"Bearer {self.token}"), ("Accept", "text/event-stream")]
        if self._last_id:
            headers.append(("Last-Event-ID", self._last_id))
        try:
            async with await trio.open_tcp_stream("127.0.0.1", slot.http_port) as stream:
                source = EventSource(stream)
                source.parser.last_id = self._last_id
                with trio.fail_after(HEAD_TIMEOUT):
                    await source.send(self._target, headers)
                # A role whose permission is withdrawn gets 403. What is temporary is a stream that ends at once.
                assert source.status in (200, 403), f"{self.name} got {source.status}: {await source.body()!r}"
                self._session += 1
                while source.status == 200:
                    await self._handle_blocks(source)
        except (EOFError, OSError, trio.BrokenResourceError, trio.TooSlowError):
            pass

    async def _handle_blocks(self, source: EventSource) -> None:
        with trio.fail_after(SILENCE_LIMIT):
            blocks = await source.blocks()
        if source.parser.retry is not None:
            self._retry = source.parser.retry / 1000
        for block in blocks:
            self._handle(block)
            if self._pause:
                await trio.sleep(self._pause)

    def _handle(self, block: Event) -> None:
        history, name, pattern = self.state.history, self.name, self._pattern
        seq, _, epoch = block.last_id.partition(".")
        moved = block.last_id != self._last_id
        if block.type or moved:
            # An empty stream, which asks to try again, has neither.
            self.record_connected_once()
        if block.type == "revoked":
            history.add(SubscriptionRevoked(at=now(), subscriber=name, pattern=block.data["pattern"]))
        elif block.type == "close" and block.data["code"] == CloseCode.REVOKED:
            self.record_left()
        elif block.type == "gap":
            history.add(_gap(name, pattern, block.data))
        elif block.type == "message":
            message = _message(pattern, block.data)
            record_received(self.state, name, pattern, epoch, message, self._session)
        if not moved:
            return
        self._last_id, self.cursor, self.epoch = block.last_id, int(seq), epoch
        if (name, pattern) not in self.state.cursors:
            self.state.cursors[name, pattern] = self
            history.add(SubscriptionBegan(at=now(), subscriber=name, pattern=pattern, cursor=self.cursor, epoch=epoch))
        elif _position(block) != self.cursor:
            history.add(CaughtUp(at=now(), subscriber=name, pattern=pattern, epoch=epoch, seq=self.cursor))


def _position(block: Event) -> int | None:
    """Return the position in the data of an event that is recorded by itself."""
    field = {"message": "seq", "gap": "to"}.get(block.type)
    return None if field is None else block.data.get(field)


def _gap(name: str, pattern: str, data: dict[str, Any]) -> GapAnnounced:
    return GapAnnounced(
        at=now(),
        subscriber=name,
        pattern=pattern,
        epoch=data["epoch"],
        first=data["from"],
        last=data["to"],
        reason=data["reason"],
    )


def _message(pattern: str, data: dict[str, Any]) -> Message:
    payload = msgspec.Raw(msgspec.json.encode(data["payload"]))
    return Message(data["channel"], payload, pattern, data.get("seq", 0), data["at"])


def start_event_stream_clients(state: LoadState, roles: dict[str, str], nursery: trio.Nursery) -> None:
    """Start the subscribers over server-sent events: a third of all subscribers."""

    def start(name: str, *patterns: str, **options: Any) -> None:
        nursery.start_soon(EventStreamClient(state, name, *patterns, **options).run)

    for pattern in PATTERNS:
        start(f"sse-{pattern}", pattern)
    start("sse-overlapping", *PATTERNS[:3])
    start("sse-several", *PATTERNS[2:])
    start("sse-cursors", "cursors.*", "chat", lifetime=(1, 5))
    for number in range(3):
        start(f"sse-wanderer-{number}", "stock.*", "orders.*", lifetime=(2, 8))
    start("slow-sse", "orders.*", pause=0.03)
    for role, token in roles.items():
        start(f"{role}/sse", f"{role}.*", token=token)
        start(f"{role}/sse-several", f"{role}.x", f"{role}.y", token=token)
