"""The WebTransport transport of the client, with a scripted server that may send anything."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from catbus.client import Bus, Disconnected, Refused, connect, happy_eyeballs, webtransport_transport
from catbus.client.broker_address import parse_address
from catbus.client.signals import Signal
from catbus.client.transport_interface import DATAGRAM, MAIN_STREAM, Chunk, DrivenTransport
from catbus.client.webtransport_transport import (
    MAX_QUEUED_DATAGRAMS,
    WebTransportTransport,
    make_configuration,
    open_webtransport,
)
from catbus.errors import ConfigError
from catbus.webtransport import (
    ConnectionLost,
    Datagram,
    SessionClosed,
    SessionRequested,
    StreamData,
    Terminated,
    WebTransportConnection,
    server_configuration,
)
from catbus.webtransport.connectionless_packets import read_header
from tests.client.scripted_broker import Gone, Honest, Peer, message

pytestmark = pytest.mark.anyio

LIMIT = 10.0
"""Seconds after which a test that waits has failed; handshakes cost processor time."""


class Certificate:
    """A certificate that is its own authority."""

    def __init__(self, *names: str, days: int = 1) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "catbus test")])
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).add_extension(
            x509.SubjectAlternativeName([self._name(one) for one in names]), critical=False
        )
        builder = builder.not_valid_before(now - datetime.timedelta(days=9))
        made = builder.not_valid_after(now + datetime.timedelta(days=days)).sign(key, hashes.SHA256())
        self.pem = made.public_bytes(serialization.Encoding.PEM).decode()
        self.hash = hashlib.sha256(made.public_bytes(serialization.Encoding.DER)).digest()
        self.key = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    @staticmethod
    def _name(name: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            return x509.DNSName(name)


@cache
def certificate() -> Certificate:
    return Certificate("localhost", "127.0.0.1", "::1")


class StreamPeer(Peer):
    """The server's end of one connection and its stream."""

    def __init__(self, connection: WebTransportConnection, flush: Callable[[], None]) -> None:
        super().__init__()
        self.connection = connection
        self.flush = flush
        self.signal = Signal()
        self.stream = -1
        self.path = ""
        self.data = bytearray()
        self.received_seq = 0
        self.gone = False

    async def read(self) -> bytes:
        while not self.data:
            if self.gone:
                raise Gone
            await self.signal.wait()
        data = bytes(self.data)
        self.data.clear()
        self.connection.consumed(self.stream, len(data))
        self.flush()
        return data

    async def write(self, data: bytes) -> None:
        while not self.connection.send(self.stream, data):
            if self.gone:
                raise Gone
            await self.signal.wait()
        self.flush()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        assert self.connection.close_session(code, reason, anyio.current_time())
        self.flush()


Script = Callable[[StreamPeer], Awaitable[None]]


