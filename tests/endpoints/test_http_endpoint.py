"""catbus.endpoints.http.http_endpoint, over real sockets"""

from __future__ import annotations

import json
import resource
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from ipaddress import IPv4Address

import pytest
import trio

from catbus.close_codes import CloseCode
from catbus.config import Config, LimitSettings, WebSocketSettings
from catbus.endpoints import HttpEndpoint, serve_http
from catbus.endpoints.http import http_endpoint
from catbus.endpoints.open_files import RESERVED_FILES
from catbus.error_codes import ErrorCode
from catbus.errors import ConfigError
from tests.endpoints import raw_peer
from tests.endpoints.fake_replica import FakeReplica
from tests.endpoints.raw_peer import Peer, masked, patience

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def serving(replica: FakeReplica, *binds: str) -> AsyncIterator[HttpEndpoint]:
    with patience():
        async with trio.open_nursery() as nursery, trio.open_nursery() as sessions:
            serve = partial(serve_http, replica)
            endpoint = await nursery.start(serve, binds or ("127.0.0.1:0",), sessions)
            yield endpoint
            nursery.cancel_scope.cancel()
            sessions.cancel_scope.cancel()


@asynccontextmanager
async def connected(endpoint: HttpEndpoint, index: int = 0) -> AsyncIterator[Peer]:
    host, _, port = endpoint.addresses[index].rpartition(":")
    async with await trio.open_tcp_stream(host.strip("[]"), int(port)) as stream:
        yield Peer(stream)


async def show_token(peer: Peer) -> None:
    """Open a WebSocket, and send something that counts as a valid token."""
    await peer.upgrade()
    await peer.send(masked(raw_peer.TEXT, b"token"))
    assert (await peer.frame()).payload == b"token\n"


async def test_endpoint_listens_on_all_addresses() -> None:
    async with serving(FakeReplica(), "127.0.0.1:0", "[::1]:0") as endpoint:
        assert [address.rpartition(":")[0] for address in endpoint.addresses] == ["127.0.0.1", "[::1]"]
        for index in range(2):
            async with connected(endpoint, index) as peer:
                await peer.send(HEALTH)
                assert (await peer.response()).body == b"ok"


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.1:0x50", "no.such.host.invalid:0", "192.0.2.1:0"])
async def test_unavailable_address_is_named_in_the_error(bind: str) -> None:
    async with trio.open_nursery() as sessions:
        with pytest.raises(ConfigError, match=bind):
            await serve_http(FakeReplica(), ["127.0.0.1:0", bind], sessions)


async def test_address_in_use_is_named_in_the_error() -> None:
    async with serving(FakeReplica()) as endpoint, trio.open_nursery() as sessions:
        with pytest.raises(ConfigError, match=f"cannot listen on {endpoint.addresses[0]}: .*in use"):
            await serve_http(FakeReplica(), endpoint.addresses, sessions)


async def test_client_sends_requests_and_opens_a_websocket() -> None:
    replica = FakeReplica()
    async with serving(replica) as endpoint, connected(endpoint) as peer:
        await peer.send(HEALTH)
        assert (await peer.response()).status == 200
        await show_token(peer)
        await peer.send(masked(raw_peer.TEXT, b"x" * 500_000))
        assert await peer.frame() == (raw_peer.TEXT, b"x" * 500_000 + b"\n")
        statistics = endpoint.statistics()
        assert (statistics.connections, statistics.websockets, statistics.rejected, statistics.internal_errors) == (
            1,
            1,
            0,
            0,
        )
        await peer.send(raw_peer.close_frame(1000))
        assert (await peer.frame()).code == 1000
        assert await peer.at_end()


