"""WebTransport peers that read nothing on a healthy connection, on a virtual clock."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.auth.tokens import Authenticator
from catbus.broker import OWNER
from catbus.close_codes import CloseCode
from catbus.endpoints.webtransport import webtransport_session
from catbus.endpoints.webtransport.packet_router import PING_INTERVAL
from catbus.endpoints.webtransport.webtransport_session import (
    STALL_TIMEOUT,
    STALLED_REASON,
    SUBSCRIPTION_QUEUE_DIVISOR,
    WRITE_SIZE,
    WebTransportSession,
)
from catbus.log import MemoryLog
from catbus.protocol.wire_messages import Publish
from catbus.replica import Replica
from catbus.webtransport import ConnectionLimits, ConnectionLost, SessionClosed, StreamReset
from tests.brokers import CONFIG, SECRET, TOKEN
from tests.endpoints.raw_peer import patience
from tests.webtransport.simulated_link import Link, client_config

WINDOW = 1 << 14
START = 1000.0
"""The time at which a `Link` begins."""


class Pair:
    """A session and its peer, which acknowledges every packet, pings, and reads what it wants."""

    def __init__(self, replica: Replica, limits: ConnectionLimits) -> None:
        self.replica = replica
        self.link = Link(client=client_config(limits))
        self.link.open()
        self.internal_errors = 0
        self.stalls: list[str] = []
        self.session = WebTransportSession(
            replica, self.link.server.it, self.link.flush, self.log_internal_error, self.stalls.append
        )
        self._handled = len(self.link.server.events)
        stream = self.link.client.it.open_stream(bidirectional=True)
        assert stream is not None
        self.stream = stream

    def log_internal_error(self, message: str, error: BaseException) -> None:
        self.internal_errors += 1

    @property
    def lost(self) -> bool:
        return bool(self.link.client.saw(ConnectionLost))

    def say(self, **message: object) -> None:
        assert self.link.client.it.send(self.stream, json.dumps(message).encode())

    def take(self, count: int) -> None:
        """Give the broker credit for this many more bytes."""
        for stream in self.link.client.received:
            self.link.client.it.consumed(stream, count)

    async def pass_time(self, seconds: float) -> None:
        """Do what the packet router does."""
        end = trio.current_time() + seconds
        while trio.current_time() < end and not self.lost:
            await trio.sleep(PING_INTERVAL / 4)
            self.link.client.it.ping()
            self.link.run(trio.current_time() - self.link.now)
            server = self.link.server
            while self._handled < len(server.events):
                self.session.handle_event(server.events[self._handled])
                self._handled += 1
            self.session.send_blocked()
            self.session.check_stalled(trio.current_time())
            self.link.flush()
            await wait_all_tasks_blocked()

    def lines(self, stream: int) -> list[dict[str, Any]]:
        """Return the complete lines of a stream."""
        return [json.loads(line) for line in bytes(self.link.client.received[stream]).split(b"\n")[:-1]]

    @property
    def resets(self) -> list[StreamReset]:
        return self.link.client.saw(StreamReset)

    def seqs(self) -> list[int]:
        """Return the seqs of all complete messages, on any stream."""
        lines = [line for data in self.link.client.received.values() for line in data.split(b"\n")[:-1]]
        told = [json.loads(line) for line in lines]
        return [line["seq"] for line in told if line["type"] == "message"]

    async def publish(self, *sizes: int, channel: str = "a.b") -> None:
        payloads = [msgspec.Raw(b'"%b"' % (b"x" * size)) for size in sizes]
        await self.replica.publish(OWNER, [Publish(channel, payload) for payload in payloads])


LIMITS = ConnectionLimits(connection_window=4 * WINDOW, stream_window=WINDOW, incoming_unidirectional=20)


@asynccontextmanager
async def conversing(
    clock: MockClock, *, total: int = 1 << 28, credit: ConnectionLimits = LIMITS, **subscribe: object
) -> AsyncIterator[Pair]:
    limits = msgspec.structs.replace(CONFIG.limits, send_queue_total=total)
    replica = Replica(msgspec.structs.replace(CONFIG, limits=limits), MemoryLog(), Authenticator((SECRET,)))
    with patience():
        async with trio.open_nursery() as nursery:
            await nursery.start(replica.log.run, replica.delivery)
            nursery.start_soon(replica.delivery.run)
            nursery.start_soon(replica.flusher.run)
            clock.jump(START - trio.current_time())
            pair = Pair(replica, credit)
            nursery.start_soon(pair.session.run)
            pair.say(type="auth", token=TOKEN, protocol=1)
            pair.say(type="subscribe", pattern="a.*", **subscribe)
            await pair.pass_time(5)
            assert replica.delivery.statistics().live == 1
            yield pair
            assert not pair.internal_errors
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("waiting", [3, 100])
async def test_peer_without_flow_control_credit_is_closed(autojump_clock: MockClock, waiting: int) -> None:
    """With the smaller of the two, all unsent data is in the connection, and the send queue is empty."""
    async with conversing(autojump_clock) as pair:
        pair.link.client.consumes = False
        began = trio.current_time()
        for _ in range(waiting):
            await pair.publish(10_000)
        await pair.pass_time(3 * STALL_TIMEOUT)
        assert pair.lost
        assert STALL_TIMEOUT <= trio.current_time() - began <= STALL_TIMEOUT + 2 * PING_INTERVAL / 4
        assert pair.link.client.saw(SessionClosed) == [SessionClosed(CloseCode.UNRESPONSIVE, STALLED_REASON)]
        assert not pair.replica.sessions
        assert pair.replica.delivery.statistics().held == 0


@pytest.mark.parametrize("waiting", [3, 100])
async def test_unread_stream_is_reset_alone(autojump_clock: MockClock, waiting: int) -> None:
    async with conversing(autojump_clock, stream=True) as pair:
        pair.say(type="subscribe", pattern="main.*")
        await pair.pass_time(5)
        pair.link.client.consumes = False
        for _ in range(waiting):
            await pair.publish(10_000)
        [own] = pair.link.client.received.keys() - {pair.stream}
        await pair.pass_time(STALL_TIMEOUT - 5)
        assert not pair.resets
        await pair.pass_time(15)
        assert pair.resets == [StreamReset(own, CloseCode.UNRESPONSIVE)]
        last = pair.lines(pair.stream)[-1]
        assert last == {"type": "unsubscribed", "pattern": "a.*", "seq": waiting}
        assert pair.replica.delivery.statistics().held == 0
        # The session continues, and a new subscription resumes at the cursor.
        await pair.pass_time(10 * STALL_TIMEOUT)
        pair.link.client.consumes = True
        pair.link.client.it.consumed(pair.stream, 1 << 20)
        await pair.publish(10, channel="main.b")
        heard = [line["seq"] for line in pair.lines(own) if line["type"] == "message"]
        pair.say(type="subscribe", pattern="a.*", since=max(heard, default=0), stream=True)
        await pair.pass_time(50 * PING_INTERVAL)
        assert not pair.lost
        assert sorted(pair.seqs()) == list(range(1, waiting + 2))


async def test_many_unread_streams_are_reset_together(autojump_clock: MockClock) -> None:
    """They fill the window of the whole connection, so that the session's stream makes no progress either."""
    async with conversing(autojump_clock, stream=True) as pair:
        patterns = [f"p{number}.*" for number in range(12)]
        for pattern in patterns:
            pair.say(type="subscribe", pattern=pattern, stream=True)
        pair.say(type="subscribe", pattern="main.*")
        await pair.pass_time(5)
        pair.link.client.consumes = False
        for number in range(12):
            await pair.publish(10_000, 10_000, channel=f"p{number}.x")
        await pair.pass_time(5)
        await pair.publish(1000, channel="main.x")
        await pair.pass_time(STALL_TIMEOUT - 10)
        assert "message" not in [line["type"] for line in pair.lines(pair.stream)]
        pair.link.client.consumes = True
        pair.link.client.it.consumed(pair.stream, 1 << 20)
        await pair.pass_time(4 * STALL_TIMEOUT)
        assert not pair.lost
        lines = pair.lines(pair.stream)
        ended = [line["pattern"] for line in lines if line["type"] == "unsubscribed"]
        assert len(pair.resets) == len(set(ended)) == len(ended) >= 3
        assert [line["pattern"] for line in lines if line["type"] == "message"] == ["main.*"]
        # The streams that only waited for the others are complete.
        got = [
            line["pattern"]
            for stream in pair.link.client.received
            for line in pair.lines(stream)
            if line["type"] == "message" and line["pattern"] in patterns
        ]
        assert {pattern for pattern in patterns if got.count(pattern) == 2} >= set(patterns) - set(ended)
        assert pair.replica.delivery.statistics().live == 14 - len(ended)


