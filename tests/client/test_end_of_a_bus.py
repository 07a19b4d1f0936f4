"""How a bus begins without waiting, how it ends for good, and how often it asks for a token until then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.client import Disconnected, Ended, Reconnected, Refused, State, open_bus
from catbus.error_codes import ErrorCode
from tests.client.scripted_broker import AUTH_OK, Honest, Peer, Pipe
from tests.client.test_connection_supervisor import AWAY, admitted, end_of, lost, network

SECRET = "a secret that is long enough for a JWT"


def out_of(answers: list[str | Exception | None]) -> tuple[Callable[[], Any], list[float]]:
    """A token function that answers one after the other, and when it was asked."""
    asked: list[float] = []

    async def token() -> str | None:
        asked.append(trio.current_time())
        answer = answers[len(asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return token, asked


SIGNED_OUT = [
    None,
    Refused(ErrorCode.UNAUTHENTICATED, "the session is over"),
    Refused(ErrorCode.UNAVAILABLE, "the session is over"),
]


@pytest.mark.parametrize("answer", SIGNED_OUT)
async def test_connect_raises_if_the_user_is_signed_out(autojump_clock: MockClock, answer: Exception | None) -> None:
    token, asked = out_of([answer])

    async def dial() -> Pipe:
        pytest.fail("there is nothing to say")

    with pytest.raises(Refused):
        async with open_bus(dial, token=token, persist=True):
            pytest.fail("nobody is signed in")
    assert len(asked) == 1


@pytest.mark.parametrize("answer", SIGNED_OUT)
async def test_sign_out_between_connections_is_final(autojump_clock: MockClock, answer: Exception | None) -> None:
    token, asked = out_of(["one", answer])
    async with network(lost(50), token=token) as (bus, net):
        end = await end_of(bus)
        assert (end.code, bus.state) == (4001, State.CLOSED)
        assert "signed out" in str(end)
        assert net.told == [(1, 1), Ended]
        await trio.sleep(1000)
        assert len(asked) == 2


@pytest.mark.parametrize("answer", SIGNED_OUT)
async def test_sign_out_while_connected_is_final(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, answer: Exception | None
) -> None:
    monkeypatch.setattr(time, "time", trio.current_time)
    token, asked = out_of([sign(SECRET, client_id="a", grants=Grants.ALL, expires=300, issued_at=0), answer])
    async with network(Honest(), token=token) as (bus, net):
        await trio.sleep(271)
        assert (await end_of(bus)).code == 4001
        assert net.told == [Ended]
        assert net.pipes[0].closed is not None
        await trio.sleep(1000)
        assert asked == pytest.approx([0, 270])


async def test_ended_is_reported_once_with_its_reason(autojump_clock: MockClock) -> None:
    async with network(lost(5, 4001)) as (bus, net):
        await trio.sleep(1000)
        with pytest.raises(Disconnected):
            await bus.ping()
    [end] = net.events
    assert isinstance(end, Ended)
    assert end.code == 4001


async def test_ended_is_not_reported_when_the_block_is_left(autojump_clock: MockClock) -> None:
    async with network(Honest()) as (bus, net):
        await bus.ping()
    assert net.told == []


async def test_block_begins_while_the_broker_is_unreachable(autojump_clock: MockClock) -> None:
    broker = Honest()
    async with network(AWAY, AWAY, broker, wait=False) as (bus, net):
        assert (bus.state, bus.transport) == (State.RECONNECTING, "")
        assert await bus.publish("a", 1) == 101
        assert trio.current_time() == pytest.approx(3)
        assert (bus.state, bus.transport) == (State.CONNECTED, "websocket")
        assert net.told == [(1, 1), (2, 2), Reconnected]
        async with bus.subscribe("a", since=100) as messages:
            assert (await anext(messages)).payload == 1


async def test_requests_before_the_first_connection_are_sent_on_it(
    autojump_clock: MockClock,
) -> None:
    async with network(AWAY, Honest(), wait=False) as (bus, _), bus.subscribe("a") as messages:
        await bus.wait_connected()
        await bus.publish("a", 1)
        assert (await anext(messages)).payload == 1


async def test_block_can_be_left_before_the_first_connection(autojump_clock: MockClock) -> None:
    async def silent(peer: Peer) -> None:
        await peer.expect("auth")
        await trio.sleep_forever()

    async with network(silent, wait=False, timeout=100) as (bus, _):
        await trio.sleep(50)
        assert bus.state is State.RECONNECTING
    assert trio.current_time() == 50


async def test_rejected_first_connection_ends_the_bus_but_not_the_block(autojump_clock: MockClock) -> None:
    async def refuse(peer: Peer) -> None:
        await peer.expect("auth")
        await peer.send({"type": "auth_error", "message": "forged", "code": "unauthenticated"})

    async with network(refuse, wait=False) as (bus, net):
        with pytest.raises(Disconnected, match="forged") as caught:
            await bus.wait_connected()
        assert caught.value.code == 4001
        assert net.told == [Ended]


async def test_bus_without_reconnect_makes_one_attempt_in_the_background(
    autojump_clock: MockClock,
) -> None:
    async with network(AWAY, wait=False, reconnect=False) as (bus, net):
        with pytest.raises(Disconnected, match="nobody is there"):
            await bus.publish("a", 1)
        assert net.told == [Ended]


@pytest.mark.parametrize("says_when", [True, False])
@pytest.mark.parametrize("offset", [-600, -45, 45, 600])
async def test_wrong_clock_causes_few_token_requests(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, offset: float, says_when: bool
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000 + trio.current_time() + offset)
    asked = 0

    async def token() -> str:
        nonlocal asked
        asked += 1
        now = int(1_000_000 + trio.current_time())
        return sign(SECRET, client_id="a", grants=Grants.ALL, expires=now + 300, issued_at=now if says_when else None)

    async def script(peer: Peer) -> None:
        while True:
            await peer.expect("auth")
            await peer.send(AUTH_OK)

    async with network(admitted(script), token=token):
        await trio.sleep(3000)
    # A token that says when it was made, for 300 s, is renewed after 200 s at the earliest; another one after 30 s.
    assert asked <= (3000 / 200 + 1 if says_when else 3000 / 30 + 1)
