"""What each client plays to the broker, one thing at a time, on the way that it is given."""

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
from tests.conformance.puppets import Failed, Puppet, Unable

TIMES = WebSocketSettings(bind=("127.0.0.1:0",), ping_interval=0.4, silence=1.6)
"""The broker asks soon whether a client is still there, so that it shows within seconds that it answers."""
QUIET = TIMES.silence + 0.8
"""Seconds after which a client that does not answer pings has been closed."""

BACKLOG = 200, 60_000
"""Messages, and the size of each: more than sockets, proxies and the send queue hold."""

JSON = dict[str, Any]


@dataclass
class Scene:
    """A client, the URL at which it is to find the broker, and what it should verify certificates by."""

    puppet: Puppet
    url: str
    ca: str | None
    broker: catbus.Broker
    told: deque[JSON] = field(default_factory=deque)

    async def connect(self, *, compression: bool = False, subprotocols: tuple[str, ...] = (), **headers: str) -> JSON:
        """Open a WebSocket in the place of the one before."""
        self.told.clear()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        found: JSON = await self.puppet.call(
            "connect",
            url=self.url,
            ca=self.ca,
            headers=names,
            subprotocols=list(subprotocols),
            compression=compression,
        )
        return found

    async def say(self, *messages: JSON, binary: bool = False) -> None:
        await self.puppet.call("send", data="".join(json.dumps(each) for each in messages), binary=binary)

    async def hear(self) -> JSON:
        """The next object; or what the connection was closed with, as `closed`."""
        while not self.told:
            came = await self.puppet.call("hear")
            if "closed" in came:
                if came["closed"] is None:
                    raise Unable("does not tell of closing codes")
                return dict(came)
            self.told.extend(json.loads(line) for line in came["text"].split("\n") if line)
        return self.told.popleft()

    async def hear_of(self, kind: str) -> JSON:
        """The next object of this type, which is not to be the end of the connection."""
        while (message := await self.hear()).get("type") != kind:
            assert "closed" not in message, message
        return message

    async def begin(self, **manner: Any) -> JSON:
        """Connect, and say who it is. Returns the `auth_ok`."""
        await self.connect(**manner)
        await self.say({"type": "auth", "token": TOKEN, "protocol": 1})
        return await self.hear_of("auth_ok")

    async def exchange(self, channel: str, payload: Any = "hello", *, binary: bool = False) -> JSON:
        """Subscribe and publish: both the answer and the message must come."""
        await self.say({"type": "subscribe", "pattern": channel}, binary=binary)
        await self.hear_of("subscribed")
        await self.say({"type": "publish", "channel": channel, "payload": payload, "id": 1}, binary=binary)
        return await self.both(payload)

    async def both(self, payload: Any) -> JSON:
        """A message and the answer to its publish, in any order."""
        heard = {message["type"]: message for message in [await self.hear(), await self.hear()]}
        assert set(heard) == {"message", "published"}, heard
        assert heard["message"]["payload"] == payload, heard["message"]
        assert heard["message"]["seq"] == heard["published"]["seq"]
        message: JSON = heard["message"]
        return message

    async def ends_with(self, code: int) -> str:
        """Hear until the connection is closed, which must be with this code."""
        while "closed" not in (message := await self.hear()):
            pass
        assert message["closed"][0] == code, message
        return str(message["closed"][1])


async def session(scene: Scene) -> None:
    """auth, subscribe, publish, the message"""
    found = await scene.begin()
    assert found["client_id"] == "alice"
    assert (await scene.exchange("conformance.session", "grüße \N{CAT FACE}"))["sender"] == "alice"


async def headers(scene: Scene) -> None:
    """headers that mean nothing to the broker, and long ones"""
    await scene.begin(
        Authorization="Bearer of-no-use", Cookie="a=b; c=d", X_Long="x" * 4000, Origin="https://page.example"
    )
    await scene.exchange("conformance.headers")


async def compression(scene: Scene) -> None:
    """compression is offered, and declined"""
    found = await scene.connect(compression=True)
    assert found["extensions"] == [], found
    await scene.say({"type": "auth", "token": TOKEN, "protocol": 1})
    await scene.hear_of("auth_ok")
    await scene.exchange("conformance.compression", "again and " * 1000)


async def binary(scene: Scene) -> None:
    """binary messages"""
    await scene.begin()
    await scene.exchange("conformance.binary", "grüße", binary=True)