class Server:
    """A UDP socket of which every address that sends something has a connection."""

    def __init__(self, script: Script, udp: socket.socket, *, refuse: int | None = None, idle: float = 60.0) -> None:
        self.script = script
        self.refuse = refuse
        self.silent = False
        self.lossy = False
        self.count = 0
        self.udp = udp
        self.url = f"https://127.0.0.1:{udp.getsockname()[1]}"
        self.peers: dict[Any, StreamPeer] = {}
        self.configuration = server_configuration(certificate().pem, certificate().key)
        self.configuration.quic.idle_timeout = idle
        self.nap: anyio.CancelScope | None = None

    async def run(self, tasks: anyio.abc.TaskGroup) -> None:
        while True:
            self.flush()
            with anyio.CancelScope(deadline=self.next()) as self.nap:
                await anyio.wait_readable(self.udp)
            self.nap = None
            for _ in range(64):
                try:
                    data, address = self.udp.recvfrom(65536)
                except BlockingIOError:
                    break
                except ConnectionError:
                    continue
                if not self.silent and not self.unlucky():
                    self.receive(data, address, tasks)
            for peer in list(self.peers.values()):
                peer.connection.handle_timer(anyio.current_time())
                self.take(peer, tasks)

    def unlucky(self) -> bool:
        self.count += 1
        return self.lossy and self.count % 9 == 0

    async def play(self, peer: StreamPeer) -> None:
        try:
            await self.script(peer)
            await peer.linger()
        except Gone:
            pass

    def next(self) -> float:
        timers = [peer.connection.timer for peer in self.peers.values()]
        return min((timer for timer in timers if timer is not None and not self.silent), default=float("inf"))

    def receive(self, data: bytes, address: Any, tasks: anyio.abc.TaskGroup) -> None:
        peer = self.peers.get(address)
        if peer is None:
            header = read_header(data)
            if header is None or len(data) < 1200:
                return
            peer = StreamPeer(WebTransportConnection.server(self.configuration, header.destination), self.flush)
            self.peers[address] = peer
        peer.connection.receive_datagram(data, address, anyio.current_time())
        self.take(peer, tasks)

    def take(self, peer: StreamPeer, tasks: anyio.abc.TaskGroup) -> None:
        for event in peer.connection.events():
            match event:
                case SessionRequested():
                    peer.path = event.path
                    if self.refuse is None:
                        peer.connection.accept()
                    else:
                        peer.connection.refuse(self.refuse, anyio.current_time())
                case StreamData():
                    if peer.stream < 0:
                        peer.stream = event.stream
                        tasks.start_soon(self.play, peer)
                    peer.data += event.data
                    peer.received_seq += len(event.data)
                case SessionClosed():
                    peer.closed = (event.code or 0, event.reason)
                    peer.gone = True
                case ConnectionLost() | Terminated():
                    peer.gone = True
        peer.signal.notify()

    def flush(self) -> None:
        if self.silent:
            return
        for peer in list(self.peers.values()):
            for data, address in peer.connection.datagrams_to_send(anyio.current_time()):
                if self.unlucky():
                    continue
                try:
                    self.udp.sendto(data, address)
                except (BlockingIOError, ConnectionError):
                    continue
        if self.nap is not None:
            self.nap.deadline = self.next()

    def vanish(self) -> None:
        """Hear and say nothing any more."""
        self.silent = True

    async def everyone_left(self) -> None:
        while not all(peer.gone for peer in self.peers.values()):
            await anyio.sleep(0.001)


def bind(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    udp = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    udp.setblocking(False)
    udp.bind((host, port))
    return udp


@asynccontextmanager
async def serve(script: Script, *, udp: socket.socket | None = None, **options: Any) -> AsyncIterator[Server]:
    with anyio.fail_after(LIMIT), udp or bind() as bound:
        server = Server(script, bound, **options)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.run, tasks)
            yield server
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def dial(script: Script, **options: Any) -> AsyncIterator[tuple[WebTransportTransport, Server]]:
    """A transport at work, without the protocol on it."""
    async with serve(script, **options) as server:
        address = parse_address(server.url)
        transport = await open_webtransport(address, make_configuration(address, certificate().pem))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transport.run)
            try:
                # The server knows of the stream when something comes on it.
                yield transport, server
            finally:
                await transport.aclose()


@asynccontextmanager
async def talk(script: Script, *, server: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Bus]:
    async def admit_first(peer: StreamPeer) -> None:
        await peer.admit()
        await script(peer)

    async with (
        serve(admit_first, **server or {}) as running,
        connect(running.url, token="t", ca=certificate().pem, reconnect=False, **options) as bus,
    ):
        yield bus


async def echo(peer: StreamPeer) -> None:
    while True:
        await peer.write(await peer.read())


async def say_nothing(peer: StreamPeer) -> None:
    await anyio.sleep_forever()


async def refused(url: str, **options: Any) -> Disconnected:
    """What connecting comes to."""
    with pytest.raises(Disconnected) as caught:
        async with connect(url, token="t", **options):
            pytest.fail("it should not connect")
    return caught.value


# Connecting


async def test_connect_publish_subscribe() -> None:
    honest = Honest()
    async with serve(honest) as server:
        async with connect(server.url, token="secret", ca=certificate().pem) as bus:
            assert bus.client_id == "alice"
            async with bus.subscribe("a") as messages:
                assert await bus.publish("a", {"n": 1}) == 101
                assert (await anext(messages)).payload == {"n": 1}
        await server.everyone_left()
        [peer] = server.peers.values()
        assert peer.closed == (1000, "")


async def test_path_of_the_url_is_requested() -> None:
    async with serve(Honest()) as server:
        for suffix in ("", "/other?x=1"):
            async with connect(server.url + suffix, token="t", ca=certificate().pem):
                pass
        assert [peer.path for peer in server.peers.values()] == ["/", "/other?x=1"]


