"""TLS on the WebSocket port, and certificates that change while clients are connected over either transport."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import trio
import trustme

import catbus
from catbus import Config, certificates
from catbus.client import Disconnected
from catbus.config import WebSocketSettings, WebTransportSettings, split_address
from catbus.endpoints.http import http_endpoint
from catbus.errors import ConfigError
from catbus.observability.metrics import export_metrics
from tests.brokers import CONFIG, TOKEN
from tests.endpoints.raw_peer import TEXT, UPGRADE, Peer, close_frame, masked
from tests.programs import find_module, find_program
from tests.volumes import Volume

SESSIONS = 20
"""The number for each transport."""


class Renewed:
    """A certificate in a volume, which another authority renews each time."""

    def __init__(self, directory: Path) -> None:
        self.authority = ""
        self._volume = Volume(directory)
        self.renew()

    def renew(self) -> None:
        authority = trustme.CA()
        self.authority = authority.cert_pem.bytes().decode()
        issued = authority.issue_cert("127.0.0.1", "localhost")
        self._volume.put({"tls.crt": issued.cert_chain_pems[0].bytes(), "tls.key": issued.private_key_pem.bytes()})

    def config(self, *, tls: bool = True) -> Config:
        return msgspec.structs.replace(
            CONFIG,
            websocket=WebSocketSettings(bind=("127.0.0.1:0",), tls=tls),
            webtransport=WebTransportSettings(
                bind=("127.0.0.1:0",),
                cert=str(self._volume.directory / "tls.crt"),
                key=str(self._volume.directory / "tls.key"),
            ),
        )


class Urls(NamedTuple):
    websocket: str
    webtransport: str


@pytest.fixture
def certificate(tmp_path: Path) -> Renewed:
    return Renewed(tmp_path)


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[tuple[catbus.Broker, Urls]]:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, config)
            addresses = dict(broker.addresses)
            yield broker, Urls(f"wss://{addresses['websocket']}/ws", f"https://{addresses['webtransport']}")
            broker.stop()


async def test_messages_pass_through_tls(certificate: Renewed) -> None:
    async with (
        serving(certificate.config()) as (broker, urls),
        catbus.connect(urls.websocket, token=TOKEN, ca=certificate.authority) as bus,
        bus.subscribe("a.*") as messages,
    ):
        # More than one flush, and more than one TLS record.
        for number in range(200):
            await bus.publish("a.b", {"number": number, "text": "x" * 5000})
        for number in range(200):
            assert (await anext(messages)).payload["number"] == number
        assert broker.replica.statistics().sessions == {"websocket": 1, "webtransport": 0, "sse": 0}


async def test_client_that_does_not_trust_the_certificate_is_not_connected(certificate: Renewed) -> None:
    async with serving(certificate.config()) as (broker, urls):
        with pytest.raises(Disconnected, match="the certificate is not accepted"):
            async with catbus.connect(urls.websocket, token=TOKEN, reconnect=False):
                pass
        assert broker.replica.statistics().opened["websocket"] == 0


def place_of(urls: Urls) -> tuple[str, int]:
    return split_address(urls.websocket.removeprefix("wss://").removesuffix("/ws"))


async def open_tls(
    urls: Urls, certificate: Renewed, maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> trio.SSLStream[trio.SocketStream]:
    context = ssl.create_default_context(cadata=certificate.authority)
    context.maximum_version = maximum
    stream = await trio.open_ssl_over_tcp_stream(*place_of(urls), ssl_context=context, https_compatible=True)
    await stream.do_handshake()
    return stream


async def test_http_response_ends_with_close_notify_of_both_sides(certificate: Renewed) -> None:
    async with serving(certificate.config()) as (_, urls), await open_tls(urls, certificate) as stream:
        peer = Peer(stream)
        await peer.send(b"GET /.well-known/catbus HTTP/1.1\r\nHost: bus.example.com\r\nConnection: close\r\n\r\n")
        answer = await peer.response()
        assert answer.status == 200
        assert msgspec.json.decode(answer.body)["websocket"] == "wss://bus.example.com/ws"
        assert await stream.receive_some(1) == b""


async def test_peer_without_tls_affects_no_other(certificate: Renewed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_endpoint, "HANDSHAKE_TIMEOUT", 0.1)
    async with serving(certificate.config()) as (_, urls):
        host, port = place_of(urls)
        for said in (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"", b"\x16\x03\x01\xff\xff"):
            async with await trio.open_tcp_stream(host, port) as stream:
                await stream.send_all(said)
                with suppress(trio.BrokenResourceError):
                    while await stream.receive_some():
                        pass
        async with catbus.connect(urls.websocket, token=TOKEN, ca=certificate.authority) as bus:
            assert await bus.publish("a", 1) == 1


async def test_certificate_change_under_load_ends_no_session(
    certificate: Renewed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later connections get the new one, over either transport."""
    monkeypatch.setattr(certificates, "CHECK_INTERVAL", timedelta(0))
    lost: list[object] = []
    async with AsyncExitStack() as stack:
        _, urls = await stack.enter_async_context(serving(certificate.config()))
        first = certificate.authority
        streams = []
        for url in urls:
            for _ in range(SESSIONS):
                bus = await stack.enter_async_context(
                    catbus.connect(url, token=TOKEN, ca=first, on_event=lost.append, reconnect=False)
                )
                streams.append(await stack.enter_async_context(bus.subscribe("load")))
        publisher = await stack.enter_async_context(catbus.connect(urls.websocket, token=TOKEN, ca=first))
        newcomers = 0
        for start in range(0, 300, 10):
            await publisher.publish_many([("load", number) for number in range(start, start + 10)])
            if start == 100:
                certificate.renew()
            if start in (50, 250):
                for url in urls:
                    async with catbus.connect(url, token=TOKEN, ca=certificate.authority, reconnect=False) as bus:
                        newcomers += await bus.ping() >= 0
                if start == 250:
                    for url in urls:
                        with pytest.raises(Disconnected):
                            async with catbus.connect(url, token=TOKEN, ca=first, reconnect=False):
                                pass
        for messages in streams:
            assert [(await anext(messages)).payload for _ in range(300)] == list(range(300))
    assert newcomers == 4
    assert lost == []


