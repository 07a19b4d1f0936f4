"""The WebTransport port over real UDP on loopback."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import random
import socket
import time
from ipaddress import IPv4Address

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from catbus.auth.grants import Grants, Identity, client_of
from catbus.auth.tokens import sign
from catbus.broker import OWNER
from catbus.close_codes import CloseCode
from catbus.config import LimitSettings as BrokerLimits
from catbus.endpoints.webtransport import packet_router
from catbus.endpoints.webtransport.connection_timers import ConnectionTimers
from catbus.endpoints.webtransport.datagram_scheduler import TURN_TIME
from catbus.endpoints.webtransport.quic_peer import QuicPeer
from catbus.endpoints.webtransport.retry_and_reset_tokens import RETRY_TOKEN_LIFETIME, StatelessTokens
from catbus.endpoints.webtransport.udp_socket import UdpSocket
from catbus.protocol.wire_messages import Publish
from catbus.webtransport import ConnectionLimits, SessionClosed, SessionOpened, WebTransportConnection
from catbus.webtransport.connection_ids import ConnectionIdShare
from catbus.webtransport.connectionless_packets import ID_LENGTH, VERSIONS
from tests.brokers import CONFIG, SECRET, TOKEN
from tests.endpoints.quic_server import Client, Lost, Server, serving
from tests.hostile.packets import one_rtt
from tests.webtransport.simulated_link import client_config


def text(**message: object) -> bytes:
    return json.dumps(message).encode()


async def ask(address: str, *datagrams: bytes) -> bytes | None:
    """Send datagrams from a new socket. Returns the first reply, or None if there is none for a while."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if "[" in host else socket.AF_INET
    with trio.socket.socket(family, type=socket.SOCK_DGRAM) as sock:
        await sock.connect((host.strip("[]"), int(port)))
        for data in datagrams:
            await sock.send(data)
        with trio.move_on_after(0.2):
            return bytes(await sock.recv(4096))
    return None


def first_flight(address: str) -> list[bytes]:
    """Return the first datagrams of a client that never completes its handshake."""
    host, _, port = address.rpartition(":")
    connection = WebTransportConnection.client(client_config(), (host, int(port)), 0.0, authority="localhost")
    return [data for data, _ in connection.datagrams_to_send(0.0)]


async def test_message_goes_from_one_client_to_another() -> None:
    async with serving() as server:
        subscriber = await server.log_in("a.*")
        publisher = await server.log_in()
        publisher.say(type="publish", channel="a.b", payload={"n": 1}, id=1)
        published = await publisher.heard("published")
        message = await subscriber.heard("message")
        assert (message["channel"], message["payload"], message["pattern"]) == ("a.b", {"n": 1}, "a.*")
        assert message["seq"] == published["seq"]
        assert {client.transport for client in server.replica.sessions} == {"webtransport"}
        assert server.endpoint.statistics().connections == 2
        assert server.endpoint.statistics().half_open == 0


async def test_endpoint_serves_ipv6() -> None:
    async with serving(bind="[::1]:0") as server:
        client = await server.log_in()
        client.say(type="ping", seq=4)
        assert (await client.heard("pong"))["seq"] == 4


async def test_first_version_client_gets_a_line_for_each_message() -> None:
    async with serving() as server:
        client = await server.log_in("a.*", protocol=None)
        publisher = await server.log_in()
        publisher.write(b"".join(text(type="publish", channel="a.b", payload=n, id=n + 1) for n in range(3)))
        for n in range(3):
            assert await client.line() == {"type": "message", "channel": "a.b", "payload": n}


async def test_objects_need_no_newline_and_may_be_split() -> None:
    async with serving() as server:
        client = server.connect()
        await client.open()
        auth, subscribe, ping = (
            text(type="auth", token=TOKEN, protocol=1),
            text(type="subscribe", pattern="a"),
            text(type="ping", seq=1),
        )
        client.write(auth + subscribe + ping)
        assert [(await client.line())["type"] for _ in range(3)] == ["auth_ok", "subscribed", "pong"]
        for byte in text(type="publish", channel="a", payload="in many pieces", id=1):
            client.write(bytes([byte]))
            await trio.lowlevel.checkpoint()
        assert (await client.heard("message"))["payload"] == "in many pieces"


async def test_server_closes_with_code_and_reason_after_the_reply() -> None:
    async with serving() as server:
        client = server.connect()
        await client.open()
        client.say(type="auth", token="no token")
        assert (await client.line())["type"] == "auth_error"
        code, _ = await client.lost()
        assert code == CloseCode.UNAUTHENTICATED
        await server.empty()


async def test_closed_client_leaves_nothing_behind() -> None:
    async with serving() as server:
        watcher = await server.log_in("a")
        client = await server.log_in("a")
        client.say(type="publish", channel="a", payload=1, id=1)
        client.connection.close_session(4321, "enough", trio.current_time())
        client.transmit()
        await client.lost()
        # Requests that were sent before the close are still processed.
        assert (await watcher.heard("message"))["payload"] == 1
        watcher.connection.close("away")
        watcher.transmit()
        await server.empty()


@pytest.mark.parametrize("end", ["end", "reset", "stop"])
async def test_client_that_ends_its_stream_has_left(end: str) -> None:
    async with serving() as server:
        client = await server.log_in()
        assert client.stream is not None
        if end == "end":
            client.connection.send(client.stream, b"", True)
        elif end == "reset":
            client.connection.reset(client.stream, 7)
        else:
            client.connection.stop_sending(client.stream, 7)
        client.transmit()
        await client.lost()
        assert client.saw(SessionClosed) == [SessionClosed(0, "")]
        await server.empty()


async def test_further_streams_are_rejected() -> None:
    async with serving() as server:
        client = await server.log_in()
        for bidirectional in (True, False):
            stream = client.connection.open_stream(bidirectional=bidirectional)
            assert stream is not None
            client.connection.send(stream, b"hello")
            client.transmit()
            while stream not in client.stopped_streams():
                await trio.sleep(0.01)
        client.say(type="ping", seq=1)
        assert (await client.heard("pong"))["seq"] == 1


async def test_pages_of_other_origins_are_rejected() -> None:
    websocket = msgspec.structs.replace(CONFIG.websocket, allowed_origins=("https://good.example",))
    async with serving(msgspec.structs.replace(CONFIG, websocket=websocket)) as server:
        for origin in ("https://good.example", None):
            await server.connect(origin=origin).open()
        with pytest.raises(Lost):
            await server.connect(origin="https://bad.example").open()


async def test_garbage_affects_no_client() -> None:
    chance = random.Random(1)
    async with serving() as server:
        client = await server.log_in()
        known = next(iter(client.connection.connection_ids))
        host, _, port = server.address.rpartition(":")
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.connect((host, int(port)))
            for n in range(600):
                data = bytearray(chance.randbytes(chance.choice((1, 9, 60, 1200, 1300, 4000))))
                if n % 3 == 0:
                    data[0] |= 0x40 if n % 2 else 0xC0
                    data[1:5] = VERSIONS[0].to_bytes(4, "big")
                if n % 7 == 0:
                    data[1 : 1 + ID_LENGTH] = known
                sock.send(data)
                if n % 50 == 0:
                    client.say(type="ping", seq=n)
                    assert (await client.heard("pong"))["seq"] == n
        statistics = server.endpoint.statistics()
        assert statistics.dropped
        assert statistics.connections == 1


async def flood(server: Server, count: int, size: int = 30_000) -> None:
    """Publish in this process."""
    for _ in range(count):
        await server.replica.publish(OWNER, [Publish("a", msgspec.Raw(b'"' + b"x" * size + b'"'))])


async def test_peer_that_never_reads_is_bounded_and_delays_no_other() -> None:
    async with serving() as server:
        stuck = await server.log_in("a")
        stuck.reads = False
        other = await server.log_in("a")
        for _ in range(75):
            await flood(server, 1)
            await other.heard("message")
        [box] = [client.send_queue for client in server.replica.sessions if client.send_queue.size]
        assert box.rejected
        assert box.size <= box.limit
        held = [peer.connection.unacknowledged() for peer in router_of(server).peers]
        assert max(held) <= ConnectionLimits().stream_unacknowledged + box.limit
        # It gets the rest when it reads again.
        received = 0

        def take() -> bool:
            nonlocal received
            received += stuck.unread
            assert stuck.stream is not None
            stuck.connection.consumed(stuck.stream, stuck.unread)
            stuck.unread = 0
            return received > 75 * 30_000

        stuck.transmit()
        while not take():
            stuck.transmit()
            await trio.sleep(0.001)


def router_of(server: Server) -> packet_router.PacketRouter:
    return server.endpoint._router


async def test_stuck_connection_delays_no_handshake() -> None:
    async with serving() as server:
        stuck = await server.log_in("a")
        stuck.deaf = True
        await flood(server, 40)
        began = time.perf_counter()
        await server.log_in()
        assert time.perf_counter() - began < 1


async def test_many_half_open_connections_require_address_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as server:
        assert not (await server.log_in()).retried
        monkeypatch.setattr(packet_router, "RETRY_THRESHOLD", 0)
        client = await server.log_in()
        assert client.retried
        client.say(type="ping", seq=1)
        assert (await client.heard("pong"))["seq"] == 1


async def test_many_new_connections_require_address_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packet_router, "UNVALIDATED_PER_SECOND", 1e-9)
    async with serving() as server:
        client = await server.log_in()
        assert client.retried


