"""The WebSocket transport of the client, with a scripted broker that may send anything."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import msgspec
import pytest
from anyio.streams.tls import TLSStream
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Message, Ping, TextMessage

from catbus.client import Disconnected, connect
from catbus.client.broker_address import parse_address
from catbus.client.websocket_transport import WebSocketTransport, open_websocket
from tests.client.scripted_broker import LIMIT, Gone, Honest, Peer, WebSocketPeer, message, play, serve, talk, talk_to

pytestmark = pytest.mark.anyio


def on_socket(script: Callable[[WebSocketPeer], Awaitable[None]]) -> Callable[[Peer], Awaitable[None]]:
    async def play_it(peer: Peer) -> None:
        assert isinstance(peer, WebSocketPeer)
        await script(peer)

    return play_it


@asynccontextmanager
async def dial(
    script: Callable[[WebSocketPeer], Awaitable[None]], *, handshake: bool = True
) -> AsyncIterator[WebSocketTransport]:
    async with serve(on_socket(script), handshake=handshake) as url:
        websocket = await open_websocket(parse_address(url))
        try:
            yield websocket
        finally:
            await websocket.aclose()


# The handshake


async def test_path_of_the_url_is_requested() -> None:
    targets: list[str] = []

    async def script(peer: WebSocketPeer) -> None:
        targets.append(peer.target)
        await Honest()(peer)

    async with serve(on_socket(script)) as url:
        for suffix in ("", "/other?x=1"):
            async with connect(url + suffix, token="t"):
                pass
    assert targets == ["/ws", "/other?x=1"]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP status 404"),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", "HTTP status 200"),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            "is not a WebSocket endpoint",
        ),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "is not a WebSocket endpoint"),
        (b"HTTP/1.1 101 Switching Protocols\r\nX: " + b"x" * 100_000, "is not a WebSocket endpoint"),
        (b"", "during the handshake"),
    ],
)
async def test_server_that_is_no_broker_is_a_disconnect(answer: bytes, complaint: str) -> None:
    async def script(peer: WebSocketPeer) -> None:
        await peer.stream.receive()
        await peer.stream.send(answer)
        await peer.stream.aclose()
        raise Gone

    async with serve(on_socket(script), handshake=False) as url:
        with pytest.raises(Disconnected, match=complaint):
            await open_websocket(parse_address(url))


async def test_refused_connection_is_a_disconnect() -> None:
    async with serve(Honest()) as url:
        pass
    with pytest.raises(Disconnected, match=f"cannot connect to {url}: Connection refused"):
        async with connect(url, token="t"):
            pytest.fail("nobody is there")


async def test_unknown_host_name_is_a_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect_tcp(host: str, port: int) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
    with pytest.raises(Disconnected, match=r"cannot connect to ws://nobody/ws: .*not known"):
        async with connect("ws://nobody/ws", token="t"):
            pytest.fail("nobody is there")


async def test_silent_server_is_a_disconnect() -> None:
    async with serve(lambda peer: anyio.sleep_forever(), handshake=False) as url:
        with pytest.raises(Disconnected, match=r"did not answer within 0\.05 s"):
            async with connect(url, token="t", timeout=0.05):
                pytest.fail("it says nothing")


async def test_data_sent_with_the_handshake_is_not_lost() -> None:
    async def script(peer: WebSocketPeer) -> None:
        await peer.fill()
        [_] = peer.connection.events()
        answer = peer.connection.send(AcceptConnection())
        await peer.stream.send(answer + peer.connection.send(TextMessage(data="first")))

    async with dial(script, handshake=False) as websocket:
        assert (await websocket.receive()).data == b"first"


# Frames


async def test_message_may_be_fragmented_and_split_anywhere() -> None:
    text = 'ä {"} 😀\n'
    data = text.encode()

    async def script(peer: WebSocketPeer) -> None:
        pieces = [text[:3], "", text[3:7], text[7:]]
        wire = b""
        for number, piece in enumerate(pieces, 1):
            event: Message[str] = TextMessage(data=piece, message_finished=number == len(pieces))
            wire += peer.connection.send(event)
            if number == 2:
                wire += peer.connection.send(Ping(payload=b"between"))
        for at in range(len(wire)):
            await peer.stream.send(wire[at : at + 1])

    async with dial(script) as websocket:
        received = b""
        pinged = False
        while len(received) < len(data):
            received += (await websocket.receive()).data
            if websocket.pending:
                pinged = True
                await websocket.send(b"")
        assert received == data
        assert pinged


async def test_long_frame_is_received() -> None:
    async def script(peer: WebSocketPeer) -> None:
        await peer.write(b"x" * 1_000_000)

    async with dial(script) as websocket:
        received = 0
        while received < 1_000_000:
            received += len((await websocket.receive()).data)
        assert received == 1_000_000


async def test_idle_client_answers_pings() -> None:
    answered = anyio.Event()

    async def script(peer: WebSocketPeer) -> None:
        await peer.admit()
        for number in range(3):
            await peer.stream.send(peer.connection.send(Ping(payload=b"%d" % number)))
            while len(peer.pongs) <= number:
                await peer.read()
        assert peer.pongs == [b"0", b"1", b"2"]
        answered.set()

    async with talk_to(on_socket(script)):
        await answered.wait()


async def test_several_pings_get_one_pong() -> None:
    async def script(peer: WebSocketPeer) -> None:
        pings = b"".join(peer.connection.send(Ping(payload=b"%d" % number)) for number in range(100))
        await peer.stream.send(pings + peer.connection.send(TextMessage(data="done")))
        await peer.read()
        assert peer.pongs[-1] == b"99"
        await peer.write(b"heard")

    async with dial(script) as websocket:
        received = b""
        while b"done" not in received:
            received += (await websocket.receive()).data
        assert websocket.pending
        await websocket.send(b"pong goes first")
        assert not websocket.pending
        assert (await websocket.receive()).data == b"heard"


async def test_binary_frame_is_received() -> None:
    async def script(peer: WebSocketPeer) -> None:
        await peer.admit()
        request = await peer.expect("publish")
        reply = {"type": "published", "channel": "a", "id": request["id"], "seq": 1}
        await peer.stream.send(peer.connection.send(BytesMessage(data=msgspec.json.encode(reply))))

    async with talk_to(on_socket(script)) as bus:
        assert await bus.publish("a", 1) == 1


# Closing


@pytest.mark.parametrize("code", [1000, 1001, 1012, 4000, 4401, 4504])
async def test_close_code_and_reason_of_the_broker_are_reported(code: int) -> None:
    answers: list[object] = []

    async def script(peer: Peer) -> None:
        await peer.close(code, "for a reason")
        try:
            await peer.linger()
        finally:
            answers.append(peer.closed)

    async with talk(script) as bus:
        with pytest.raises(Disconnected, match="for a reason") as caught:
            await bus.publish("a", 1)
        assert caught.value.code == code
    assert [answer[0] for answer in answers if isinstance(answer, tuple)] == [code]


async def test_messages_in_one_chunk_with_a_close_frame_are_received() -> None:
    async def script(peer: WebSocketPeer) -> None:
        await peer.admit()
        await peer.subscribed()
        line = msgspec.json.encode(message(101)).decode()
        data = peer.connection.send(TextMessage(data=line)) + peer.connection.send(CloseConnection(4504, "stopping"))
        await peer.stream.send(data)

    async with talk_to(on_socket(script)) as bus, bus.subscribe("a.*") as messages:
        assert (await anext(messages)).seq == 101
        with pytest.raises(Disconnected, match="stopping") as caught:
            await anext(messages)
        assert caught.value.code == 4504


async def test_send_raises_after_the_close_frame_of_the_broker() -> None:
    async def script(peer: WebSocketPeer) -> None:
        await peer.close(4503, "away")

    async with dial(script) as websocket:
        with pytest.raises(Disconnected, match="away"):
            await websocket.receive()
        with pytest.raises(Disconnected, match="away") as caught:
            await websocket.send(b"too late")
        assert caught.value.code == 4503


async def test_protocol_violation_ends_the_connection() -> None:
    closed: list[tuple[int, str | None] | None] = []

    async def script(peer: WebSocketPeer) -> None:
        await peer.stream.send(b"\xff\xff\xff\xff")
        try:
            await peer.linger()
        finally:
            closed.append(peer.closed)

    async with dial(script) as websocket:
        with pytest.raises(Disconnected, match="violated the WebSocket protocol") as caught:
            await websocket.receive()
        assert caught.value.code is None
        await websocket.aclose()
        while not closed:
            await anyio.sleep(0)
    assert closed[0] is not None
    assert closed[0][0] == 1002


async def test_invalid_utf8_ends_the_connection() -> None:
    async def script(peer: WebSocketPeer) -> None:
        await peer.stream.send(b"\x81\x02\xc3\x28")

    async with dial(script) as websocket:
        with pytest.raises(Disconnected, match="violated the WebSocket protocol"):
            await websocket.receive()


async def test_nothing_is_sent_after_an_incomplete_frame() -> None:
    """Half a frame with a Close behind it would be a frame with a Close in it."""
    after: list[bytes] = []
    stuck = anyio.Event()

    async def script(peer: WebSocketPeer) -> None:
        await stuck.wait()
        try:
            while True:
                await peer.read()
        finally:
            after.append(b"")
            assert peer.closed is None

    async with dial(script) as websocket:
        with anyio.move_on_after(0.05) as scope:
            while True:
                await websocket.send(b"x" * 1_000_000)
        assert scope.cancelled_caught
        stuck.set()
        await websocket.aclose()
        while not after:
            await anyio.sleep(0)


async def test_second_close_does_nothing() -> None:
    async with dial(Peer.linger) as websocket:
        await websocket.aclose()
        await websocket.aclose()
        with pytest.raises(Disconnected):
            await websocket.send(b"x")


# Other streams


async def test_client_connects_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "bus.sock"

    async def handle(stream: anyio.abc.ByteStream) -> None:
        async with stream:
            peer = WebSocketPeer(stream)
            await peer.perform_handshake()
            await play(Honest(), peer)

    with anyio.fail_after(LIMIT):
        async with await anyio.create_unix_listener(path) as listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, handle)
            async with connect(f"ws+unix:{path}", token="t") as bus, bus.subscribe("a") as messages:
                assert await bus.publish("a", "over a path") == 101
                assert (await anext(messages)).payload == "over a path"
            tasks.cancel_scope.cancel()


async def test_missing_unix_socket_is_a_disconnect(tmp_path: Path) -> None:
    with pytest.raises(Disconnected, match="No such file"):
        async with connect(f"ws+unix:{tmp_path}/bus.sock", token="t"):
            pytest.fail("nobody is there")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "catbus test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).add_extension(address, critical=False)
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    directory = tmp_path_factory.mktemp("tls")
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    cert_file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


@asynccontextmanager
async def serve_tls(certificate: tuple[Path, Path], script: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            try:
                tls = await TLSStream.wrap(stream, server_side=True, ssl_context=context, standard_compatible=False)
            except (ssl.SSLError, anyio.BrokenResourceError, anyio.EndOfStream):
                return
            peer = WebSocketPeer(tls)
            await peer.perform_handshake()
            await play(script, peer)

    with anyio.fail_after(LIMIT):
        async with (
            await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(listener.serve, handle)
            yield f"wss://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
            tasks.cancel_scope.cancel()


async def test_client_connects_over_tls_with_a_private_authority(certificate: tuple[Path, Path]) -> None:
    async with serve_tls(certificate, Honest()) as url:
        async with connect(url, token="t", ca=certificate[0]) as bus, bus.subscribe("a") as messages:
            results = await bus.publish_many([("a", "x" * 1000)] * 300)
            assert results == list(range(101, 401))
            assert [(await anext(messages)).seq for _ in range(300)] == results
        context = ssl.create_default_context(cafile=certificate[0])
        async with connect(url, token="t", ssl_context=context) as bus:
            assert await bus.publish("a", 1) == 401


async def test_untrusted_certificate_is_rejected(certificate: tuple[Path, Path]) -> None:
    async with serve_tls(certificate, Honest()) as url:
        with pytest.raises(Disconnected, match="certificate is not accepted"):
            async with connect(url, token="t"):
                pytest.fail("it is self-signed")


async def test_tls_broker_that_vanishes_is_a_disconnect(certificate: tuple[Path, Path]) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit()
        await peer.expect("publish")
        await peer.stream.transport_stream.aclose()  # type: ignore[attr-defined]
        raise Gone

    async with (
        serve_tls(certificate, script) as url,
        connect(url, token="t", ca=certificate[0], reconnect=False) as bus,
    ):
        with pytest.raises(Disconnected):
            await bus.publish("a", 1)


async def test_tls_to_a_plain_server_is_a_disconnect() -> None:
    async def script(peer: WebSocketPeer) -> None:
        await peer.stream.receive()
        await peer.stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serve(on_socket(script), handshake=False) as url:
        with pytest.raises(Disconnected, match="cannot connect"):
            async with connect(url.replace("ws://", "wss://"), token="t"):
                pytest.fail("it is no TLS")


async def test_unreadable_ca_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with connect("wss://127.0.0.1:1", token="t", ca=tmp_path / "none.pem"):
            pytest.fail("there is no such file")
