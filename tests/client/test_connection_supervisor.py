"""Reconnects and moves between connections, on a virtual clock."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.client import (
    Backoff,
    Bus,
    Disconnected,
    Ended,
    GoAway,
    Reconnected,
    Reconnecting,
    Refused,
    State,
    connection_supervisor,
    open_bus,
)
from catbus.client.happy_eyeballs import open_first_transport
from catbus.error_codes import ErrorCode
from tests.client.scripted_broker import AUTH_OK, Gone, Honest, Peer, Pipe, Script, message, play

STEADY = Backoff(jitter=0)


class Net:
    """The brokers that answer the first connection, the second one, and so on."""

    def __init__(self, nursery: trio.Nursery, places: tuple[Script | Exception, ...]) -> None:
        self.dialled: list[float] = []
        """The time of each attempt."""
        self.pipes: list[Pipe] = []
        self.events: list[object] = []
        self._nursery = nursery
        self._places = iter(places)

    async def dial(self) -> Pipe:
        self.dialled.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        place = next(self._places)
        if isinstance(place, Exception):
            raise place
        pipe = Pipe()
        self.pipes.append(pipe)
        self._nursery.start_soon(self._run, pipe, place)
        return pipe

    async def _run(self, pipe: Pipe, script: Script) -> None:
        try:
            await play(script, pipe.peer)
        finally:
            pipe.peer.hang_up()

    @property
    def told(self) -> list[object]:
        """The events that the application received, in short form."""
        return [
            (event.attempt, event.delay) if isinstance(event, Reconnecting) else type(event) for event in self.events
        ]


@asynccontextmanager
async def network(*places: Script | Exception, **options: Any) -> AsyncIterator[tuple[Bus, Net]]:
    given: dict[str, Any] = {"token": "t", "reconnect": STEADY, "keepalive": 1e6, **options}
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            net = Net(nursery, places)
            async with open_bus(net.dial, on_event=net.events.append, **given) as bus:
                yield bus, net
            nursery.cancel_scope.cancel()


def admitted(script: Script, **fields: Any) -> Script:
    async def run(peer: Peer) -> None:
        await peer.admit(**fields)
        await script(peer)

    return run


def gone_after(seconds: float, code: int | None = None) -> Script:
    async def run(peer: Peer) -> None:
        await trio.sleep(seconds)
        if code is not None:
            await peer.close(code, "away")
        raise Gone

    return run


def lost(after: float = 0.0, code: int | None = None) -> Script:
    """A broker that ends the connection after a delay."""
    return admitted(gone_after(after, code))


AWAY = Disconnected("nobody is there")


async def end_of(bus: Bus) -> Disconnected:
    with pytest.raises(Disconnected) as caught:
        await bus.ping()
    return caught.value


# Reconnecting


async def test_client_reconnects_after_growing_pauses_and_reports_them(autojump_clock: MockClock) -> None:
    async with network(lost(100, 4503), AWAY, AWAY, AWAY, Honest()) as (bus, net):
        await trio.sleep(100.5)
        assert bus.state is State.RECONNECTING
        assert await bus.publish("a", 1) == 101
        assert bus.state is State.CONNECTED
        assert net.dialled == pytest.approx([0, 101, 103, 107, 115])
        assert net.told == [(1, 1), (2, 2), (3, 4), (4, 8), Reconnected]
        first, second, *_ = net.events
        assert isinstance(first, Reconnecting)
        assert (first.code, first.reason) == (4503, "the broker closed the connection: away")
        assert isinstance(second, Reconnecting)
        assert (second.code, second.reason) == (None, "nobody is there")


async def test_backoff_resets_after_a_connection_has_lasted(autojump_clock: MockClock) -> None:
    async with network(lost(), lost(), lost(), lost(100), lost(), Honest()) as (bus, net):
        while len(net.dialled) < 6:
            await trio.sleep(1)
        await bus.ping()
        pauses = [later - earlier for earlier, later in pairwise(net.dialled)]
        assert pauses == pytest.approx([1, 2, 4, 101, 2])


async def test_clients_reconnect_at_different_times(autojump_clock: MockClock) -> None:
    pauses = set()
    for _ in range(20):
        async with network(lost(100), Honest(), reconnect=True) as (bus, net):
            await trio.sleep(100.1)
            await bus.ping()
            pauses.add(net.dialled[1] - net.dialled[0] - 100)
    assert len(pauses) == 20
    assert 0.7 - 1e-6 <= min(pauses) <= max(pauses) <= 1 + 1e-6


@pytest.mark.parametrize("code", [4001, 4399, 4401, 1009])
async def test_final_close_code_ends_the_bus(code: int, autojump_clock: MockClock) -> None:
    async with network(lost(5, code)) as (bus, net):
        assert (await end_of(bus)).code == code
        assert bus.state is State.CLOSED
        with pytest.raises(Disconnected):
            await bus.publish("a", 1)
        with pytest.raises(Disconnected):
            await bus.wait_connected()
        with pytest.raises(Disconnected):
            async with bus.subscribe("a"):
                pass
        assert net.events == [Ended("the broker closed the connection: away", code)]


async def test_received_messages_are_returned_before_the_end(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        await peer.send(message(101), message(102))
        await peer.close(4001, "enough")

    async with network(admitted(script)) as (bus, _), bus.subscribe("a.*") as messages:
        await trio.sleep(1)
        assert [(await anext(messages)).seq for _ in range(2)] == [101, 102]
        with pytest.raises(Disconnected, match="enough"):
            await anext(messages)


async def test_rejected_second_token_ends_the_bus(autojump_clock: MockClock) -> None:
    async def refuse(peer: Peer) -> None:
        await peer.expect("auth")
        await peer.send({"type": "auth_error", "message": "forged", "code": "unauthenticated"})

    async with network(lost(5), refuse) as (bus, net):
        assert (await end_of(bus)).code == 4001
        assert net.told == [(1, 1), Ended]


async def test_first_connection_is_attempted_once(autojump_clock: MockClock) -> None:
    async def dial() -> Pipe:
        raise AWAY

    with pytest.raises(Disconnected, match="nobody is there"):
        async with open_bus(dial, token="t"):
            pytest.fail("nobody is there")
    assert trio.current_time() == 0


async def test_first_connection_is_attempted_until_it_succeeds_with_persist(autojump_clock: MockClock) -> None:
    async with network(AWAY, AWAY, Honest(), persist=True) as (bus, net):
        assert net.dialled == pytest.approx([0, 1, 3])
        assert net.told == [(1, 1), (2, 2)]
        await bus.ping()


async def test_silent_connection_is_replaced(autojump_clock: MockClock) -> None:
    async with network(admitted(Peer.linger), Honest(), keepalive=30, timeout=10) as (bus, net):
        assert await bus.publish("a", 1) == 101
        assert net.dialled == pytest.approx([0, 41])


async def test_second_transport_to_open_is_closed(autojump_clock: MockClock) -> None:
    pipes = [Pipe(), Pipe()]

    async def dial(number: int) -> Pipe:
        with trio.CancelScope(shield=True):
            await trio.sleep(1)
        return pipes[number]

    taken = await open_first_transport([partial(dial, 0), partial(dial, 1)])
    [other] = [pipe for pipe in pipes if pipe is not taken]
    assert other.closed is not None
    assert taken is pipes[0]
    await taken.aclose()
    for pipe in pipes:
        pipe.peer.hang_up()


# Publishing


async def test_publish_without_a_connection_waits_for_room_and_can_be_cancelled(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(connection_supervisor, "MAX_UNSENT_BYTES", 100_000)
    broker = Honest()
    async with network(lost(1), *[AWAY] * 10, broker) as (bus, _), trio.open_nursery() as nursery:
        await trio.sleep(2)
        with trio.move_on_after(10):
            await bus.publish("a", "never")
        for number in range(1000):
            nursery.start_soon(bus.publish, "a", [number, "x" * 1000])
        await trio.sleep(1)
        assert bus._supervisor.in_flight.unsent_bytes < 102_000
        assert not broker.published
        await bus.wait_connected()
        await trio.sleep(60)
        assert sorted(request["payload"][0] for request in broker.published) == list(range(1000))


async def test_unsent_publishes_are_bounded_by_the_limit_of_the_broker(autojump_clock: MockClock) -> None:
    limits = {"limits": {"pending_publishes": 10}}
    place = admitted(gone_after(1), **limits)
    async with network(place, AWAY, Honest()) as (bus, _), trio.open_nursery() as nursery:
        await trio.sleep(1.5)
        for number in range(30):
            nursery.start_soon(bus.publish, "a", number)
        await trio.sleep(0.1)
        assert bus._supervisor.in_flight.publishes_in_flight == 10


async def test_cancelled_publish_takes_effect_only_if_it_was_sent(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("publish")
        raise Gone

    broker = Honest()
    async with network(admitted(script), AWAY, broker) as (bus, _):
        with trio.move_on_after(0.5):
            await bus.publish("a", "in doubt")
        with trio.move_on_after(0.2):
            await bus.publish("a", "waited")
        assert await bus.publish("a", "last") == 102
        assert [(r["payload"], r.get("retry")) for r in broker.published] == [("in doubt", True), ("last", None)]


async def test_publish_of_unknown_outcome_is_retried_after_a_pause(autojump_clock: MockClock) -> None:
    moments = []

    async def script(peer: Peer) -> None:
        for code in ("unknown", "unavailable"):
            request = await peer.expect("publish")
            moments.append(trio.current_time())
            refusal = {"type": "publish_error", "channel": "a", "message": "slow", "code": code}
            await peer.send({**refusal, "id": request["id"]})
        await peer.published(101)
        await peer.published(102)
        moments.append(trio.current_time())

    async with network(admitted(script)) as (bus, _), trio.open_nursery() as nursery:
        seqs = []

        async def publish(payload: int) -> None:
            seqs.append((payload, await bus.publish("a", payload)))

        nursery.start_soon(publish, 1)
        await trio.sleep(0.1)
        nursery.start_soon(publish, 2)
        await trio.sleep(10)
        assert sorted(seqs) == [(1, 101), (2, 102)]
        first, second, third = moments
        assert 1.4 <= second - first <= 2
        assert 1.4 <= third - second <= 2


async def test_publishes_of_another_producer_id_end_as_unknown(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("publish")
        raise Gone

    broker = Honest()

    async def stranger(peer: Peer) -> None:
        assert (await peer.admit(producer="p2"))["producer"] == "p1"
        await broker(peer)

    async with network(admitted(script), stranger) as (bus, _):
        with pytest.raises(Refused, match="forgotten the producer id") as caught:
            await bus.publish("a", "in doubt")
        assert caught.value.code is ErrorCode.UNKNOWN
        assert bus.producer == "p2"
        assert await bus.publish("a", "new") == 101
        assert [request["payload"] for request in broker.published] == ["new"]


async def test_requests_survive_the_loss_of_a_connection(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("history")
        raise Gone

    broker = Honest()
    broker.append("a", "kept")
    async with network(admitted(script), broker) as (bus, _):
        assert [item.payload for item in (await bus.history("a")).messages] == ["kept"]


# Moving


def leaving(then: Script, reconnect_in: float = 10.0) -> Script:
    """A broker that is about to stop."""

    async def run(peer: Peer) -> None:
        await peer.send({"type": "goaway", "reason": "stopping", "reconnect_in": reconnect_in})
        await then(peer)

    return admitted(run)


async def test_client_moves_at_the_announced_time_before_the_old_connection_ends(autojump_clock: MockClock) -> None:
    more: list[object] = []

    async def old(peer: Peer) -> None:
        await peer.subscribed(100)
        await peer.send(message(101))
        request = await peer.expect("publish")
        await trio.sleep(10.5)
        await peer.send({"type": "published", "channel": "a.b", "id": request["id"], "seq": 102}, message(102))
        more.append(await peer.receive())

    async def new(peer: Peer) -> None:
        request = await peer.subscribed(102)
        assert request["since"] == 101
        await peer.send(message(102), {"type": "live", "pattern": "a.*", "seq": 102})
        request = await peer.expect("publish")
        assert request["payload"] == "held"
        await peer.send({"type": "published", "channel": "a.b", "id": request["id"], "seq": 103}, message(103))

    async with network(leaving(old), admitted(new)) as (bus, net), bus.subscribe("a.*") as messages:
        assert await bus.publish("a.b", "in time") == 102
        assert net.dialled == pytest.approx([0, 10])
        assert await bus.publish("a.b", "held") == 103
        assert [(await anext(messages)).seq for _ in range(3)] == [101, 102, 103]
        assert not more
        assert net.pipes[0].closed == (1000, "")
        assert net.told == [GoAway, Reconnected]
        assert net.events[-1] == Reconnected(moved=True)


async def test_publish_without_a_reply_from_the_old_connection_is_retried(
    autojump_clock: MockClock,
) -> None:
    async def old(peer: Peer) -> None:
        await peer.expect("publish")

    broker = Honest()
    async with network(leaving(old), broker) as (bus, net):
        assert await bus.publish("a", 1) == 101
        assert trio.current_time() == pytest.approx(10 + connection_supervisor.ACKNOWLEDGEMENT_TIMEOUT)
        assert [request["retry"] for request in broker.published] == [True]
        assert net.told == [GoAway, Reconnected]


async def test_old_connection_delivers_during_a_move_but_gets_no_new_request(
    autojump_clock: MockClock,
) -> None:
    more: list[object] = []

    async def old(peer: Peer) -> None:
        await peer.subscribed(100)
        await trio.sleep(12)
        await peer.send(message(101))
        more.append(await peer.receive())

    async def new(peer: Peer) -> None:
        request = await peer.expect("subscribe")
        await trio.sleep(5)
        await peer.send({"type": "subscribed", "pattern": "a.*", "seq": 101, "id": request["id"]}, message(101))
        await peer.published(102)

    async with network(leaving(old), admitted(new)) as (bus, _), bus.subscribe("a.*") as messages:
        await trio.sleep(11)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bus.publish, "a", 1)
            assert (await anext(messages)).seq == 101
            assert trio.current_time() == pytest.approx(12)
        assert trio.current_time() == pytest.approx(15)
        assert not more


async def test_old_connection_may_be_lost_before_the_move(autojump_clock: MockClock) -> None:
    async with network(leaving(gone_after(3)), Honest()) as (bus, net):
        assert await bus.publish("a", 1) == 101
        assert net.dialled == pytest.approx([0, 10])
        assert net.told == [GoAway, (1, 7), Reconnected]
        assert net.events[-1] == Reconnected(moved=False)


async def test_old_connection_may_be_lost_during_the_move(autojump_clock: MockClock) -> None:
    async def old(peer: Peer) -> None:
        await peer.subscribed(100)
        await peer.expect("publish")
        await trio.sleep(10.5)
        raise Gone

    async def new(peer: Peer) -> None:
        request = await peer.expect("subscribe")
        await trio.sleep(3)
        await peer.send({"type": "subscribed", "pattern": "a.*", "seq": 100, "id": request["id"]}, message(101))
        assert (await peer.published(102))["retry"]

    async with network(leaving(old), admitted(new)) as (bus, net), bus.subscribe("a.*") as messages:
        assert await bus.publish("a.b", 1) == 102
        assert (await anext(messages)).seq == 101
        assert net.dialled == pytest.approx([0, 10])


async def test_new_connection_may_be_lost_during_the_move(autojump_clock: MockClock) -> None:
    async def old(peer: Peer) -> None:
        await peer.subscribed(100)
        await peer.expect("publish")

    async def new(peer: Peer) -> None:
        await peer.subscribed(100)
        await peer.send(message(101))
        await trio.sleep(1)
        raise Gone

    async def third(peer: Peer) -> None:
        assert (await peer.subscribed(101))["since"] == 101
        await peer.send(message(102))
        assert (await peer.published(103))["retry"]

    async with network(leaving(old), admitted(new), admitted(third)) as (bus, net), bus.subscribe("a.*") as messages:
        assert await bus.publish("a.b", 1) == 103
        assert [(await anext(messages)).seq for _ in range(2)] == [101, 102]
        assert net.told == [GoAway, (1, 2), Reconnected]


async def test_old_connection_continues_if_no_other_replica_is_reachable(autojump_clock: MockClock) -> None:
    async def old(peer: Peer) -> None:
        await trio.sleep(12)
        await peer.published(101)

    async with network(leaving(old), AWAY, AWAY, Honest()) as (bus, net):
        await trio.sleep(11)
        assert await bus.publish("a", 1) == 101
        assert bus.state is State.CONNECTED
        await trio.sleep(20)
        assert net.dialled == pytest.approx([0, 10, 12, 16])
        assert net.told == [GoAway, Reconnected]


async def test_client_that_is_sent_from_replica_to_replica_pauses(autojump_clock: MockClock) -> None:
    places = [leaving(Peer.linger, 0) for _ in range(5)]
    async with network(leaving(Peer.linger, 50), *places, Honest()) as (bus, net):
        while len(net.dialled) < 7:
            await trio.sleep(1)
        pauses = [later - earlier for earlier, later in pairwise(net.dialled)]
        assert pauses == pytest.approx([50, 1, 1, 1, 1, 1])
        assert bus.state is State.CONNECTED


async def test_subscriptions_may_begin_and_end_during_a_move(autojump_clock: MockClock) -> None:
    async def old(peer: Peer) -> None:
        await peer.subscribed(100)
        await peer.subscribed(100)
        await peer.expect("publish")

    broker = Honest()
    async with network(leaving(old), broker) as (bus, _), AsyncExitStack() as stays:
        kept = await stays.enter_async_context(bus.subscribe("a"))
        async with trio.open_nursery() as nursery, bus.subscribe("b"):
            nursery.start_soon(bus.publish, "c", "in doubt")
            await trio.sleep(11)
            assert [request["pattern"] for request in broker.subscribes] == ["a", "b"]
            fresh = await stays.enter_async_context(bus.subscribe("d"))
        again = await stays.enter_async_context(bus.subscribe("b"))
        for channel, messages in (("a", kept), ("b", again), ("d", fresh)):
            await bus.publish(channel, channel)
            assert (await anext(messages)).payload == channel
        assert list(broker.held) == ["a", "d", "b"]


# Tokens


def lasting(seconds: float) -> str:
    return sign("s", client_id="alice", grants=Grants.ALL, expires=int(time.time() + seconds))


@pytest.mark.parametrize("code", ["token_expired", "revoked"])
async def test_token_function_is_called_for_each_connection(code: str, autojump_clock: MockClock) -> None:
    tokens = iter(["one", "two", "three", "four"])

    async def token() -> str:
        return next(tokens)

    async def refuse(peer: Peer) -> None:
        seen.append((await peer.expect("auth"))["token"])
        await peer.send({"type": "auth_error", "message": "over", "code": code})

    async def last(peer: Peer) -> None:
        seen.append((await peer.admit())["token"])

    seen: list[str] = []
    async with network(lost(50, 4401), refuse, refuse, last, token=token) as (bus, net):
        await trio.sleep(100)
        assert bus.state is State.CONNECTED
        assert seen == ["two", "three", "four"]
        assert net.dialled == pytest.approx([0, 50, 52, 56])


def refuse_for(wait: float) -> Script:
    async def run(peer: Peer) -> None:
        await peer.expect("auth")
        await peer.send({"type": "auth_error", "message": "early", "code": "token_not_valid_yet", "retry_after": wait})
        await peer.close(4525, "early")

    return run


async def test_token_that_is_not_valid_yet_is_sent_again_later(autojump_clock: MockClock) -> None:
    async with network(lost(50), refuse_for(40), refuse_for(0.5), refuse_for(1e6), Honest()) as (bus, net):
        await trio.sleep(50.1)
        await bus.ping()
        assert bus.state is State.CONNECTED
        # When it is valid and a little later; as after any failure where that is soon; no later than in some minutes.
        assert net.dialled == pytest.approx([0, 51, 51 + 41, 92 + 4, 96 + 301])


async def test_rejected_new_token_does_not_replace_the_present_one(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", trio.current_time)
    asked: list[float] = []

    async def token() -> str:
        asked.append(trio.current_time())
        return lasting(100 if len(asked) == 1 else 100_000)

    async def script(peer: Peer) -> None:
        for _ in range(2):
            await peer.expect("auth")
            await peer.send({"type": "auth_error", "message": "early", "code": "token_not_valid_yet"})
        await peer.expect("auth")
        await peer.send(AUTH_OK)
        await trio.sleep_forever()

    async with network(admitted(script), token=token):
        await trio.sleep(99)
        assert asked == pytest.approx([0, 70, 85, 92.5], abs=1)


async def test_subscription_rejected_for_now_is_requested_again(autojump_clock: MockClock) -> None:
    async def first(peer: Peer) -> None:
        await peer.subscribed()
        raise Gone

    async def second(peer: Peer) -> None:
        request = await peer.expect("subscribe")
        refusal = {"type": "subscribe_error", "pattern": "a.*", "message": "away", "code": "unavailable"}
        await peer.send({**refusal, "id": request["id"]})
        await peer.subscribed()
        await peer.send(message(101))
        await trio.sleep_forever()

    async with network(admitted(first), admitted(second)) as (bus, _), bus.subscribe("a.*") as messages:
        assert (await anext(messages)).seq == 101


async def test_token_function_that_raises_oserror_is_called_again(autojump_clock: MockClock) -> None:
    answers = iter(["one", OSError("no network"), "two"])

    async def token() -> str:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    async with network(lost(50), Honest(), token=token) as (bus, net):
        await trio.sleep(51)
        await bus.ping()
        assert net.told == [(1, 1), (2, 2), Reconnected]


async def test_exception_of_a_token_function_ends_the_bus(autojump_clock: MockClock) -> None:
    answers = iter(["one"])

    async def token() -> str:
        for answer in answers:
            return answer
        raise LookupError("no more")

    async def use() -> None:
        async with network(lost(50), token=token) as (bus, _):
            await bus.ping()

    with pytest.raises(ExceptionGroup) as caught:
        await use()
    assert caught.group_contains(LookupError)


async def test_token_is_renewed_before_it_expires(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    monkeypatch.setattr(connection_supervisor, "renewal_delay", lambda token, _: 30.0 if token == "short" else None)
    tokens = iter(["short", "long"])

    async def token() -> str:
        return next(tokens)

    async def script(peer: Peer) -> None:
        assert (await peer.expect("auth"))["token"] == "long"
        moments.append(trio.current_time())
        await peer.send({**AUTH_OK})

    moments: list[float] = []
    async with network(admitted(script), token=token):
        await trio.sleep(100)
    assert moments == pytest.approx([30])


async def test_token_renewed_during_a_move_is_sent_to_the_new_connection(autojump_clock: MockClock) -> None:
    async def old(peer: Peer) -> None:
        await peer.expect("publish")
        await peer.admit()

    async def new(peer: Peer) -> None:
        assert (await peer.admit())["token"] == "t"
        await peer.published(101)
        shown.append((await peer.admit())["token"])

    shown: list[str] = []
    async with network(leaving(old), new) as (bus, _), trio.open_nursery() as nursery:
        nursery.start_soon(bus.publish, "a", 1)
        await trio.sleep(11)
        await bus.authenticate("newer")
        await trio.sleep(5)
        assert shown == ["newer"]


# Leaving


@pytest.mark.parametrize("moment", [0.5, 1.5, 10, 10.5])
async def test_leaving_does_not_wait(moment: float, autojump_clock: MockClock) -> None:
    async def never(peer: Peer) -> None:
        await peer.expect("auth")

    async with network(lost(0), never, never, never, timeout=3) as (_, net):
        await trio.sleep(moment)
        before = trio.current_time()
    assert trio.current_time() - before < 0.1
    assert len(net.dialled) > 1 or moment < 1


async def test_leaving_does_not_wait_for_a_token_function(autojump_clock: MockClock) -> None:
    answers = iter([lasting(60)])

    async def token() -> str:
        for answer in answers:
            return answer
        await trio.sleep_forever()
        raise AssertionError

    async with network(Honest(), token=token):
        await trio.sleep(100)
        before = trio.current_time()
    assert trio.current_time() - before < 0.1


async def test_waiting_calls_raise_when_the_block_is_left(autojump_clock: MockClock) -> None:
    errors = []

    async def publish(bus: Bus) -> None:
        try:
            await bus.publish("a", 1)
        except Disconnected as error:
            errors.append(str(error))

    async with trio.open_nursery() as nursery, network(lost(1), *[AWAY] * 5) as (bus, _):
        nursery.start_soon(publish, bus)
        await trio.sleep(4)
    assert errors == ["it has been closed on this side"]