async def test_finished_unread_stream_is_reset_alone(autojump_clock: MockClock) -> None:
    async with conversing(autojump_clock, stream=True) as pair:
        pair.link.client.consumes = False
        await pair.publish(10_000, 10_000)
        pair.say(type="unsubscribe", pattern="a.*", id=1)
        await pair.pass_time(3 * STALL_TIMEOUT)
        assert [reset.code for reset in pair.resets] == [CloseCode.UNRESPONSIVE]
        assert not pair.lost
        assert pair.link.server.it.unacknowledged() == 0


async def test_unread_session_stream_closes_the_session_while_another_is_read(autojump_clock: MockClock) -> None:
    async with conversing(autojump_clock, stream=True) as pair:
        pair.say(type="subscribe", pattern="main.*")
        await pair.pass_time(5)
        [own] = pair.link.client.received.keys() - {pair.stream}
        pair.link.client.consumes = False
        await pair.publish(10_000, 10_000, channel="main.x")
        for _ in range(8):
            await pair.publish(10_000)
            await pair.pass_time(STALL_TIMEOUT / 2)
            pair.link.client.it.consumed(own, 1 << 20)
        assert not pair.lost
        assert not pair.resets
        await pair.pass_time(3 * STALL_TIMEOUT)
        assert pair.link.client.saw(SessionClosed) == [SessionClosed(CloseCode.UNRESPONSIVE, STALLED_REASON)]