async def half_open(address: str) -> None:
    """Connect, follow a Retry, and send nothing more after a reply."""
    host, _, port = address.rpartition(":")
    broker = host, int(port)
    connection = WebTransportConnection.client(client_config(), broker, 0.0, authority="localhost")
    with trio.socket.socket(type=socket.SOCK_DGRAM) as sock:
        await sock.connect(broker)
        answer = b"\xf0"
        while answer[0] & 0xF0 == 0xF0:
            for data, _ in connection.datagrams_to_send(0.0):
                await sock.send(data)
            answer = await sock.recv(4096)
            connection.receive_datagram(answer, broker, 0.0)


async def test_oldest_half_open_connection_of_the_largest_network_is_evicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packet_router, "MAX_HALF_OPEN", 3)
    monkeypatch.setattr(packet_router, "RETRY_THRESHOLD", 0)
    async with serving() as server:
        for network in ("alone", "crowd", "crowd"):
            monkeypatch.setattr(packet_router, "network_of", lambda host, network=network: network)
            await half_open(server.address)
        oldest = list(server.router.peers)
        client = await server.log_in()
        assert server.router.evicted == 1
        assert server.router._half_open.networks() == {"alone": 1, "crowd": 1}
        assert len(server.router.peers) == len(oldest)
        client.say(type="ping", seq=1)
        assert (await client.heard("pong"))["seq"] == 1
        await server.log_in()
        assert server.router.evicted == 1


