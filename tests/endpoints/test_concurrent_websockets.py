"""Raw clients of a real broker."""

from __future__ import annotations

import json
from typing import Any

import trio

from tests.brokers import TOKEN, running
from tests.endpoints import raw_peer
from tests.endpoints.raw_peer import Frame, Peer, masked


def say(**message: object) -> bytes:
    return masked(raw_peer.TEXT, json.dumps(message).encode())


def lines(frame: Frame) -> list[dict[str, Any]]:
    assert frame.opcode == raw_peer.TEXT
    return [json.loads(text) for text in frame.payload.splitlines()]


async def connect(address: str) -> Peer:
    host, _, port = address.rpartition(":")
    return Peer(await trio.open_tcp_stream(host, int(port)))


async def test_posted_messages_reach_clients_of_both_versions() -> None:
    async with running() as (_, address):
        modern, first, poster = [await connect(address) for _ in range(3)]
        for peer, protocol in ((modern, {"protocol": 1}), (first, {})):
            await peer.upgrade()
            await peer.send(say(type="auth", token=TOKEN, **protocol) + say(type="subscribe", pattern="a.*"))
            seen: list[str] = []
            while "subscribed" not in seen:
                seen += [message["type"] for message in lines(await peer.frame())]
            assert seen[:2] == ["auth_ok", "subscribed"]

        body = b'[{"channel":"a.b","payload":{"n":\n1}},{"channel":"no..pe","payload":2},{"channel":"a.c","payload":3}]'
        await poster.send(
            b"POST /publish HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
            % (TOKEN.encode(), len(body), body)
        )
        response = await poster.response()
        one, two, three = json.loads(response.body)
        assert response.status == 400
        assert (one["channel"], two["code"], three["seq"]) == ("a.b", "invalid_channel", one["seq"] + 1)

        messages: list[dict[str, Any]] = []
        while len(messages) < 2:
            messages += [message for message in lines(await modern.frame()) if message["type"] == "message"]
        assert [(m["channel"], m["payload"], m["pattern"], m["seq"]) for m in messages] == [
            ("a.b", {"n": 1}, "a.*", one["seq"]),
            ("a.c", 3, "a.*", three["seq"]),
        ]
        assert await first.frame() == (raw_peer.TEXT, b'{"type":"message","channel":"a.b","payload":{"n": 1}}')
        assert await first.frame() == (raw_peer.TEXT, b'{"type":"message","channel":"a.c","payload":3}')
        for peer in (modern, first, poster):
            await peer.stream.aclose()