async def test_peer_without_stream_credit_receives_on_the_session_stream(autojump_clock: MockClock) -> None:
    async with conversing(autojump_clock, credit=ConnectionLimits(incoming_unidirectional=3), stream=True) as pair:
        await pair.publish(100)
        await pair.pass_time(3 * STALL_TIMEOUT)
        assert pair.link.client.received.keys() == {pair.stream}
        subscribed = next(line for line in pair.lines(pair.stream) if line["type"] == "subscribed")
        assert "stream" not in subscribed
        assert pair.seqs() == [1]


async def test_unsendable_datagrams_affect_nothing(autojump_clock: MockClock) -> None:
    async with conversing(autojump_clock, stream=True, datagrams=True) as pair:
        pair.link.client.consumes = False
        for _ in range(200):
            await pair.replica.publish(OWNER, [Publish("a.b", msgspec.Raw(b"1"), ephemeral=True)])
        await pair.pass_time(3 * STALL_TIMEOUT)
        assert not pair.lost
        assert not pair.resets


async def test_slow_peer_lags_and_stays_connected(autojump_clock: MockClock) -> None:
    async with conversing(autojump_clock) as pair:
        pair.link.client.consumes = False
        for _ in range(200):
            await pair.publish(10_000)
        for _ in range(20):
            await pair.pass_time(STALL_TIMEOUT - 10)
            pair.take(WINDOW // 2)
        assert not pair.lost
        assert pair.replica.delivery.statistics().lagging == 1


async def test_peer_with_nothing_to_read_stays_connected(autojump_clock: MockClock) -> None:
    async with conversing(autojump_clock) as pair:
        for _ in range(5):
            await pair.publish(1000)
            await pair.pass_time(3 * STALL_TIMEOUT)
        assert not pair.lost


@pytest.mark.parametrize("stream", [False, True])
async def test_unsent_data_of_a_peer_without_credit_is_bounded(autojump_clock: MockClock, stream: bool) -> None:
    async with conversing(autojump_clock, stream=stream) as pair:
        pair.link.client.consumes = False
        for _ in range(200):
            await pair.publish(10_000)
        await pair.pass_time(5)
        limits = ConnectionLimits()
        held = pair.link.server.it.unacknowledged()
        assert WINDOW < held <= limits.stream_unacknowledged + WRITE_SIZE + 11_000
        limit = CONFIG.limits.send_queue // (SUBSCRIPTION_QUEUE_DIVISOR if stream else 1)
        assert 0 < pair.replica.delivery.statistics().held <= limit


@pytest.mark.parametrize("stream", [False, True])
async def test_withdrawn_messages_are_delivered_when_there_is_credit(autojump_clock: MockClock, stream: bool) -> None:
    async with conversing(autojump_clock, total=40_000, stream=stream) as pair:
        pair.link.client.consumes = False
        for _ in range(100):
            await pair.publish(10_000)
        await pair.pass_time(10)
        statistics = pair.replica.delivery.statistics()
        assert statistics.withdrawals > 0
        assert statistics.held <= 40_000
        pair.link.client.consumes = True
        pair.take(1 << 20)
        await pair.pass_time(100 * PING_INTERVAL)
        assert pair.seqs() == list(range(1, 101))
        assert pair.replica.delivery.statistics().live == 1


async def test_peer_whose_send_queue_was_emptied_unsent_is_served(autojump_clock: MockClock) -> None:
    async with conversing(autojump_clock, total=40_000) as pair:
        pair.link.client.consumes = False
        while pair.link.server.it.writable(pair.stream):
            await pair.publish(10_000)
            await trio.sleep(0.1)
        assert pair.replica.delivery.statistics().lagging == 0
        await pair.publish(*[10_000] * 10)
        assert pair.replica.delivery.statistics().withdrawals == 1
        assert pair.replica.delivery.statistics().held == 0
        pair.link.client.consumes = True
        await pair.pass_time(5)
        pair.take(1 << 20)
        await pair.pass_time(50 * PING_INTERVAL)
        assert pair.seqs() == list(range(1, pair.replica.delivery.position + 1))


async def test_stream_ends_after_all_writes(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webtransport_session, "WRITE_SIZE", 1000)
    async with conversing(autojump_clock, stream=True) as pair:
        pair.link.client.consumes = False
        while pair.replica.delivery.statistics().held < 30_000:
            await pair.publish(10_000)
            await trio.sleep(0.1)
        pair.say(type="unsubscribe", pattern="a.*")
        pair.link.client.consumes = True
        await pair.pass_time(5)
        pair.take(1 << 20)
        await pair.pass_time(10 * PING_INTERVAL)
        assert pair.seqs() == list(range(1, pair.replica.delivery.position + 1))
        [own] = pair.link.client.ended
        assert json.loads(pair.link.client.received[own].splitlines()[-1])["type"] == "unsubscribed"
