"""Role tokens from the wire to the database: the permissions of their sessions, and changes to them."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

import catbus
from catbus import Config
from catbus.auth.grants import Grants
from catbus.auth.role_tokens import make_role_token
from catbus.close_codes import CloseCode
from catbus.config import DatabaseSettings
from catbus.error_codes import ErrorCode
from catbus.postgres.roles.role_store import open_roles
from tests.brokers import CONFIG, running
from tests.endpoints.raw_peer import Peer
from tests.postgres.proxy import open_proxy
from tests.test_both_transports import running as running_both_transports
from tests.test_wrong_input import Speaker, speaker

GRANTS = Grants(("a.*",), ("a.*", "b"))


def on(url: str) -> Config:
    """The configuration of a broker on this database, with a short timeout."""
    return msgspec.structs.replace(CONFIG, database=DatabaseSettings(url=url, publish_timeout=1, connect_timeout=1))


async def make_role(url: str, client_id: str | None = "ci") -> str:
    async with open_roles(DatabaseSettings(url=url)) as roles:
        token, _ = await roles.create(client_id, GRANTS)
    return token


async def delete_role(url: str, token: str) -> None:
    async with open_roles(DatabaseSettings(url=url)) as roles:
        await roles.delete(token)


async def authenticate(peer: Speaker, token: str) -> dict[str, Any]:
    await peer.say({"type": "auth", "token": token, "protocol": 1})
    return await peer.reply()


async def post(address: str, token: str, body: bytes) -> tuple[int, Any]:
    host, _, port = address.rpartition(":")
    head = f"POST /publish HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        peer = Peer(stream)
        await peer.send(head.encode() + body)
        response = await peer.response()
    return response.status, msgspec.json.decode(response.body)


async def test_role_allows_only_its_grants(database_url: str) -> None:
    token = await make_role(database_url)
    async with running(on(database_url)) as (broker, address):
        await broker.replica.log.wait_open()
        async with catbus.connect(f"ws://{address}/ws", token=token) as bus:
            assert bus.client_id == "ci"
            async with bus.subscribe("a.*") as messages:
                seq = await bus.publish("a.1", 1)
                message = await anext(messages)
                assert (message.seq, message.sender) == (seq, "ci")
            await bus.publish("b", 2)
            with pytest.raises(catbus.Refused) as caught:
                await bus.publish("c", 3)
            assert caught.value.code is ErrorCode.UNAUTHORIZED
            with pytest.raises(catbus.Refused) as caught:
                async with bus.subscribe("b"):
                    pass
            assert caught.value.code is ErrorCode.UNAUTHORIZED


async def test_unknown_and_deleted_roles_are_rejected_for_good(database_url: str) -> None:
    deleted = await make_role(database_url)
    async with running(on(database_url)) as (broker, address):
        await broker.replica.log.wait_open()
        async with speaker(address) as peer:
            assert (await authenticate(peer, deleted))["type"] == "auth_ok"
        await delete_role(database_url, deleted)
        for token in (deleted, make_role_token(), "role-nonsense"):
            async with speaker(address) as peer:
                reply = await authenticate(peer, token)
                assert (reply["type"], reply["code"]) == ("auth_error", "unauthenticated")
                assert token not in str(reply)
                assert await peer.close_code() == CloseCode.UNAUTHENTICATED == 4001


async def test_requests_in_the_same_bytes_wait_for_the_role_lookup(database_url: str) -> None:
    token = await make_role(database_url)
    async with running(on(database_url)) as (broker, address), speaker(address) as peer:
        await broker.replica.log.wait_open()
        await peer.say(
            b'{"type":"auth","protocol":1,"token":"%b"}{"type":"subscribe","pattern":"a.*"}'
            b'{"type":"publish","channel":"a.1","payload":1,"ack":false}{"type":"ping","seq":1}' % token.encode()
        )
        replies = [await peer.reply() for _ in range(5)]
    assert [reply["type"] for reply in replies[:3]] == ["auth_ok", "subscribed", "pong"]
    assert {reply["type"] for reply in replies[3:]} == {"head", "message"}


async def test_unreachable_database_keeps_sessions_and_makes_role_tokens_retryable(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = await make_role(database_url)
    async with open_proxy(database_url) as proxy, running(on(proxy.url)) as (broker, address):
        await broker.replica.log.wait_open()
        async with speaker(address) as staying:
            assert (await authenticate(staying, token))["type"] == "auth_ok"
            proxy.close()
            async with speaker(address) as peer:
                reply = await authenticate(peer, token)
                assert (reply["type"], reply["code"]) == ("auth_error", "unavailable")
                assert await peer.close_code() == CloseCode.UNAVAILABLE == 4503
            status, result = await post(address, token, b'{"channel":"b","payload":1}')
            assert (status, result["code"]) == (503, "unavailable")
            reply = await authenticate(staying, token)
            assert (reply["type"], reply["code"]) == ("auth_error", "unavailable")
            await staying.say({"type": "publish", "channel": "b", "payload": 1, "ephemeral": True})
            assert (await staying.reply())["type"] == "published"
            proxy.open()
            async with speaker(address) as peer:
                assert (await authenticate(peer, token))["type"] == "auth_ok"
            assert (await authenticate(staying, token))["type"] == "auth_ok"
    assert token not in caplog.text and token.removeprefix("role-") not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_role_change_reaches_sessions_on_every_replica_and_transport(
    database_url: str, tmp_path: Path, stream: bool
) -> None:
    token = await make_role(database_url)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        roles = await enter(open_roles(DatabaseSettings(url=database_url)))
        await roles.grant(token, Grants(("b", "c.d")))
        buses = []
        for name in ("one", "other"):
            broker, websocket, found = await enter(running_both_transports(tmp_path / name, on(database_url)))
            await broker.replica.log.wait_open()
            buses.append(await enter(catbus.connect(websocket, token=token)))
            webtransport, ca = found["webtransport"], found["certificate"]
            buses.append(await enter(catbus.connect(webtransport, token=token, ca=ca)))
        taken = [await enter(bus.subscribe("a.*", stream=stream)) for bus in buses]
        kept = [await enter(bus.subscribe("b", stream=stream)) for bus in buses]
        await buses[0].publish("a.x", 1)
        assert [(await anext(messages)).payload for messages in taken] == [1] * 4
        await roles.revoke(token, Grants(("a.*",), ("a.*",)))
        for messages in taken:
            with pytest.raises(catbus.Refused) as caught:
                await anext(messages)
            assert caught.value.code is ErrorCode.REVOKED
        for bus in buses:
            with pytest.raises(catbus.Refused) as caught:
                await bus.publish("a.x", 2)
            assert caught.value.code is ErrorCode.UNAUTHORIZED
        await buses[0].publish("b", 3)
        assert [(await anext(messages)).payload for messages in kept] == [3] * 4
        await roles.grant(token, Grants((), ("a.*",)))
        while True:
            with suppress(catbus.Refused):
                await buses[3].publish("a.x", 4)
                break
        await roles.delete(token)
        for messages in kept:
            with pytest.raises(catbus.CatbusError) as ended:
                await anext(messages)
            assert getattr(ended.value, "code", None) in (ErrorCode.REVOKED, CloseCode.REVOKED), ended.value


async def test_role_token_publishes_over_http(database_url: str) -> None:
    token = await make_role(database_url)
    async with running(on(database_url)) as (broker, address):
        await broker.replica.log.wait_open()
        async with broker.subscribe("*") as messages:
            assert await post(address, token, b'{"channel":"b","payload":1}') == (200, {"seq": 1, "channel": "b"})
            assert (await anext(messages)).sender == "ci"
        status, result = await post(address, token, b'{"channel":"c","payload":1}')
        assert (status, result["code"]) == (403, "unauthorized")
        await delete_role(database_url, token)
        status, result = await post(address, token, b'{"channel":"b","payload":1}')
        assert (status, result["code"]) == (401, "unauthenticated")


async def test_broker_without_a_database_reports_why_it_rejects_role_tokens() -> None:
    async with running() as (_, address), speaker(address) as peer:
        reply = await authenticate(peer, make_role_token())
        assert reply["code"] == "unauthenticated"
        assert reply["message"] == "role tokens need a database, and this broker has none"
        assert await peer.close_code() == 4001
