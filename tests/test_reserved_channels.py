"""Channels that begin with `_`: only the broker publishes to them, and `*` does not include them."""

from __future__ import annotations

import json

import msgspec
import pytest
import trio

import catbus
from catbus import Broker, ErrorCode
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.config import AuthSettings
from catbus.log import Append, Outcome
from tests.brokers import CONFIG, SECRET, TOKEN, running
from tests.endpoints.raw_peer import Peer

CHANNEL = "_catbus.sessions.alice"
ADMIN_KEY = "an admin key of the tests"
ALL_GRANTS = sign(
    SECRET,
    client_id="alice",
    grants=Grants(("*", "_catbus.*", "_erased"), ("*", "_catbus.*", "_erased", CHANNEL)),
)
TOKENS = pytest.mark.parametrize("token", [TOKEN, ALL_GRANTS, ADMIN_KEY], ids=["*", "named", "admin key"])
WITH_ADMIN_KEY = msgspec.structs.replace(CONFIG, auth=AuthSettings(secrets=(SECRET,), admin_key=ADMIN_KEY))


async def publish_as_broker(broker: Broker, channel: str, payload: bytes) -> None:
    done = trio.Event()

    def settle(_: Append, __: Outcome) -> None:
        done.set()

    broker.replica.log.submit(Append(channel, payload, settle))
    await done.wait()


@TOKENS
async def test_no_token_permits_publishing_to_a_reserved_channel(token: str) -> None:
    async with running(WITH_ADMIN_KEY) as (broker, address), catbus.connect(f"ws://{address}/ws", token=token) as bus:
        for channel in (CHANNEL, "_erased", "_"):
            for ephemeral in (False, True):
                with pytest.raises(catbus.Refused, match="reserved") as refused:
                    await bus.publish(channel, 1, ephemeral=ephemeral)
                assert refused.value.code == ErrorCode.UNAUTHORIZED
            async with await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2])) as stream:
                peer = Peer(stream)
                body = json.dumps({"channel": channel, "payload": 1}).encode()
                head = f"POST /publish HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n"
                await peer.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert (await peer.response()).status == 403
        assert broker.replica.log.applied == 0


async def test_process_of_the_broker_cannot_publish_to_a_reserved_channel() -> None:
    with trio.fail_after(30):
        async with catbus.open_broker() as broker:
            for ephemeral in (False, True):
                with pytest.raises(catbus.Refused, match="reserved"):
                    await broker.publish(CHANNEL, 1, ephemeral=ephemeral)
            assert broker.replica.log.applied == 0


@pytest.mark.parametrize("since", [None, 0], ids=["live", "resumed"])
async def test_subscription_to_all_channels_gets_no_reserved_message(since: int | None) -> None:
    """Neither live nor from the log. A subscription that names reserved channels gets them."""
    url_of = "ws://{}/ws".format
    async with (
        running() as (broker, address),
        catbus.connect(url_of(address), token=TOKEN) as all_channels,
        catbus.connect(url_of(address), token=ALL_GRANTS) as named,
    ):
        if since is not None:
            await publish_as_broker(broker, CHANNEL, b"1")
            await broker.publish("a", 2)
        async with (
            all_channels.subscribe("*", since=since) as everything,
            named.subscribe("_catbus.sessions.*", since=since) as reserved,
            broker.subscribe("*", since=since) as local,
            broker.subscribe("_catbus.*", since=since) as local_reserved,
        ):
            if since is None:
                await publish_as_broker(broker, CHANNEL, b"1")
                await broker.publish("a", 2)
            received = [(await anext(everything)).payload, (await anext(local)).payload]
            received += [(await anext(reserved)).payload, (await anext(local_reserved)).payload]
        history = [message.payload for message in (await all_channels.history("*")).messages]
    assert received == [2, 2, 1, 1]
    assert history == [2]


@pytest.mark.parametrize("pattern", [CHANNEL, "_catbus.*", "_erased"])
async def test_grant_for_all_channels_does_not_permit_reading_a_reserved_one(pattern: str) -> None:
    async with running() as (_, address), catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus:
        with pytest.raises(catbus.Refused) as refused:
            async with bus.subscribe(pattern):
                raise AssertionError("subscribed")
        assert refused.value.code == ErrorCode.UNAUTHORIZED
        with pytest.raises(catbus.Refused):
            await bus.history(pattern)


async def test_admin_key_permits_reading_the_channels_of_the_broker() -> None:
    async with (
        running(WITH_ADMIN_KEY) as (broker, address),
        catbus.connect(f"ws://{address}/ws", token=ADMIN_KEY) as bus,
        bus.subscribe("_catbus.*") as messages,
    ):
        await publish_as_broker(broker, CHANNEL, b"1")
        assert (await anext(messages)).channel == CHANNEL
