"""The steps that each client runs against the broker, over one network path."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

import catbus
from catbus import CloseCode
from catbus.config import WebSocketSettings
from tests.brokers import TOKEN
from tests.conformance.third_party_clients import CommandFailed, ThirdPartyClient, Unsupported

PING_SETTINGS = WebSocketSettings(bind=("127.0.0.1:0",), ping_interval=0.4, silence=1.6)
"""Short intervals, so that an idle client has to answer pings within seconds."""
SILENCE = PING_SETTINGS.silence + 0.8
"""Seconds after which the broker has closed a client that does not answer pings."""

BACKLOG = 200, 60_000
"""The number of messages, and the size of each: more than sockets, proxies and the send queue hold."""

JSON = dict[str, Any]


@dataclass
class ClientUnderTest:
    """A client with the URL of its broker and the file of its certificate authority (None without TLS)."""

    driver: ThirdPartyClient
    url: str
    ca: str | None
    broker: catbus.Broker
    received: deque[JSON] = field(default_factory=deque)

    async def connect(self, *, compression: bool = False, subprotocols: tuple[str, ...] = (), **headers: str) -> JSON:
        """Open a WebSocket that replaces the previous one. Returns the selected extensions and subprotocol."""
        self.received.clear()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        found: JSON = await self.driver.call(
            "connect",
            url=self.url,
            ca=self.ca,
            headers=names,
            subprotocols=list(subprotocols),
            compression=compression,
        )
        return found

    async def send(self, *messages: JSON, binary: bool = False) -> None:
        await self.driver.call("send", data="".join(json.dumps(each) for each in messages), binary=binary)

    async def receive(self) -> JSON:
        """The next object, or `{"closed": [code, reason]}` at the end of the connection."""
        while not self.received:
            line = await self.driver.call("receive")
            if "closed" in line:
                if line["closed"] is None:
                    raise Unsupported("does not report close codes")
                return dict(line)
            self.received.extend(json.loads(text) for text in line["text"].split("\n") if text)
        return self.received.popleft()

    async def receive_type(self, kind: str) -> JSON:
        """The next object of this type. Fails if the connection ends before it."""
        while (message := await self.receive()).get("type") != kind:
            assert "closed" not in message, message
        return message

    async def authenticate(self, **options: Any) -> JSON:
        """Connect and authenticate. Returns the `auth_ok`."""
        await self.connect(**options)
        await self.send({"type": "auth", "token": TOKEN, "protocol": 1})
        return await self.receive_type("auth_ok")

    async def subscribe_and_publish(self, channel: str, payload: Any = "hello", *, binary: bool = False) -> JSON:
        """Subscribe to a channel and publish to it. Returns the message, which must arrive, like the reply."""
        await self.send({"type": "subscribe", "pattern": channel}, binary=binary)
        await self.receive_type("subscribed")
        await self.send({"type": "publish", "channel": channel, "payload": payload, "id": 1}, binary=binary)
        return await self.receive_message_and_reply(payload)

    async def receive_message_and_reply(self, payload: Any) -> JSON:
        """Receive a message and the reply to its publish, in either order. Returns the message."""
        received = {message["type"]: message for message in [await self.receive(), await self.receive()]}
        assert set(received) == {"message", "published"}, received
        assert received["message"]["payload"] == payload, received["message"]
        assert received["message"]["seq"] == received["published"]["seq"]
        message: JSON = received["message"]
        return message

    async def wait_closed(self, code: int) -> str:
        """Receive until the connection is closed, which must be with this code. Returns the reason."""
        while "closed" not in (message := await self.receive()):
            pass
        assert message["closed"][0] == code, message
        return str(message["closed"][1])


async def session(client: ClientUnderTest) -> None:
    """auth, subscribe, publish and the message"""
    found = await client.authenticate()
    assert found["client_id"] == "alice"
    assert (await client.subscribe_and_publish("conformance.session", "grüße \N{CAT FACE}"))["sender"] == "alice"


async def headers(client: ClientUnderTest) -> None:
    """headers that the broker ignores, and long headers"""
    await client.authenticate(
        Authorization="Bearer of-no-use", Cookie="a=b; c=d", X_Long="x" * 4000, Origin="https://page.example"
    )
    await client.subscribe_and_publish("conformance.headers")


async def compression(client: ClientUnderTest) -> None:
    """an offer of compression, which the broker declines"""
    found = await client.connect(compression=True)
    assert found["extensions"] == [], found
    await client.send({"type": "auth", "token": TOKEN, "protocol": 1})
    await client.receive_type("auth_ok")
    await client.subscribe_and_publish("conformance.compression", "again and " * 1000)


async def binary(client: ClientUnderTest) -> None:
    """binary messages"""
    await client.authenticate()
    await client.subscribe_and_publish("conformance.binary", "grüße", binary=True)


async def fragments(client: ClientUnderTest) -> None:
    """a message in fragments, split within an object"""
    await client.authenticate()
    await client.send({"type": "subscribe", "pattern": "conformance.fragments"})
    await client.receive_type("subscribed")
    whole = json.dumps(
        {"type": "publish", "channel": "conformance.fragments", "payload": "grüße", "id": 1}, ensure_ascii=False
    )
    await client.driver.call("fragments", parts=[whole[:9], "", whole[9:60], whole[60:]])
    await client.receive_message_and_reply("grüße")


async def pings(client: ClientUnderTest) -> None:
    """pings of the client, which the broker answers"""
    await client.authenticate()
    for _ in range(3):
        await client.driver.call("ping")
    await client.subscribe_and_publish("conformance.pings")


async def idle(client: ClientUnderTest) -> None:
    """pings of the broker on an idle connection, which the client answers"""
    await client.authenticate()
    await client.send({"type": "subscribe", "pattern": "conformance.idle"})
    await client.receive_type("subscribed")
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def publish() -> None:
            await trio.sleep(SILENCE)
            await client.broker.publish("conformance.idle", "still here?")

        assert (await client.receive_type("message"))["payload"] == "still here?"


async def pause(client: ClientUnderTest) -> None:
    """a client that pauses reading and then receives all messages in order"""
    await client.authenticate()
    await client.send({"type": "subscribe", "pattern": "conformance.pause"})
    await client.receive_type("subscribed")
    await client.driver.call("pause")
    count, size = BACKLOG
    for number in range(count):
        await client.broker.publish("conformance.pause", [number, "x" * size])
    await trio.sleep(SILENCE)
    received = [(await client.receive_type("message"))["payload"][0] for _ in range(count)]
    assert received == list(range(count)), received
    # The broker sends `live` because the subscription was lagging.
    await client.receive_type("live")


async def resume(client: ClientUnderTest) -> None:
    """a client that reconnects with its cursor and receives the missed messages"""
    epoch = (await client.authenticate())["epoch"]
    cursor = (await client.subscribe_and_publish("conformance.resume"))["seq"]
    await client.driver.call("close", code=1000, reason="")
    for number in range(3):
        await client.broker.publish("conformance.resume", number)
    await client.authenticate()
    await client.send({"type": "subscribe", "pattern": "conformance.resume", "since": cursor, "epoch": epoch})
    kinds = [await client.receive() for _ in range(5)]
    assert [each["type"] for each in kinds] == ["subscribed", *["message"] * 3, "live"], kinds
    assert [each["payload"] for each in kinds[1:4]] == [0, 1, 2]
    await client.send({"type": "publish", "channel": "conformance.resume", "payload": "live", "id": 1})
    await client.receive_message_and_reply("live")


async def leaving(client: ClientUnderTest) -> None:
    """closing by the client, whose codes the broker returns"""
    for code, reason in ((1000, ""), (4999, "enough")):
        others = len(client.broker.replica.sessions)
        await client.authenticate()
        found = await client.driver.call("close", code=code, reason=reason)
        if found["closed"] is None:
            raise Unsupported("does not report close codes")
        assert found["closed"][0] == code, found
        while len(client.broker.replica.sessions) > others:
            await trio.sleep(0.01)


async def codes(client: ClientUnderTest) -> None:
    """closing by the broker, with its codes and reasons"""
    await client.connect()
    await client.send({"type": "auth", "token": "sub-wrong", "protocol": 1})
    assert await client.wait_closed(CloseCode.UNAUTHENTICATED) == "the token is not valid"
    await client.authenticate()
    await client.driver.call("send", data="no object", binary=False)
    await client.wait_closed(CloseCode.BAD_MESSAGE)
    await client.authenticate()
    await client.send({"type": "publish", "channel": "a", "payload": "x" * 70_000})
    await client.wait_closed(CloseCode.TOO_LARGE)
    await client.authenticate()
    await client.send({"type": "publish", "channel": "a", "payload": "x" * 1_100_000})
    await client.wait_closed(1009)


async def stopping(client: ClientUnderTest) -> None:
    """a replica that stops"""
    await client.authenticate()
    client.broker.stop()
    await client.wait_closed(CloseCode.SHUTTING_DOWN)


async def subprotocol(client: ClientUnderTest) -> str:
    """an offer of a subprotocol, of which the broker selects none: the client continues or closes"""
    try:
        found = await client.connect(subprotocols=("catbus.v1",))
    except CommandFailed:
        return "closes"
    assert found["subprotocol"] is None, found
    await client.send({"type": "auth", "token": TOKEN, "protocol": 1})
    await client.receive_type("auth_ok")
    return "continues"


STEPS: tuple[Callable[[ClientUnderTest], Awaitable[str | None]], ...] = (
    session,
    headers,
    compression,
    subprotocol,
    binary,
    fragments,
    pings,
    idle,
    pause,
    resume,
    leaving,
    codes,
    stopping,
)