# The end of a connection


@asynccontextmanager
async def flawless(certificate: Renewed, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Urls]:
    """Run a broker that logs no error, and counts no internal error, until it has stopped."""
    async with serving(certificate.config()) as (broker, urls):
        yield urls
        broker.stop()
        await broker.wait_stopping()
    body, _ = export_metrics(broker.replica)
    assert b'catbus_internal_errors_total{transport="websocket"} 0' in body
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


LAST = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
NEXT = LAST.replace(b"close", b"keep-alive")


async def test_curl_gets_a_response_and_a_clean_close(
    certificate: Renewed, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    curl = find_program("curl", "curl")
    authority = tmp_path / "ca.crt"
    authority.write_text(certificate.authority)
    async with flawless(certificate, caplog) as urls:
        url = urls.websocket.replace("wss:", "https:").replace("/ws", "/ready")
        for header in ("Connection: close", "Connection: keep-alive"):
            for version in ("1.2", "1.3"):
                command = [
                    curl,
                    "-sS",
                    "--fail",
                    "--tls-max",
                    version,
                    "--cacert",
                    str(authority),
                    "-H",
                    header,
                    url,
                    url,
                ]
                done = await trio.run_process(command, capture_stdout=True)
                assert done.stdout == b"ready\n" * 2


async def answer_and_leave(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Answer the broker's close_notify, then close."""
    assert await stream.receive_some() == b""
    transport, _ = await stream.unwrap()
    assert await transport.receive_some() == b""
    await transport.aclose()


async def leave_unanswered(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Read the broker's close_notify without an answer."""
    assert await stream.receive_some() == b""
    await stream.transport_stream.aclose()


async def leave_unheard(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Close with the close_notify unread, which resets the connection."""
    await stream.transport_stream.aclose()


async def say_more(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Send a request instead of close_notify."""
    with suppress(trio.BrokenResourceError):
        await stream.send_all(NEXT)
    await stream.transport_stream.aclose()


async def garble(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Send an invalid TLS record."""
    with suppress(trio.BrokenResourceError):
        await stream.transport_stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
        while await stream.transport_stream.receive_some():
            pass
    await stream.transport_stream.aclose()


LEAVING = [answer_and_leave, leave_unanswered, leave_unheard, say_more, garble]


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize("maximum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_clean_close_is_no_internal_error(
    certificate: Renewed,
    caplog: pytest.LogCaptureFixture,
    leave: Callable[[trio.SSLStream[trio.SocketStream]], Awaitable[None]],
    maximum: ssl.TLSVersion,
) -> None:
    async with flawless(certificate, caplog) as urls:
        async with await open_tls(urls, certificate, maximum) as stream:
            peer = Peer(stream)
            await peer.send(LAST)
            assert (await peer.response()).body == b"ready\n"
            await leave(stream)
        async with await open_tls(urls, certificate, maximum) as stream:
            peer = Peer(stream)
            await peer.upgrade()
            await peer.send(close_frame(1000))
            assert (await peer.frame()).code == 1000
            await leave(stream)


async def test_cut_connection_is_no_internal_error(certificate: Renewed, caplog: pytest.LogCaptureFixture) -> None:
    async with flawless(certificate, caplog) as urls:
        for said in (b"", NEXT[:10], NEXT, LAST, UPGRADE, UPGRADE + masked(TEXT, b'{"type":"ping","seq":1}')):
            async with await open_tls(urls, certificate) as stream:
                await stream.send_all(said)
                await stream.transport_stream.aclose()


@pytest.mark.parametrize("maximum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_half_closed_peer_still_gets_its_response(
    certificate: Renewed, caplog: pytest.LogCaptureFixture, maximum: ssl.TLSVersion
) -> None:
    """The peer half-closes by TCP, or, since TLS 1.3, by a close_notify."""
    async with flawless(certificate, caplog) as urls:
        async with await open_tls(urls, certificate, maximum) as stream:
            await stream.send_all(NEXT)
            await stream.transport_stream.send_eof()
            assert (await Peer(stream).response()).body == b"ready\n"
            assert await stream.receive_some() == b""
        if maximum is ssl.TLSVersion.TLSv1_3:
            host, port = place_of(urls)
            context = ssl.create_default_context(cadata=certificate.authority)
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context.wrap_bio(incoming, outgoing, server_hostname=host)
            async with await trio.open_tcp_stream(host, port) as transport:

                async def when_ready(step: Callable[[], Any]) -> Any:
                    while True:
                        try:
                            return step()
                        except ssl.SSLWantReadError:
                            await transport.send_all(outgoing.read())
                            incoming.write(bytes(await transport.receive_some()))
                        except ssl.SSLZeroReturnError:
                            return b""

                await when_ready(tls.do_handshake)
                tls.write(NEXT)
                with suppress(ssl.SSLWantReadError):
                    tls.unwrap()
                received = b""
                while part := await when_ready(partial(tls.read, 65_536)):
                    received += part
                assert received.endswith(b"\r\n\r\nready\n")


async def test_idle_connection_gets_close_notify_when_the_broker_stops(
    certificate: Renewed, caplog: pytest.LogCaptureFixture
) -> None:
    async with flawless(certificate, caplog) as urls:
        stream = await open_tls(urls, certificate)
        peer = Peer(stream)
        await peer.send(NEXT)
        assert (await peer.response()).status == 200
    # An end without close_notify would be an error for a client that insists on it.
    transport, rest = await stream.unwrap()
    assert not rest
    await transport.aclose()


async def test_renegotiation_is_rejected(
    certificate: Renewed, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    openssl = find_program("openssl", "openssl")
    authority = tmp_path / "ca.crt"
    authority.write_text(certificate.authority)
    async with flawless(certificate, caplog) as urls:
        host, port = place_of(urls)
        command = [openssl, "s_client", "-connect", f"{host}:{port}", "-CAfile", str(authority), "-tls1_2"]
        async with trio.open_nursery() as nursery:
            process = await nursery.start(
                partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, check=False)
            )  # fmt: skip
            said = b""
            while b"Verify return code" not in said:
                said += await process.stdout.receive_some()
            await process.stdin.send_all(b"R\n")
            while part := await process.stdout.receive_some():
                said += part
            assert b"no renegotiation" in said


async def test_node_and_python_clients_close_without_an_internal_error(
    certificate: Renewed, caplog: pytest.LogCaptureFixture
) -> None:
    node, module = find_program("nodejs", "node"), find_module("ws")
    async with flawless(certificate, caplog) as urls:
        await trio.run_process(
            [node, "-e", NODE, str(module), urls.websocket, certificate.authority], capture_stdout=True
        )
        async with catbus.connect(urls.websocket, token=TOKEN, ca=certificate.authority) as bus:
            assert await bus.publish("a", 1) == 1


NODE = """
const [, module, url, ca] = process.argv;
const socket = new (require(module))(url, { ca });
socket.on('open', () => socket.send('{"type":"ping","seq":1}'));
socket.on('message', () => socket.close(1000));
socket.on('error', (error) => { throw error; });
socket.on('close', (code) => { process.exitCode = code === 1000 ? 0 : 1; });
"""


def test_tls_without_a_certificate_is_an_error_except_on_loopback(tmp_path: Path) -> None:
    file = tmp_path / "catbus.toml"
    file.write_text("[websocket]\ntls = true\n")
    with pytest.raises(ConfigError, match=r"websocket.tls is true without a certificate"):
        catbus.config.load(file)
    file.write_text('[websocket]\ntls = true\nbind = "127.0.0.1:0"\n[webtransport]\nbind = []\n')
    assert catbus.config.load(file).certificate_needed
    with pytest.raises(ConfigError, match="CATBUS_WS_TLS: expected true or false, found"):
        catbus.config.load(None, {"CATBUS_WS_TLS": "perhaps"})
    assert catbus.config.load(None, {"CATBUS_WS_TLS": "true", "CATBUS_CERT": "c", "CATBUS_KEY": "k"}).websocket.tls