async def test_authority_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text(certificate().pem)
    async with serve(Honest()) as server, connect(server.url, token="t", ca=file) as bus:
        assert await bus.publish("a", 1) == 101


async def test_certificate_hash_is_sufficient() -> None:
    async with serve(Honest()) as server, connect(server.url, token="t", certificate_hash=certificate().hash) as bus:
        assert await bus.publish("a", 1) == 101


async def test_rejected_token_raises_refused() -> None:
    async def script(peer: StreamPeer) -> None:
        await peer.expect("auth")
        await peer.send({"type": "auth_error", "message": "who are you?", "code": "unauthenticated"})
        await peer.close(4001, "who are you?")

    async with serve(script) as server:
        with pytest.raises(Refused, match="who are you"):
            async with connect(server.url, token="t", ca=certificate().pem):
                pytest.fail("it should not connect")


async def test_localhost_connects_to_the_loopback_address_that_answers() -> None:
    for host in ("::1", "127.0.0.1"):
        try:
            udp = bind(host)
        except OSError:
            pytest.skip(f"this machine has no {host}")
        async with serve(Honest(), udp=udp) as server:
            url = f"https://localhost:{udp.getsockname()[1]}"
            async with connect(url, token="t", ca=certificate().pem) as bus:
                assert await bus.publish("a", 1) == 101
            assert len(server.peers) == 1


async def test_error_of_a_server_is_preferred_to_a_refused_connection() -> None:
    async with serve(echo) as server:
        assert "--ca FILE" in str(await refused(server.url.replace("127.0.0.1", "localhost")))


@pytest.mark.parametrize(
    ("url", "port", "target", "authority"),
    [
        ("https://bus.example.com", 443, "/", "bus.example.com"),
        ("https://bus.example.com:4433/a?b=c", 4433, "/a?b=c", "bus.example.com:4433"),
        ("https://[::1]:4433/", 4433, "/", "[::1]:4433"),
    ],
)
def test_url_is_parsed_into_an_address(url: str, port: int, target: str, authority: str) -> None:
    address = parse_address(url)
    assert (address.port, address.target, address.authority) == (port, target, authority)
    assert address.secure and address.quic
    assert not parse_address("wss://bus.example.com").quic


async def test_silent_address_does_not_delay_the_next_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        return [(socket.AF_INET, 0, 0, "", mute.getsockname()), (socket.AF_INET, 0, 0, "", server.udp.getsockname())]

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    with bind() as mute:
        async with serve(Honest()) as server, connect("https://127.0.0.1", token="t", ca=certificate().pem) as bus:
            assert await bus.publish("a", 1) == 101


async def test_refused_connection_is_a_disconnect() -> None:
    with bind() as udp:
        url = f"https://127.0.0.1:{udp.getsockname()[1]}"
    with anyio.fail_after(LIMIT):
        error = await refused(url, ca=certificate().pem)
    assert str(error) == f"cannot connect to {url}: Connection refused"


async def test_unknown_host_name_is_a_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    assert "cannot connect to https://nobody: Name or service not known" in str(await refused("https://nobody"))


async def test_silent_server_is_a_disconnect() -> None:
    with bind() as udp, anyio.fail_after(LIMIT):
        error = await refused(f"https://127.0.0.1:{udp.getsockname()[1]}", timeout=0.1)
    assert str(error) == "the broker did not answer within 0.1 s"


async def test_open_session_without_replies_is_a_disconnect() -> None:
    async with serve(say_nothing) as server:
        error = await refused(server.url, ca=certificate().pem, timeout=1.0)
        assert str(error) == "the broker did not answer within 1 s"
        await server.everyone_left()


async def test_rejected_session_is_a_disconnect() -> None:
    async with serve(echo, refuse=403) as server:
        error = await refused(server.url, ca=certificate().pem)
    assert str(error) == f"{server.url} rejected the session: HTTP status 403"
    assert error.code is None


async def test_cancelled_connect_leaves_no_socket() -> None:
    async with serve(say_nothing) as server:
        address = parse_address(server.url)
        configuration = make_configuration(address, certificate().pem)
        for delay in (0.0, 0.001, 0.005, 0.01, 0.02, 0.05):
            with anyio.move_on_after(delay):
                await (await open_webtransport(address, configuration)).aclose()
            # A socket left open would be a ResourceWarning.
        await server.everyone_left()


