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
from tests.conformance.proxies import PROXIES, ProxyInstance, run_proxy
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

    def ca(self, url: str) -> str | None:
        """The file of the authority for a URL; None without TLS."""
        return str(self.authority) if url.startswith(("https:", "wss:")) else None


@dataclass(frozen=True, slots=True)
class NetworkPath:
    """A path through the proxy of this name, or directly to the broker, with or without TLS.

    `default`: the proxy has its default configuration, without TLS. `changes`: texts of its configuration that are
    replaced. `environment` is that of the proxy.
    """

    tls: bool = False
    proxy: str = ""
    default: bool = False
    changes: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def open(
        self, driver: ThirdPartyClient, certificates: Certificates, directory: Path
    ) -> AsyncIterator[tuple[ClientUnderTest, ProxyInstance | None]]:
        """Run a broker at the end of this path. Yields the client under test and the proxy, if there is one."""
        async with self.run_broker(certificates, directory) as (broker, origin, proxy):
            await driver.load(f"{origin}/catbus.js")
            url = origin.replace("http", "ws", 1) + "/ws"
            yield ClientUnderTest(driver, url, certificates.ca(url), broker), proxy

    @asynccontextmanager
    async def run_broker(
        self, certificates: Certificates, directory: Path
    ) -> AsyncIterator[tuple[catbus.Broker, str, ProxyInstance | None]]:
        """Run a broker at the end of this path. Yields it, its origin for clients, and the proxy, if there is one."""
        async with running(self.config(certificates), seconds=600) as (broker, address):
            if not self.proxy:
                yield broker, f"http{'s' if self.tls else ''}://{address}", None
                return
            certificate = None if self.default else certificates.issued
            async with run_proxy(
                self.proxy, [address], certificate, directory, self.changes, **self.environment
            ) as proxy:
                yield broker, proxy.origin, proxy

    def config(self, certificates: Certificates) -> catbus.Config:
        websocket = msgspec.structs.replace(
            PING_SETTINGS, tls=self.tls, trusted_proxies=("127.0.0.1",) if self.proxy else ()
        )
        webtransport = WebTransportSettings(bind=(), cert=str(certificates.certificate), key=str(certificates.key))
        return msgspec.structs.replace(CONFIG, websocket=websocket, webtransport=webtransport)


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

EVENT_STREAM_PATHS = {
    **{name: NETWORK_PATHS[name] for name in ("plain", "TLS", "nginx", "HAProxy", "Caddy")},
    **{f"{name}, default settings": NetworkPath(proxy=name, default=True) for name in PROXIES},
}

PROXY_TIMEOUT = 3
"""Seconds without data after which the proxies of `SHORT_TIMEOUTS` end a stream. Caddy has no such timeout."""
_TIMEOUT = f"{PROXY_TIMEOUT}s"
SHORT_TIMEOUTS = {
    "nginx": NetworkPath(proxy="nginx", changes={"75s": _TIMEOUT}),
    "nginx, default settings": NetworkPath(
        proxy="nginx", default=True, changes={"proxy_pass": f"proxy_read_timeout {_TIMEOUT}; proxy_pass"}
    ),
    "HAProxy": NetworkPath(proxy="HAProxy", changes={"75s": _TIMEOUT}),
    "HAProxy, default settings": NetworkPath(proxy="HAProxy", default=True, changes={"50s": _TIMEOUT}),
}
