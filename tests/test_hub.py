"""Clients and their deadlines, on a virtual clock, with a log in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import catbus.hub as hub_module
from catbus.auth import Authenticator, Grants, sign
from catbus.config import Config, Limits
from catbus.errors import CloseCode
from catbus.hub import Client, Hub
from catbus.log import MemoryLog

SECRET = "a secret of the tests"


class Outlet:
    def flush(self) -> None:
        """Nobody reads."""


@pytest.fixture
async def hub(nursery: trio.Nursery) -> Hub:
    hub = Hub(Config(limits=Limits(mailbox=2000)), MemoryLog(), Authenticator([SECRET]))
    await nursery.start(hub.log.run, hub.delivery)
    return hub


def auth(lifetime: float | None, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A token for so long, in seconds of the virtual clock."""
    monkeypatch.setattr("time.time", trio.current_time)
    expires = None if lifetime is None else trio.current_time() + lifetime
    token = sign(SECRET, client_id="alice", grants=Grants.ALL, expires=expires)
    return json.dumps({"type": "auth", "token": token, "protocol": 1}).encode()


def open_client(hub: Hub) -> Client:
    return hub.open_client(Outlet(), transport="test")


def said(client: Client) -> list[Any]:
    return [json.loads(line)["type"] for line in client.mailbox.take() if isinstance(line, bytes)]


async def test_who_does_not_authenticate_is_closed_in_time(hub: Hub, autojump_clock: MockClock) -> None:
    client = open_client(hub)
    await client.wait_closing()
    assert trio.current_time() == pytest.approx(10)
    assert client.closing is not None
    assert client.closing[0] is CloseCode.AUTH_TIMEOUT
    assert said(client) == ["auth_error"]


async def test_authenticating_puts_the_deadline_off(
    hub: Hub, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(hub)
    nursery.start_soon(client.wait_closing)
    await trio.sleep(9)
    await client.receive(auth(None, monkeypatch))
    await trio.sleep(80_000)
    assert client.closing is None
    client.leave()


async def test_a_token_that_has_expired_closes_after_its_grace_and_a_newer_one_does_not(
    hub: Hub, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(hub)
    nursery.start_soon(client.wait_closing)
    await wait_all_tasks_blocked()
    await client.receive(auth(100, monkeypatch))
    await trio.sleep(120)
    await client.receive(auth(50, monkeypatch))
    await trio.sleep(79)
    assert client.closing is None
    await client.wait_closing()
    assert trio.current_time() == pytest.approx(120 + 50 + 30)
    assert client.closing is not None
    assert client.closing[0] is CloseCode.TOKEN_EXPIRED


async def test_a_deadline_is_kept_while_nothing_is_taken_from_the_client(
    hub: Hub, autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(hub)
    await client.receive(auth(100, monkeypatch))
    nursery.start_soon(client.receive, b'{"type":"ping","seq":1}' * 1000)
    await wait_all_tasks_blocked()
    assert client.mailbox.full, "it waits for somebody to read the replies"
    await client.wait_closing()
    assert trio.current_time() == pytest.approx(130)
    client.leave()


@pytest.mark.parametrize(
    "nonsense", [b"{}", b'{"type":"subscribe","pattern":"!"}', b'{"type":"unsubscribe","pattern":"a"}']
)
async def test_who_does_not_read_refusals_gets_no_more_of_them(
    hub: Hub, nonsense: bytes, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(hub)
    await client.receive(auth(None, monkeypatch))
    nursery.start_soon(client.receive, nonsense * 1000)
    await wait_all_tasks_blocked()
    assert client.mailbox.limit <= client.mailbox.size < client.mailbox.limit + 200
    client.leave()


async def test_who_has_left_while_there_was_no_room_asks_for_nothing_more(
    hub: Hub, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(hub)
    await client.receive(auth(None, monkeypatch))
    nursery.start_soon(client.receive, b'{"type":"ping","seq":1}{"type":"subscribe","pattern":"project.*"}' * 1000)
    await wait_all_tasks_blocked()
    assert hub.delivery.statistics().live
    client.leave()
    await wait_all_tasks_blocked()
    assert not hub.delivery.statistics().live


async def test_a_client_that_says_much_at_once_lets_others_have_their_turn(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "TURN", 0.0)
    client = open_client(hub)
    await client.receive(auth(None, monkeypatch))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as both:
        both.start_soon(other)
        await client.receive(b'{"type":"ping","seq":1}' * 20)
        both.cancel_scope.cancel()
    assert turns > 10
    client.leave()


async def test_waiting_ends_when_the_client_has_left(hub: Hub) -> None:
    client = open_client(hub)
    client.leave()
    with trio.fail_after(5):
        await client.wait_closing()
    assert client.closing is None