async def test_only_one_of_two_simultaneous_connections_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(happy_eyeballs, "CONNECTION_ATTEMPT_DELAY", 0.0)
    go = anyio.Event()
    abandoned: list[int] = []

    def attempt(number: int) -> Callable[[], Awaitable[int]]:
        async def run() -> int:
            if number == 2:
                go.set()
            else:
                await go.wait()
            return number

        return run

    with anyio.fail_after(LIMIT):
        winner = await happy_eyeballs.race([attempt(number) for number in range(3)], abandoned.append)
    assert winner not in abandoned

    with anyio.CancelScope() as scope:

        async def cancel() -> int:
            scope.cancel()
            return 7

        await happy_eyeballs.race([cancel, attempt(0)], abandoned.append)
        await anyio.sleep_forever()
    assert scope.cancelled_caught


# Certificates


async def test_certificate_of_another_authority_is_rejected() -> None:
    async with serve(echo) as server:
        error = await refused(server.url, ca=Certificate("127.0.0.1").pem)
    assert "is not accepted: self-signed certificate" in str(error)
    assert "--ca FILE" in str(error)


async def test_self_signed_certificate_is_rejected_without_a_ca() -> None:
    async with serve(echo) as server:
        assert "--ca FILE" in str(await refused(server.url))


async def test_certificate_for_another_name_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Certificate("elsewhere.example")
    monkeypatch.setattr(f"{__name__}.certificate", lambda: other)
    async with serve(echo) as server:
        assert "is not accepted" in str(await refused(server.url, ca=other.pem))


async def test_expired_certificate_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Certificate("127.0.0.1", days=-1)
    monkeypatch.setattr(f"{__name__}.certificate", lambda: old)
    async with serve(echo) as server:
        assert "no longer valid" in str(await refused(server.url, ca=old.pem))


async def test_certificate_with_another_hash_is_rejected() -> None:
    async with serve(echo) as server:
        assert "certificate_hash" in str(await refused(server.url, certificate_hash=bytes(32)))


async def test_invalid_options_are_rejected(tmp_path: Path) -> None:
    async def attempt(url: str, **options: Any) -> None:
        async with connect(url, token="t", **options):
            pytest.fail("it should not connect")

    with pytest.raises(FileNotFoundError):
        await attempt("https://localhost", ca=tmp_path / "none.pem")
    with pytest.raises(ConfigError):
        await attempt("https://localhost", ca="-----BEGIN nothing")
    with pytest.raises(ConfigError):
        await attempt("https://localhost", certificate_hash=b"short")
    with pytest.raises(ValueError, match="certificate_hash"):
        await attempt("wss://localhost", certificate_hash=bytes(32))


# Bytes