async def fragments(scene: Scene) -> None:
    """a message in fragments, cut within an object"""
    await scene.begin()
    await scene.say({"type": "subscribe", "pattern": "conformance.fragments"})
    await scene.hear_of("subscribed")
    whole = json.dumps(
        {"type": "publish", "channel": "conformance.fragments", "payload": "grüße", "id": 1}, ensure_ascii=False
    )
    await scene.puppet.call("fragments", parts=[whole[:9], "", whole[9:60], whole[60:]])
    await scene.both("grüße")


async def pings(scene: Scene) -> None:
    """its pings are answered"""
    await scene.begin()
    for _ in range(3):
        await scene.puppet.call("ping")
    await scene.exchange("conformance.pings")


async def idle(scene: Scene) -> None:
    """it answers the broker's pings while nothing else happens"""
    await scene.begin()
    await scene.say({"type": "subscribe", "pattern": "conformance.idle"})
    await scene.hear_of("subscribed")
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def publish() -> None:
            await trio.sleep(QUIET)
            await scene.broker.publish("conformance.idle", "still here?")

        assert (await scene.hear_of("message"))["payload"] == "still here?"


async def pause(scene: Scene) -> None:
    """it reads nothing for a while, and then gets everything in order"""
    await scene.begin()
    await scene.say({"type": "subscribe", "pattern": "conformance.pause"})
    await scene.hear_of("subscribed")
    await scene.puppet.call("pause")
    count, size = BACKLOG
    for number in range(count):
        await scene.broker.publish("conformance.pause", [number, "x" * size])
    await trio.sleep(QUIET)
    heard = [(await scene.hear_of("message"))["payload"][0] for _ in range(count)]
    assert heard == list(range(count)), heard
    # It says so because the subscription was lagging.
    await scene.hear_of("live")


async def resume(scene: Scene) -> None:
    """it comes back with its cursor, and gets what it has missed"""
    epoch = (await scene.begin())["epoch"]
    cursor = (await scene.exchange("conformance.resume"))["seq"]
    await scene.puppet.call("close", code=1000, reason="")
    for number in range(3):
        await scene.broker.publish("conformance.resume", number)
    await scene.begin()
    await scene.say({"type": "subscribe", "pattern": "conformance.resume", "since": cursor, "epoch": epoch})
    kinds = [await scene.hear() for _ in range(5)]
    assert [each["type"] for each in kinds] == ["subscribed", *["message"] * 3, "live"], kinds
    assert [each["payload"] for each in kinds[1:4]] == [0, 1, 2]
    await scene.say({"type": "publish", "channel": "conformance.resume", "payload": "live", "id": 1})
    await scene.both("live")


async def leaving(scene: Scene) -> None:
    """it closes, with codes of its own, which come back"""
    for code, reason in ((1000, ""), (4999, "enough")):
        others = len(scene.broker.replica.sessions)
        await scene.begin()
        found = await scene.puppet.call("close", code=code, reason=reason)
        if found["closed"] is None:
            raise Unable("does not tell of closing codes")
        assert found["closed"][0] == code, found
        while len(scene.broker.replica.sessions) > others:
            await trio.sleep(0.01)


async def codes(scene: Scene) -> None:
    """the broker closes, with its codes and reasons"""
    await scene.connect()
    await scene.say({"type": "auth", "token": "sub-wrong", "protocol": 1})
    assert await scene.ends_with(CloseCode.UNAUTHENTICATED) == "the token is not valid"
    await scene.begin()
    await scene.puppet.call("send", data="no object", binary=False)
    await scene.ends_with(CloseCode.BAD_MESSAGE)
    await scene.begin()
    await scene.say({"type": "publish", "channel": "a", "payload": "x" * 70_000})
    await scene.ends_with(CloseCode.TOO_LARGE)
    await scene.begin()
    await scene.say({"type": "publish", "channel": "a", "payload": "x" * 1_100_000})
    await scene.ends_with(1009)


async def stopping(scene: Scene) -> None:
    """the replica stops"""
    await scene.begin()
    scene.broker.stop()
    await scene.ends_with(CloseCode.SHUTTING_DOWN)


async def subprotocol(scene: Scene) -> str:
    """a subprotocol is offered, and none selected: a client goes on or gives up"""
    try:
        found = await scene.connect(subprotocols=("catbus.v1",))
    except Failed:
        return "gives up"
    assert found["subprotocol"] is None, found
    await scene.say({"type": "auth", "token": TOKEN, "protocol": 1})
    await scene.hear_of("auth_ok")
    return "goes on"


STEPS: tuple[Callable[[Scene], Awaitable[str | None]], ...] = (
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