async def test_closed_endpoint_accepts_nothing_and_keeps_its_websockets() -> None:
    replica = FakeReplica()
    async with trio.open_nursery() as nursery, trio.open_nursery() as sessions:
        nursery.cancel_scope.deadline = trio.current_time() + 30
        ended = trio.Event()

        async def serve(*, task_status: trio.TaskStatus[HttpEndpoint]) -> None:
            await serve_http(replica, ["127.0.0.1:0"], sessions, task_status=task_status)
            ended.set()

        endpoint = await nursery.start(serve)
        async with connected(endpoint) as idle, connected(endpoint) as peer:
            await idle.send(HEALTH)
            await idle.response()
            await peer.upgrade()
            endpoint.close()
            assert await idle.at_end()
            await idle.stream.aclose()
            with pytest.raises(OSError, match="all attempts to connect"):
                async with connected(endpoint):
                    pass
            await peer.send(masked(raw_peer.TEXT, b"still here"))
            assert (await peer.frame()).payload == b"still here\n"
            assert not ended.is_set()
            replica.sessions[0].close(CloseCode.SHUTTING_DOWN, "stopping")
            assert (await peer.frame()).code == 4504
            await peer.send(raw_peer.close_frame(4504))
            assert await peer.at_end()
        await ended.wait()


async def test_connections_over_the_limit_get_a_response() -> None:
    async with serving(FakeReplica(Config(limits=LimitSettings(connections=2)))) as endpoint:
        async with connected(endpoint) as first, connected(endpoint) as second:
            for peer in (first, second):
                await show_token(peer)
            async with connected(endpoint) as third:
                await third.send(HEALTH)
                response = await third.response()
                assert (response.status, response.body) == (
                    503,
                    b'{"error":"too many connections (limits.connections)","code":"overloaded"}\n',
                )
                assert await third.at_end()
                # It stays open until the peer closes: a reset could arrive before the peer has read the response.
                assert endpoint.statistics().connections == 3
            assert endpoint.statistics().rejected == 1
        while endpoint.statistics().connections:
            await trio.lowlevel.checkpoint()
        async with connected(endpoint) as peer:
            await peer.send(HEALTH)
            assert (await peer.response()).status == 200


async def test_address_is_limited_in_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IPv4Address, "is_loopback", False)  # as if this machine were another one
    replica = FakeReplica(Config(limits=LimitSettings(address_connections=1)))
    async with serving(replica) as endpoint:
        async with connected(endpoint) as first:
            await show_token(first)
            async with connected(endpoint) as second:
                response = await second.response()
                assert (response.status, response.headers["retry-after"]) == (429, "5")
                assert json.loads(response.body)["code"] == "overloaded"
                assert await second.at_end()
            assert (endpoint.statistics().rejected_by_address, endpoint.statistics().rejected) == (1, 0)
        while endpoint.statistics().connections:
            await trio.lowlevel.checkpoint()
        async with connected(endpoint) as peer:
            await peer.send(HEALTH)
            assert (await peer.response()).status == 200
    assert (replica.networks, replica.refusals) == (["127.0.0.1"], [ErrorCode.OVERLOADED])


def through_proxies(head: bytes, *said: str) -> bytes:
    return head.replace(b"\r\n\r\n", f"\r\nX-Forwarded-For: {', '.join(said)}\r\n\r\n".encode())


async def test_clients_of_a_trusted_proxy_count_by_their_own_addresses() -> None:
    settings = WebSocketSettings(trusted_proxies=("127.0.0.1", "10.0.0.0/8"))
    replica = FakeReplica(Config(limits=LimitSettings(address_connections=2), websocket=settings))
    async with serving(replica) as endpoint, AsyncExitStack() as stack:

        async def upgrade(*said: str) -> int:
            peer = await stack.enter_async_context(connected(endpoint))
            await peer.send(through_proxies(raw_peer.UPGRADE, *said))
            return (await peer.response(head=True)).status

        assert await upgrade("203.0.113.1", "198.51.100.7") == 101
        assert await upgrade("198.51.100.7", "10.1.1.1") == 101
        assert await upgrade("203.0.113.2", "198.51.100.7") == 429
        assert await upgrade("203.0.113.1") == 101
        proxy = await stack.enter_async_context(connected(endpoint))
        # A proxy sends the requests of many clients over one connection.
        for address, status in (("198.51.100.7", 429), ("203.0.113.2", 200), ("198.51.100.7", 429)):
            await proxy.send(through_proxies(HEALTH, address))
            response = await proxy.response()
            assert response.status == status
            assert ("retry-after" in response.headers) == (status == 429)
        for _ in range(5):
            await proxy.send(HEALTH)
            assert (await proxy.response()).status == 200
        assert endpoint.statistics().rejected_by_address == 3
        replica.sessions[0].end()
        while replica.addresses.count("198.51.100.7") > 1:
            await trio.lowlevel.checkpoint()
        assert await upgrade("198.51.100.7") == 101
    assert replica.networks == ["198.51.100.7", "198.51.100.7", "203.0.113.1", "198.51.100.7"]
    assert not replica.addresses._connections


