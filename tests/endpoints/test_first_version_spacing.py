"""First-version clients over WebTransport, on real UDP. They take the result of one read for one object."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import trio

from catbus.broker import OWNER
from catbus.endpoints.webtransport import first_version_spacing
from catbus.endpoints.webtransport.first_version_spacing import SPACING, UNIT, pad_object, spacing
from catbus.protocol.wire_messages import Publish
from catbus.webtransport import StreamData
from tests.brokers import CONFIG, TOKEN
from tests.endpoints.quic_server import Client, Server, serving


@pytest.fixture
def unspaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send each object as soon as the one before is acknowledged."""
    monkeypatch.setattr(first_version_spacing, "SPACING", (0.0, 0.0))


async def publish(server: Server, channel: str, *payloads: object) -> None:
    await server.replica.publish(OWNER, [Publish(channel, msgspec.Raw(msgspec.json.encode(each))) for each in payloads])


def reads(client: Client) -> list[bytes]:
    """Return the data of the session's stream, packet by packet."""
    return [event.data for event in client.saw(StreamData) if event.stream == client.stream]


def payloads(client: Client) -> list[Any]:
    return [line["payload"] for line in client.lines if line["type"] == "message"]


@pytest.mark.usefixtures("unspaced")
async def test_each_object_has_a_packet_of_its_own() -> None:
    async with serving() as server:
        client = await server.log_in("a.*", protocol=None)
        for number in range(30):
            client.say(type="publish", channel="a.b", payload=number)
        await publish(server, "a.b", *["x" * size for size in range(0, 900, 30)])
        await client.until(lambda: len(payloads(client)) == 60 and len(client.lines) == 90)
        for data in reads(client):
            assert isinstance(json.loads(data), dict)
            assert len(data) % UNIT == 0


async def test_object_waits_until_the_previous_one_could_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_version_spacing, "SPACING", (1e6, 1e6))
    async with serving() as server:
        client = server.connect()
        await client.open()
        client.say(type="ping", seq=1)
        client.say(type="ping", seq=2)
        assert (await client.line())["seq"] == 1
        [conversation] = [peer.session for peer in server.endpoint._router.peers]
        while conversation is None or conversation.next_send_time is None:
            await trio.sleep(0.001)
        assert conversation.next_send_time > trio.current_time() + 1e5
        assert not client.lines
        # Lines for a `catbus.v1` client do not wait.
        client.say(type="auth", token=TOKEN, protocol=1)
        assert [(await client.line())["type"] for _ in range(2)] == ["pong", "auth_ok"]
        client.say(type="subscribe", pattern="a.*")
        assert (await client.line())["type"] == "subscribed"
        await publish(server, "a.b", *range(100))
        await client.until(lambda: payloads(client) == list(range(100)))
        assert conversation.next_send_time is None


@pytest.mark.usefixtures("unspaced")
async def test_first_version_client_gets_a_long_backlog_in_order() -> None:
    limits = msgspec.structs.replace(CONFIG.limits, send_queue=1 << 14)
    async with serving(msgspec.structs.replace(CONFIG, limits=limits)) as server:
        client = await server.log_in("a.*", protocol=None)
        [one] = server.replica.sessions
        for number in range(600):
            await publish(server, "a.b", [number, "x" * 200])
            assert one.send_queue.size <= one.send_queue.limit
        assert server.replica.delivery.statistics().lagging == 1
        await client.until(lambda: len(payloads(client)) == 600)
        assert [number for number, _ in payloads(client)] == list(range(600))


@pytest.mark.usefixtures("unspaced")
async def test_first_version_client_gets_waiting_objects_before_the_close() -> None:
    async with serving() as server:
        client = await server.log_in("a.*", protocol=None)
        await publish(server, "a.b", *range(20))
        server.replica.finish()
        await client.lost()
        assert payloads(client) == list(range(20))


async def test_objects_of_a_first_version_client_may_be_split_anywhere() -> None:
    async with serving() as server:
        client = server.connect()
        await client.open()
        said = [
            {"type": "auth", "token": TOKEN},
            {"type": "subscribe", "pattern": "a.*"},
            {"type": "publish", "channel": "a.b", "payload": "}{\n"},
        ]
        client.write(b"".join(json.dumps(each).encode() for each in said))
        await client.until(lambda: len(client.lines) == 4)
        assert {line["type"] for line in client.lines} == {"auth_ok", "subscribed", "message", "published"}
        client.lines.clear()
        for byte in json.dumps({"type": "publish", "channel": "a.b", "payload": ["ü", "}"]}).encode():
            client.write(bytes([byte]))
        await client.until(lambda: len(client.lines) == 2)
        assert payloads(client) == [["ü", "}"]]


def test_spacing_shrinks_with_a_longer_backlog() -> None:
    least, most = SPACING
    times = [spacing(waiting, more=False) for waiting in range(300)]
    assert times[0] == times[1] == most
    assert times[-1] == least == spacing(1, more=True)
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("size", [3, 1023, 1024, 1025, 5000])
def test_line_is_padded_to_whole_units(size: int) -> None:
    line = b"{" + b"}".rjust(size - 2) + b"\n"
    filled = pad_object(line)
    assert filled[: size - 1] == line[:-1]
    assert filled.endswith(b"\n")
    assert not filled[size - 1 :].strip()
    assert 0 <= len(filled) - size < UNIT
    assert len(filled) % UNIT == 0