@pytest.mark.parametrize(("size", "lossy"), [(3_000_000, False), (300_000, True)])
async def test_large_transfers_in_both_directions_complete(size: int, lossy: bool) -> None:
    data = bytes(range(256)) * (size // 256)
    async with dial(echo) as (transport, server), anyio.create_task_group() as tasks:
        server.lossy = lossy

        async def send() -> None:
            for at in range(0, len(data), 50_000):
                await transport.send(data[at : at + 50_000])

        tasks.start_soon(send)
        received = bytearray()
        while len(received) < len(data):
            # Whatever it is cut off from, nothing is lost.
            with anyio.move_on_after(0.0005):
                received += (await transport.receive()).data
        assert received == data
        server.lossy = False


async def test_long_message_is_received() -> None:
    async with talk(Honest()) as bus, bus.subscribe("a") as messages:
        results = await bus.publish_many([("a", "x" * 60_000)] * 50)
        assert results == list(range(101, 151))
        for seq in results:
            got = await anext(messages)
            assert (got.seq, len(got.payload)) == (seq, 60_000)


async def test_send_waits_while_the_server_does_not_read() -> None:
    async with dial(say_nothing) as (transport, server):
        sent = 0
        with anyio.move_on_after(0.5) as scope:
            while True:
                await transport.send(b"x" * 10_000)
                sent += 10_000
        assert scope.cancelled_caught
        assert sent < 1_000_000
        # A send that was cancelled while it waited has sent nothing, and the next goes on from there.
        [peer] = server.peers.values()
        while peer.received_seq < sent:
            peer.connection.consumed(peer.stream, len(peer.data))
            peer.data.clear()
            peer.flush()
            await anyio.sleep(0.001)
        assert peer.received_seq == sent
        await transport.send(b"y")


async def test_server_waits_while_the_client_does_not_read() -> None:
    written = 0

    async def script(peer: StreamPeer) -> None:
        nonlocal written
        while True:
            await peer.write(b"x" * 10_000)
            written += 10_000

    async with dial(script) as (transport, _):
        await transport.send(b"go")
        before = -1
        while before < written:
            before = written
            await anyio.sleep(0.2)
        assert written < 1_000_000
        received = 0
        while received < before + 500_000:
            received += len((await transport.receive()).data)


async def test_receive_can_be_cancelled() -> None:
    async with dial(echo) as (transport, _):
        for _ in range(3):
            with anyio.move_on_after(0.01):
                await transport.receive()
        await transport.send(b"still here")
        assert (await transport.receive()).data == b"still here"


async def test_bidirectional_stream_of_the_server_is_rejected() -> None:
    async def script(peer: StreamPeer) -> None:
        stream = peer.connection.open_stream(bidirectional=True)
        assert stream is not None
        peer.connection.send(stream, b"x" * 1000)
        await echo(peer)

    async with dial(script) as (transport, _):
        await transport.send(b"hello")
        assert await transport.receive() == Chunk(b"hello")


async def test_streams_and_datagrams_of_the_server_are_distinguished() -> None:
    async def script(peer: StreamPeer) -> None:
        await peer.read()
        streams = [peer.connection.open_stream(bidirectional=False) for _ in range(2)]
        assert peer.connection.send_datagram(b"whole")
        for part in (b"one", b"two"):
            for number, stream in enumerate(streams):
                assert stream is not None
                peer.connection.send(stream, part, end=part == b"two" and number == 1)
        await peer.write(b"last")

    async with dial(script) as (transport, _):
        await transport.send(b"hello")
        found: dict[int, bytes] = {}
        ended = set()
        while found.get(MAIN_STREAM) != b"last" or len(found) < 4 or not ended or b"onetwo" not in set(found.values()):
            chunk = await transport.receive()
            found[chunk.stream] = found.get(chunk.stream, b"") + chunk.data
            ended |= {chunk.stream} if chunk.ended else set()
        assert found[DATAGRAM] == b"whole"
        first, second = sorted(number for number in found if number not in (MAIN_STREAM, DATAGRAM))
        assert (found[first], found[second]) == (b"onetwo", b"onetwo")
        assert ended == {second}


async def test_stream_reset_does_not_end_the_session() -> None:
    async def script(peer: StreamPeer) -> None:
        await peer.read()
        stream = peer.connection.open_stream(bidirectional=False)
        assert stream is not None
        peer.connection.reset(stream, 4508)
        await peer.write(b"still here")

    async with dial(script) as (transport, _):
        await transport.send(b"hello")
        chunks = [await transport.receive() for _ in range(2)]
        assert Chunk(b"still here") in chunks
        assert [(chunk.data, chunk.ended, chunk.reset) for chunk in chunks if chunk.stream != MAIN_STREAM] == [
            (b"", False, True)
        ]


async def test_datagrams_over_the_limit_are_dropped() -> None:
    async with dial(echo) as (transport, _):
        for number in range(2 * MAX_QUEUED_DATAGRAMS):
            transport._handle(Datagram(b"%d" % number))
        await transport.send(b"hello")
        chunks = [await transport.receive() for _ in range(MAX_QUEUED_DATAGRAMS + 1)]
        assert [chunk.data for chunk in chunks] == [
            *[b"%d" % number for number in range(MAX_QUEUED_DATAGRAMS)],
            b"hello",
        ]
        transport._handle(Datagram(b"there is room again"))
        assert await transport.receive() == Chunk(b"there is room again", DATAGRAM)


# Closing


@pytest.mark.parametrize("code", [1000, 4000, 4401, 4504])
async def test_close_code_and_reason_of_the_broker_are_reported(code: int) -> None:
    async def script(peer: StreamPeer) -> None:
        await peer.close(code, "for a reason")

    async with talk(script) as bus:
        with pytest.raises(Disconnected, match="the broker closed the connection: for a reason") as caught:
            await bus.publish("a", 1)
        assert caught.value.code == code


async def test_messages_before_the_close_are_received() -> None:
    async def script(peer: StreamPeer) -> None:
        await peer.subscribed()
        await peer.send(message(101))
        await peer.close(4504, "stopping")

    async with talk(script) as bus, bus.subscribe("a.*") as messages:
        assert (await anext(messages)).seq == 101
        with pytest.raises(Disconnected, match="stopping") as caught:
            await anext(messages)
        assert caught.value.code == 4504


async def test_close_code_and_reason_of_the_client_are_sent() -> None:
    async with dial(echo) as (transport, server):
        await transport.send(b"last words")
        await transport.aclose(4000, "nonsense")
        await transport.aclose()
        await server.everyone_left()
        [peer] = server.peers.values()
        assert peer.closed == (4000, "nonsense")
        assert peer.received_seq == len(b"last words")
        with pytest.raises(Disconnected, match="closed on this side"):
            await transport.send(b"x")


async def test_close_works_without_a_driver_task() -> None:
    async with serve(echo) as server:
        address = parse_address(server.url)
        transport = await open_webtransport(address, make_configuration(address, certificate().pem))
        assert isinstance(transport, DrivenTransport)
        await transport.send(b"hello")
        await transport.aclose(1000, "bye")
        await server.everyone_left()
        assert [peer.closed for peer in server.peers.values()] == [(1000, "bye")]


async def test_close_takes_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webtransport_transport, "CLOSE_TIMEOUT", 0.1)
    async with dial(echo) as (transport, server):
        server.vanish()
        with anyio.fail_after(1.0):
            await transport.aclose()