async def test_clients_of_a_trusted_proxy_have_cpu_shares_by_their_own_addresses() -> None:
    replica = FakeReplica(Config(websocket=WebSocketSettings(trusted_proxies=("127.0.0.1",))))
    async with serving(replica) as endpoint, connected(endpoint) as proxy:
        for address in "198.51.100.7", "203.0.113.2":
            head = b"POST /publish HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer good\r\nContent-Length: 2\r\n\r\n"
            await proxy.send(through_proxies(head, address) + b"[]")
            assert (await proxy.response()).status == 200
            assert replica.networks_of_tokens[-1] == address
            assert set(replica.cpu_scheduler._shares) == {("network", address)}


async def test_unauthenticated_connections_are_evicted_for_others() -> None:
    async with serving(FakeReplica(Config(limits=LimitSettings(connections=3)))) as endpoint, AsyncExitStack() as stack:
        client = await stack.enter_async_context(connected(endpoint))
        silent = await stack.enter_async_context(connected(endpoint))
        await show_token(client)
        idle = await stack.enter_async_context(connected(endpoint))
        await idle.send(HEALTH)
        assert (await idle.response()).status == 200
        for left in (silent, idle):
            async with connected(endpoint) as newcomer:
                await newcomer.send(HEALTH)
                assert (await newcomer.response()).status == 200
                assert await left.at_end()
            while endpoint.statistics().connections == 3:
                await trio.lowlevel.checkpoint()
            await show_token(await stack.enter_async_context(connected(endpoint)))
        assert (endpoint.statistics().evicted, endpoint.statistics().rejected) == (2, 0)
        await client.send(masked(raw_peer.TEXT, b"still here"))
        assert (await client.frame()).payload == b"still here\n"


async def test_failed_connection_affects_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*args: object) -> None:
        async with trio.open_nursery():
            raise RuntimeError("a bug")

    async with serving(FakeReplica()) as endpoint, connected(endpoint) as healthy:
        await healthy.send(HEALTH)
        assert (await healthy.response()).status == 200
        with monkeypatch.context() as patched:
            patched.setattr(http_endpoint, "serve_http_connection", fail)
            async with connected(endpoint) as peer:
                assert await peer.at_end()
        await healthy.send(HEALTH)
        assert (await healthy.response()).status == 200
        assert endpoint.statistics().internal_errors == 1


async def test_peers_that_disconnected_before_accept_affect_no_other() -> None:
    async with serving(FakeReplica()) as endpoint:
        port = int(endpoint.addresses[0].rpartition(":")[2])
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as peer:
                # This close resets the connection.
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        async with connected(endpoint) as peer:
            await peer.send(HEALTH)
            assert (await peer.response()).status == 200
        assert endpoint.statistics().internal_errors == 0


async def test_connections_are_limited_by_the_open_files_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (RESERVED_FILES + 1, 1000))
    async with serving(FakeReplica()) as endpoint, connected(endpoint) as first:
        await show_token(first)
        async with connected(endpoint) as second:
            await second.send(HEALTH)
            assert (await second.response()).status == 503
