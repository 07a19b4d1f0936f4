"""TLS on the WebSocket port, and certificates that change while clients are connected over either transport."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import trio
import trustme

import catbus
from catbus import Config, certificates
from catbus.client import Disconnected
from catbus.config import WebSocket, WebTransport
from catbus.endpoints import listen
from catbus.errors import ConfigError
from tests.brokers import CONFIG, TOKEN
from tests.endpoints.peers import Peer
from tests.volumes import Volume

SESSIONS = 20
"""Of each transport."""


class Renewed:
    """A certificate in a volume that is renewed now and then, each time by another authority."""

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
            websocket=WebSocket(bind=("127.0.0.1:0",), tls=tls),
            webtransport=WebTransport(
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


async def test_messages_go_through_tls(certificate: Renewed) -> None:
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
        assert broker.hub.statistics().clients == {"websocket": 1, "webtransport": 0}


async def test_who_does_not_trust_it_is_not_connected(certificate: Renewed) -> None:
    async with serving(certificate.config()) as (broker, urls):
        with pytest.raises(Disconnected, match="the certificate is not accepted"):
            async with catbus.connect(urls.websocket, token=TOKEN, reconnect=False):
                pass
        assert broker.hub.statistics().opened["websocket"] == 0


async def open_tls(urls: Urls, certificate: Renewed) -> trio.SSLStream[trio.SocketStream]:
    host, _, port = urls.websocket.removeprefix("wss://").removesuffix("/ws").rpartition(":")
    context = ssl.create_default_context(cadata=certificate.authority)
    return await trio.open_ssl_over_tcp_stream(host, int(port), ssl_context=context, https_compatible=True)


async def test_http_is_answered_and_both_sides_say_goodbye(certificate: Renewed) -> None:
    async with serving(certificate.config()) as (_, urls), await open_tls(urls, certificate) as stream:
        peer = Peer(stream)
        await peer.send(b"GET /.well-known/catbus HTTP/1.1\r\nHost: bus.example.com\r\nConnection: close\r\n\r\n")
        answer = await peer.response()
        assert answer.status == 200
        assert msgspec.json.decode(answer.body)["websocket"] == "wss://bus.example.com/ws"
        assert await stream.receive_some(1) == b""


async def test_a_peer_that_does_not_speak_tls_harms_only_itself(
    certificate: Renewed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "HANDSHAKE_TIME", 0.1)
    async with serving(certificate.config()) as (_, urls):
        host, _, port = urls.websocket.removeprefix("wss://").removesuffix("/ws").rpartition(":")
        for said in (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"", b"\x16\x03\x01\xff\xff"):
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                await stream.send_all(said)
                with suppress(trio.BrokenResourceError):
                    while await stream.receive_some():
                        pass
        async with catbus.connect(urls.websocket, token=TOKEN, ca=certificate.authority) as bus:
            assert await bus.publish("a", 1) == 1


async def test_a_certificate_that_changes_under_load_costs_no_session(
    certificate: Renewed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those who come afterwards see the new one, over either transport."""
    monkeypatch.setattr(certificates, "INTERVAL", timedelta(0))
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
        for number in range(300):
            await publisher.publish("load", number)
            if number == 100:
                certificate.renew()
            if number in (50, 250):
                for url in urls:
                    async with catbus.connect(url, token=TOKEN, ca=certificate.authority, reconnect=False) as bus:
                        newcomers += await bus.ping() >= 0
                if number == 250:
                    for url in urls:
                        with pytest.raises(Disconnected):
                            async with catbus.connect(url, token=TOKEN, ca=first, reconnect=False):
                                pass
        for messages in streams:
            assert [(await anext(messages)).payload for _ in range(300)] == list(range(300))
    assert newcomers == 4
    assert lost == []


def test_tls_without_a_certificate_is_a_mistake_unless_only_this_machine_comes(tmp_path: Path) -> None:
    file = tmp_path / "catbus.toml"
    file.write_text("[websocket]\ntls = true\n")
    with pytest.raises(ConfigError, match=r"websocket.tls is true, and there is no certificate"):
        catbus.config.load(file)
    file.write_text('[websocket]\ntls = true\nbind = "127.0.0.1:0"\n[webtransport]\nbind = []\n')
    assert catbus.config.load(file).certificate_needed
    with pytest.raises(ConfigError, match="CATBUS_WS_TLS: expected true or false, found"):
        catbus.config.load(None, {"CATBUS_WS_TLS": "perhaps"})
    assert catbus.config.load(None, {"CATBUS_WS_TLS": "true", "CATBUS_CERT": "c", "CATBUS_KEY": "k"}).websocket.tls