async def test_address_is_limited_and_validated_for_the_second_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(IPv4Address, "is_loopback", False)  # as if this machine were another one
    async with serving(msgspec.structs.replace(CONFIG, limits=BrokerLimits(address_connections=2))) as server:
        addresses = server.replica.addresses
        first, second = await server.log_in(), await server.log_in()
        assert (first.retried, second.retried) == (False, True)
        assert await ask(server.address, *first_flight(server.address)) is None
        assert server.endpoint.statistics().rejected_by_address > 0
        assert (addresses.count("127.0.0.1"), server.router.half_open) == (2, 0)
        second.connection.close()
        second.transmit()
        while addresses.count("127.0.0.1") > 1:
            await trio.sleep(0.01)
        await server.log_in()
        assert addresses.count("127.0.0.1") == 2


async def test_forged_addresses_do_not_count_for_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        for _ in range(2):
            await half_open(server.address)
        monkeypatch.setattr(packet_router, "RETRY_THRESHOLD", 0)
        await half_open(server.address)
        assert server.router._half_open.networks() == {"": 2, "127.0.0.1": 1}


async def test_authenticated_peers_are_queued_by_client_and_others_by_network(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        router, scheduler = server.router, server.router._scheduler

        known: set[QuicPeer] = set()

        def place_of_last() -> tuple[object, object]:
            [peer] = router.peers - known
            known.add(peer)
            return router._queue_of(peer)

        await half_open(server.address)
        assert place_of_last() == (scheduler.unvalidated, "127.0.0.1")
        monkeypatch.setattr(packet_router, "RETRY_THRESHOLD", 0)
        await half_open(server.address)
        assert place_of_last() == (scheduler.unauthenticated, "127.0.0.1")
        mute = server.connect()
        await mute.open()
        assert place_of_last() == (scheduler.unauthenticated, "127.0.0.1")
        for _ in range(2):
            await server.log_in()
            assert place_of_last() == (scheduler.authenticated, "alice")
        token = sign(SECRET, client_id=None, grants=Grants.ALL)
        nameless = server.connect()
        await nameless.open()
        nameless.say(type="auth", token=token, protocol=1)
        await nameless.heard("auth_ok")
        assert place_of_last() == (
            scheduler.authenticated,
            client_of(Identity(None, Grants.ALL, None), token, "127.0.0.1"),
        )


async def test_work_for_unauthenticated_peers_is_charged_to_their_common_share() -> None:
    async with serving() as server:
        tokenless = server.router._scheduler.unauthenticated_usage
        client = await server.log_in()
        before = tokenless.until
        client.say(type="ping", seq=1)
        await client.heard("pong")
        assert tokenless.until == before
        mute = server.connect()
        await mute.open()
        before = tokenless.until
        [peer] = [peer for peer in server.router.peers if not peer.authenticated]
        server.router.process(peer)
        settled = tokenless.until
        assert settled > before
        server.router._on_timer(peer, trio.current_time())
        assert tokenless.until > settled


async def test_handshakes_succeed_beside_peers_that_used_the_common_share() -> None:
    async with serving() as server:
        client = await server.log_in()
        server.router._scheduler.unauthenticated_usage.charge(1000.0, trio.current_time())
        client.say(type="ping", seq=1)
        assert (await client.heard("pong"))["seq"] == 1
        await server.log_in()


async def test_datagrams_without_room_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        monkeypatch.setattr(server.router._scheduler.unvalidated, "_max_items", 2)
        hello = first_flight(server.address)
        await ask(server.address, *hello * 30)
        assert server.endpoint.statistics().dropped_over_share > 0
        await server.log_in()


async def test_vanished_unauthenticated_peer_is_forgotten_within_seconds(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.log_in()
        for session in (True, False):
            newcomer = server.connect()
            if session:
                await newcomer.open()
            else:
                newcomer.connection._demultiplexer._session_request = None
                while len(server.router.peers) < 2:
                    await trio.sleep(0.001)
            newcomer.deaf = True
            began = trio.current_time()
            while len(server.router.peers) > 1:
                await trio.sleep(0.1)
            assert trio.current_time() - began < ConnectionLimits().silence_timeout + 1
        await trio.sleep(40)
        client.say(type="ping", seq=1)
        assert (await client.heard("pong"))["seq"] == 1


async def test_nothing_is_kept_of_a_closed_unauthenticated_peer() -> None:
    async with serving() as server:
        newcomer = server.connect()
        await newcomer.open()
        [peer] = server.router.peers
        newcomer.connection.close("away")
        newcomer.transmit()
        while not peer.lost:
            await trio.lowlevel.checkpoint()
        assert not server.router.peers
        assert not server.router._routes
        assert len(server.router._timers) == 0


async def test_protocol_violations_are_counted_and_logged_at_a_limited_rate(caplog: pytest.LogCaptureFixture) -> None:
    count = 2 * packet_router.PEER_EVENT_LOG_BURST
    with caplog.at_level(logging.INFO):
        async with serving() as server:
            for _ in range(count):
                client = server.connect()
                await client.open()
                data = one_rtt(client.connection._quic, b"\x3f")  # There is no such frame.
                await client.socket.sendto(data, client.address)
                await client.lost()
            assert server.endpoint.statistics().violations == count
            assert not server.router.peers
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == packet_router.PEER_EVENT_LOG_BURST
    assert set(lines) == {"a peer violated QUIC or HTTP/3"}


async def test_failed_connections_are_counted_and_logged_at_a_limited_rate(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as server:
        client = await server.log_in()

        def fail(*_: object) -> None:
            raise KeyError("ours")

        for number in range(3):
            victim = server.connect()
            await victim.open()
            for peer in server.router.peers:
                handlers = peer.connection._quic._QuicConnection__frame_handlers  # type: ignore[attr-defined]
                handlers[1] = (fail, handlers[1][1])
            await victim.socket.sendto(one_rtt(victim.connection._quic, b"\x01"), victim.address)
            await victim.lost()
            assert server.endpoint.statistics().internal_errors == number + 1
        client.say(type="ping", seq=1)
        assert (await client.heard("pong"))["seq"] == 1
        [record] = [each for each in caplog.records if each.levelno >= logging.ERROR]
        assert record.getMessage() == "a WebTransport connection failed"
        assert record.exc_info is not None
        server.router.internal_errors = 0


async def test_connections_are_limited() -> None:
    limits = msgspec.structs.replace(CONFIG.limits, connections=2)
    async with serving(msgspec.structs.replace(CONFIG, limits=limits)) as server:
        await server.log_in()
        await server.log_in()
        late = server.connect()
        with trio.move_on_after(0.2):
            await late.open()
        assert not late.saw(SessionOpened)
        assert server.endpoint.statistics().connections == 2


async def test_packet_of_no_connection_gets_a_reset_at_a_limited_rate() -> None:
    async with serving() as server:
        unknown = os.urandom(ID_LENGTH)
        answer = await ask(server.address, b"\x40" + unknown + bytes(50))
        assert answer is not None
        assert answer[-16:] == StatelessTokens(SECRET).reset_token(unknown)
        assert len(answer) < 1 + ID_LENGTH + 50
        assert await ask(server.address, b"\x40" + unknown) is None
        before = server.endpoint.statistics().datagrams_out
        await ask(server.address, *[b"\x40" + unknown + bytes(50)] * 250)
        assert server.endpoint.statistics().datagrams_out - before < 160


async def test_packet_for_another_worker_is_counted_and_gets_no_reset() -> None:
    """A reset would end a connection that lives there."""
    share = ConnectionIdShare(1, 3)
    async with serving(share=share) as server:
        for first in range(6):
            connection_id = bytes([first]) + os.urandom(ID_LENGTH - 1)
            reply = await ask(server.address, b"\x40" + connection_id + bytes(40))
            assert (reply is not None) == (first % 3 == 1)
        assert server.endpoint.statistics().dropped_misrouted == 4


@pytest.mark.parametrize("retried", [False, True])
async def test_all_connection_ids_name_the_worker(monkeypatch: pytest.MonkeyPatch, retried: bool) -> None:
    if retried:
        monkeypatch.setattr(packet_router, "RETRY_THRESHOLD", 0)
    share, clients = ConnectionIdShare(1, 3), 0
    async with serving(share=share) as server:
        while clients < 3:
            client = server.connect()
            if client.connection._quic._peer_cid.cid not in share:
                # The kernel would have sent its first packet to another worker.
                continue
            clients += 1
            await client.log_in()
            assert client.retried == retried
        routes = server.router._routes
        assert len(routes) > clients
        assert all(connection_id in share for connection_id in routes)


async def test_client_detects_that_its_server_has_forgotten_it() -> None:
    async with serving() as server:
        client = await server.log_in()
        router = router_of(server)
        [peer] = router.peers
        router._forget(peer)
        client.say(type="ping", seq=1)
        _, reason = await client.lost()
        assert "no longer knows" in reason


async def test_unsupported_versions_are_answered_and_small_first_packets_are_not() -> None:
    async with serving() as server:
        head = b"\xc0\x1a\x2a\x3a\x4a\x08" + bytes(8) + b"\x08" + bytes(8)
        answer = await ask(server.address, head.ljust(1200, b"\0"))
        assert answer is not None
        assert answer[1:5] == bytes(4)
        assert await ask(server.address, head.ljust(1199, b"\0")) is None
        # A Version Negotiation packet is never answered.
        assert await ask(server.address, (b"\xc0" + bytes(4) + head[5:]).ljust(1200, b"\0")) is None
        first = b"\xc0" + VERSIONS[0].to_bytes(4, "big") + head[5:] + b"\0\x44\x96"
        assert await ask(server.address, first.ljust(1000, b"\1"), first.ljust(1200, b"\1")) is None
        assert server.endpoint.statistics().connections == 0


async def test_silent_client_is_removed_after_the_idle_timeout(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.log_in()
        other = await server.log_in()
        began = trio.current_time()
        client.deaf = True
        while len(server.replica.sessions) == 2:
            await trio.sleep(0.5)
        assert 55 < trio.current_time() - began < 65
        # The other one has sent nothing either, but it has answered the pings.
        await trio.sleep(200)
        other.say(type="ping", seq=1)
        assert (await other.heard("pong"))["seq"] == 1
        assert server.endpoint.statistics().connections == 1


async def test_client_that_does_not_authenticate_is_closed(autojump_clock: MockClock) -> None:
    async with serving() as server:
        mute = server.connect()
        await mute.open()
        began = trio.current_time()
        assert (await mute.lost())[0] == CloseCode.AUTH_TIMEOUT
        assert 9 < trio.current_time() - began < 11
        await server.empty()


async def test_client_that_reads_nothing_is_closed(autojump_clock: MockClock) -> None:
    async with serving() as server:
        stuck = await server.log_in("a")
        stuck.reads = False
        await flood(server, 40)
        began = trio.current_time()
        assert await stuck.lost() == (CloseCode.UNRESPONSIVE, "the client read nothing for a minute")
        assert 55 < trio.current_time() - began < 90


async def test_vanished_client_with_unsent_data_is_removed_after_the_idle_timeout(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.log_in("a")
        client.deaf = True
        await flood(server, 40)
        [left] = server.replica.sessions
        assert left.send_queue.size
        await server.empty()
        assert not left.send_queue.size


async def test_cancelled_endpoint_closes_its_sessions() -> None:
    async with serving() as server:
        clients = [await server.log_in() for _ in range(3)]
        clients[2].deaf = True
        server.scope.cancel()
        for client in clients[:2]:
            assert (await client.lost())[0] == CloseCode.SHUTTING_DOWN
        await server.ended.wait()
        assert server.endpoint.statistics().connections <= 3


async def test_closed_endpoint_accepts_nothing_and_returns_after_the_last_connection() -> None:
    async with serving() as server:
        client = await server.log_in()
        server.endpoint.close()
        late = server.connect()
        with trio.move_on_after(0.1):
            await late.open()
        assert not late.saw(SessionOpened)
        server.replica.finish()
        assert (await client.lost())[0] == CloseCode.SHUTTING_DOWN
        await server.ended.wait()


async def test_internal_error_ends_one_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        client, other = await server.log_in(), await server.log_in()
        victim = min(server.replica.sessions, key=lambda one: id(one))

        async def fail(data: bytes) -> None:
            raise ValueError("ours")

        monkeypatch.setattr(victim, "receive", fail)
        for one in (client, other):
            one.say(type="ping", seq=1)
        codes = set()
        async with trio.open_nursery() as nursery:

            async def watch(one: Client) -> None:
                try:
                    await one.heard("pong")
                except Lost:
                    codes.add((await one.lost())[0])

            for one in (client, other):
                nursery.start_soon(watch, one)
        assert codes == {CloseCode.INTERNAL}
        assert server.endpoint.statistics().internal_errors == 1
        router_of(server).internal_errors = 0


async def test_endpoint_works_without_segmentation_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        subscriber = await server.log_in("a")
        [port] = router_of(server).sockets
        port._socket = Refusing(port._socket)  # type: ignore[assignment]
        await flood(server, 3)
        for _ in range(3):
            await subscriber.heard("message")
        assert not port._segmenting


class Refusing:
    """A socket without segmentation offload."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)

    def fileno(self) -> int:
        return self._sock.fileno()

    def sendmsg(self, *arguments: object) -> int:
        raise OSError(5, "Input/output error")


def test_retry_and_reset_tokens_are_bound_to_their_clients() -> None:
    ours, replica, stranger = StatelessTokens(SECRET), StatelessTokens(SECRET), StatelessTokens(None)
    address = "192.0.2.1", 1234
    token = ours.retry_token(address, b"original", b"again", 1000.0)
    assert replica.read_retry_token(token, address, b"again", 1000.0 + RETRY_TOKEN_LIFETIME) == b"original"
    assert replica.read_retry_token(token, address, b"again", 1000.5 + RETRY_TOKEN_LIFETIME) is None
    assert replica.read_retry_token(token, ("192.0.2.1", 1235), b"again", 1000.0) is None
    assert replica.read_retry_token(token, address, b"other", 1000.0) is None
    assert stranger.read_retry_token(token, address, b"again", 1000.0) is None
    for place in range(len(token)):
        bent = token[:place] + bytes([token[place] ^ 1]) + token[place + 1 :]
        assert ours.read_retry_token(bent, address, b"again", 1000.0) is None
    assert ours.read_retry_token(token[:10], address, b"again", 1000.0) is None
    assert ours.read_retry_token(b"", address, b"again", 1000.0) is None
    assert ours.reset_token(b"id") == replica.reset_token(b"id") != stranger.reset_token(b"id")


async def test_timers_fire_in_order_and_hold_each_member_once(autojump_clock: MockClock) -> None:
    fired: list[tuple[str, float]] = []
    start = trio.current_time()
    again: dict[str, float] = {}

    def fire(name: str, now: float) -> None:
        fired.append((name, round(now - start, 2)))
        if name in again:
            timers.set(name, again.pop(name))

    timers: ConnectionTimers[str] = ConnectionTimers(fire)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        await trio.testing.wait_all_tasks_blocked()
        timers.set("late", start + 3)
        timers.set("soon", start + 1)
        timers.set("never", start + 2)
        timers.set("never", None)
        timers.set("moved", start + 60)
        for n in range(1000):
            timers.set("moved", start + 0.5 - n / 10_000)
        timers.set("moved", start + 60)
        again["soon"] = start  # A time in the past does not keep the task from waiting.
        assert len(timers) == 3
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert [name for name, _ in fired] == ["moved", "soon", "soon", "late"]
    assert [at for _, at in fired] == [0.4, 1.0, 1.0, 3.0]


async def test_simultaneous_timers_let_other_tasks_run() -> None:
    members, passes = 10, 0
    fired: list[int] = []

    def fire(name: int, now: float) -> None:
        fired.append(passes)
        until = time.perf_counter() + 2 * TURN_TIME
        while time.perf_counter() < until:
            pass

    timers: ConnectionTimers[int] = ConnectionTimers(fire)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        at = trio.current_time() + 0.01
        for member in range(members):
            timers.set(member, at)
        while len(fired) < members:
            passes += 1
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert len(set(fired)) >= members // 2


@pytest.mark.parametrize(("bind", "host"), [("0.0.0.0", "127.0.0.2"), ("[::]", "[::1]")])
async def test_reply_comes_from_the_address_that_was_used(bind: str, host: str) -> None:
    # A connected socket receives nothing from other addresses.
    async with serving(bind=f"{bind}:0") as server:
        port = int(server.address.rpartition(":")[2])
        strange = (b"\xc0\x1a\x2a\x3a\x4a\x08" + bytes(8) + b"\x08" + bytes(8)).ljust(1200, b"\0")
        assert await ask(f"{host}:{port}", strange) is not None
        client = Client(f"{host}:{port}")
        server.nursery.start_soon(client.run)
        await client.log_in("a")
        await flood(server, 3)
        for _ in range(3):
            await client.heard("message")
        [peer] = router_of(server).peers
        assert peer.connection.peer_address is not None
        [(_, _, control)] = peer.connection.peer_address.source
        assert ipaddress.ip_address(host.strip("[]")).packed in control


def test_endpoint_reports_its_addresses() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        assert UdpSocket(sock).address == f"127.0.0.1:{sock.getsockname()[1]}"
