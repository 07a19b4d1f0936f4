"""Invalid input of a client: its reply and, if it is fatal, its close. Other clients are not affected."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio

import catbus
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.close_codes import CloseCode
from catbus.config import LimitSettings
from tests.brokers import CONFIG, SECRET, TOKEN, running
from tests.endpoints.raw_peer import BINARY, CLOSE, TEXT, Peer, masked

AUTH = {"type": "auth", "token": TOKEN, "protocol": 1}


class Speaker(Peer):
    """A raw client that sends what it is told to and reads replies."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self.lines: list[dict[str, Any]] = []

    async def say(self, message: Any, opcode: int = TEXT) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        await self.send(masked(opcode, data))

    async def reply(self) -> dict[str, Any]:
        while not self.lines:
            frame = await self.frame()
            assert frame.opcode == TEXT, f"{frame}"
            self.lines += [json.loads(line) for line in frame.payload.splitlines()]
        return self.lines.pop(0)

    async def close_code(self) -> int:
        frame = await self.frame()
        assert frame.opcode == CLOSE
        return frame.code


@asynccontextmanager
async def speaker(address: str) -> AsyncIterator[Speaker]:
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        peer = Speaker(stream)
        await peer.upgrade()
        yield peer


BOMB = b'{"type":"publish","channel":"a","payload":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
LARGE = json.dumps({"type": "publish", "channel": "a", "payload": "x" * 70_000}).encode()

WRONG = {
    "bad JSON": (b'{"type":"publish","channel":"a","payload":tru}', "error", "bad_message"),
    "bad UTF-8": (b'{"type":"publish","channel":"a","payload":"\xff"}', "error", "bad_message"),
    "a nesting bomb": (BOMB, "error", "bad_message"),
    "an unknown type": ({"type": "shout"}, "error", "bad_message"),
    "no type": ({"channel": "a"}, "error", "bad_message"),
    "a missing field": ({"type": "publish", "channel": "a"}, "error", "bad_message"),
    "a field of another type": ({"type": "subscribe", "pattern": 3}, "error", "bad_message"),
    "a wrong channel": ({"type": "publish", "channel": "a b", "payload": 1}, "publish_error", "invalid_channel"),
    "a misplaced wildcard": ({"type": "subscribe", "pattern": "a.*.b"}, "subscribe_error", "invalid_pattern"),
}

ENDING: dict[str, tuple[Any, str, str, int]] = {
    "a message over the limit": (LARGE, "error", "too_large", 4009),
    "something outside an object": (b"[1,2]", "error", "bad_message", 4000),
    "no object at all": (b"hello", "error", "bad_message", 4000),
}


def forged(token: str) -> str:
    claims, _, signature = token.partition(".")
    return f"{claims}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"


TOKENS = {
    "a forged token": (forged(TOKEN), "unauthenticated", 4001),
    "another secret's token": (sign("another", client_id="eve", grants=Grants.ALL), "unauthenticated", 4001),
    "an expired token": (
        sign(SECRET, client_id="alice", grants=Grants.ALL, expires=time.time() - 60),
        "token_expired",
        4401,
    ),
    "no token of ours": ("hello", "unauthenticated", 4001),
    "an endless token": ("sub-" + "A" * 12_000, "unauthenticated", 4001),
}


@asynccontextmanager
async def bystander(address: str) -> AsyncIterator[None]:
    """Another client, which must be served before and after as if nothing had happened."""
    async with catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus, bus.subscribe("calm.*") as messages:
        for number in range(2):
            seq = await bus.publish("calm.sea", number)
            assert (await anext(messages)).seq == seq
            if number == 0:
                yield


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("name", WRONG)
async def test_invalid_message_gets_an_error_and_the_session_continues(name: str, opcode: int) -> None:
    if name == "bad UTF-8":
        opcode = BINARY  # A text frame with it is the next test.
    message, kind, code = WRONG[name]
    async with running() as (_, address), bystander(address), speaker(address) as peer:
        await peer.say(AUTH)
        assert (await peer.reply())["type"] == "auth_ok"
        await peer.say(message, opcode)
        reply = await peer.reply()
        assert (reply["type"], reply["code"]) == (kind, code)
        await peer.say({"type": "ping", "seq": 1}, opcode)
        assert await peer.reply() == {"type": "pong", "seq": 1}


async def test_text_frame_that_is_not_utf_8_closes_with_1007() -> None:
    async with running() as (_, address), bystander(address), speaker(address) as peer:
        await peer.say(b'{"type":"ping","seq":"\xff"}')
        assert await peer.close_code() == 1007


@pytest.mark.parametrize("name", ENDING)
async def test_fatal_input_closes_for_good(name: str) -> None:
    message, kind, code, closing = ENDING[name]
    async with running() as (_, address), bystander(address), speaker(address) as peer:
        await peer.say(AUTH)
        assert (await peer.reply())["type"] == "auth_ok"
        await peer.say(message)
        reply = await peer.reply()
        assert (reply["type"], reply["code"]) == (kind, code)
        assert await peer.close_code() == closing


@pytest.mark.parametrize("name", TOKENS)
async def test_invalid_token_is_not_repeated_in_the_reply(name: str) -> None:
    token, code, closing = TOKENS[name]
    async with running() as (_, address), bystander(address), speaker(address) as peer:
        await peer.say({"type": "auth", "token": token, "protocol": 1})
        reply = await peer.reply()
        assert (reply["type"], reply["code"]) == ("auth_error", code)
        assert token not in json.dumps(reply)
        assert await peer.close_code() == closing


async def test_unauthenticated_session_is_closed() -> None:
    config = msgspec.structs.replace(CONFIG, limits=LimitSettings(auth_timeout=0.2))
    async with running(config) as (_, address), bystander(address), speaker(address) as peer:
        assert (await peer.reply())["type"] == "auth_error"
        assert await peer.close_code() == CloseCode.AUTH_TIMEOUT


async def test_client_that_requests_without_reading_harms_only_itself() -> None:
    async with running() as (broker, address), bystander(address), speaker(address) as peer:
        await peer.say(AUTH)
        pings = b'{"type":"ping","seq":1}' * 2000
        with trio.move_on_after(1):
            while True:
                await peer.say(pings)
        [size] = {c.send_queue.size for c in broker.replica.sessions if c.send_queue.size} or {0}
        assert size < 2 * CONFIG.limits.send_queue