async def test_cancelled_close_closes_at_once() -> None:
    async with dial(echo) as (transport, server):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await transport.aclose()
        await server.everyone_left()


async def test_session_reset_by_the_server_is_a_disconnect() -> None:
    async def script(peer: StreamPeer) -> None:
        peer.connection.close("power cut")
        peer.flush()

    async with talk(script) as bus:
        with pytest.raises(Disconnected, match="the connection was lost: power cut") as caught:
            await bus.publish("a", 1)
        assert caught.value.code is None


async def test_stream_end_without_a_close_code_is_a_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webtransport_transport, "CLOSE_CODE_TIMEOUT", 0.05)

    async def end(peer: StreamPeer) -> None:
        peer.connection.send(peer.stream, b"", end=True)
        peer.flush()

    async def reset(peer: StreamPeer) -> None:
        peer.connection.reset(peer.stream, 7)
        peer.flush()

    for script in (end, reset):
        async with talk(script) as bus:
            with pytest.raises(Disconnected, match="ended its stream without a close code"):
                await bus.publish("a", 1)


async def test_server_that_vanishes_is_a_disconnect() -> None:
    async with (
        serve(Honest(), idle=1.0) as server,
        connect(server.url, token="t", ca=certificate().pem, reconnect=False) as bus,
    ):
        server.vanish()
        with pytest.raises(Disconnected, match="the connection was lost: Idle timeout"):
            await bus.publish("a", 1)


async def test_pings_keep_an_idle_connection_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webtransport_transport, "PING_INTERVAL", 0.1)
    async with talk(Honest(), server={"idle": 1.0}) as bus:
        await anyio.sleep(1.7)
        assert await bus.publish("a", 1) == 101


async def test_cancelled_connection_closes_at_once() -> None:
    async with serve(Honest()) as server:
        with anyio.CancelScope() as scope:
            async with connect(server.url, token="t", ca=certificate().pem) as bus:
                await bus.publish("a", 1)
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        await server.everyone_left()


async def test_leaving_leaves_no_task() -> None:
    def tasks() -> int:
        return len([one for one in anyio.get_running_tasks() if "catbus.client" in (one.name or "")])

    async with serve(Honest()) as server:
        before = len(anyio.get_running_tasks())
        async with connect(server.url, token="t", ca=certificate().pem) as bus:
            await bus.publish("a", 1)
            assert tasks()
        await server.everyone_left()
        assert not tasks()
        # The server's script ends too.
        while len(anyio.get_running_tasks()) > before:
            await anyio.sleep(0.001)


async def test_exception_of_the_block_leaves_it_unchanged() -> None:
    async with serve(Honest()) as server:
        with pytest.raises(KeyError):
            async with connect(server.url, token="t", ca=certificate().pem):
                raise KeyError("mine")
