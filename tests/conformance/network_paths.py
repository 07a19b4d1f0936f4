"""The network paths from a client to a broker: with and without TLS, and through proxies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trustme

import catbus
from catbus.config import WebTransportSettings
from tests.brokers import CONFIG, running
from tests.conformance.client_steps import PING_SETTINGS, ClientUnderTest
from tests.conformance.proxies import ProxyInstance, run_proxy
from tests.conformance.third_party_clients import ThirdPartyClient


class Certificates:
    """A certificate authority and a certificate that it signed for this machine, as objects and as files."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        self.issued = authority.issue_cert("127.0.0.1", "localhost")
        self.authority = directory / "authority.pem"
        self.certificate = directory / "certificate.pem"
        self.key = directory / "key.pem"
        self.authority.write_bytes(authority.cert_pem.bytes())
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in self.issued.cert_chain_pems))
        self.key.write_bytes(self.issued.private_key_pem.bytes())


@dataclass(frozen=True, slots=True)
class NetworkPath:
    """A path through the proxy of this name, or directly to the broker, with or without TLS.

    `environment` is that of the proxy.
    """

    tls: bool = False
    proxy: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def open(
        self, driver: ThirdPartyClient, certificates: Certificates, directory: Path
    ) -> AsyncIterator[tuple[ClientUnderTest, ProxyInstance | None]]:
        """Run a broker at the end of this path. Yields the client under test and the proxy, if there is one."""
        async with running(self.config(certificates), seconds=600) as (broker, address):
            if not self.proxy:
                yield await self._load(driver, broker, address, certificates), None
                return
            async with run_proxy(self.proxy, address, certificates.issued, directory, **self.environment) as proxy:
                yield await self._load(driver, broker, f"127.0.0.1:{proxy.port}", certificates), proxy

    def config(self, certificates: Certificates) -> catbus.Config:
        websocket = msgspec.structs.replace(
            PING_SETTINGS, tls=self.tls, trusted_proxies=("127.0.0.1",) if self.proxy else ()
        )
        webtransport = WebTransportSettings(bind=(), cert=str(certificates.certificate), key=str(certificates.key))
        return msgspec.structs.replace(CONFIG, websocket=websocket, webtransport=webtransport)

    async def _load(
        self, driver: ThirdPartyClient, broker: catbus.Broker, address: str, certificates: Certificates
    ) -> ClientUnderTest:
        secure = "s" if self.tls or self.proxy else ""
        await driver.load(f"http{secure}://{address}/catbus.js")
        return ClientUnderTest(
            driver, f"ws{secure}://{address}/ws", str(certificates.authority) if secure else None, broker
        )


NETWORK_PATHS = {
    "plain": NetworkPath(),
    "TLS": NetworkPath(tls=True),
    "nginx": NetworkPath(proxy="nginx"),
    "HAProxy": NetworkPath(proxy="HAProxy"),
    "Caddy": NetworkPath(proxy="Caddy"),
    "Caddy with http2xconnect": NetworkPath(proxy="Caddy", environment={"GODEBUG": "http2xconnect=1"}),
}
EXTENDED_CONNECT = "HAProxy", "Caddy with http2xconnect"
"""Paths that support WebSocket over HTTP/2 (RFC 8441)."""
