"""The ways from a client to a broker: with and without TLS, and through proxies."""

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
from tests.conformance.conversation import TIMES, Scene
from tests.conformance.proxies import Place, proxying
from tests.conformance.puppets import Puppet


class Certificates:
    """An authority, and what it has signed for this machine, as objects and as files."""

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
class Way:
    """`proxy` is its name, or empty; without one, `tls` says whether the broker's port speaks TLS itself."""

    tls: bool = False
    proxy: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def scene(
        self, puppet: Puppet, made: Certificates, directory: Path
    ) -> AsyncIterator[tuple[Scene, Place | None]]:
        """A broker of its own at the end of this way, and the proxy in front of it."""
        async with running(self.config(made), seconds=600) as (broker, address):
            if not self.proxy:
                yield await self._open(puppet, broker, address, made), None
                return
            async with proxying(self.proxy, address, made.issued, directory, **self.environment) as place:
                yield await self._open(puppet, broker, f"127.0.0.1:{place.port}", made), place

    def config(self, made: Certificates) -> catbus.Config:
        websocket = msgspec.structs.replace(TIMES, tls=self.tls, trusted_proxies=("127.0.0.1",) if self.proxy else ())
        webtransport = WebTransportSettings(bind=(), cert=str(made.certificate), key=str(made.key))
        return msgspec.structs.replace(CONFIG, websocket=websocket, webtransport=webtransport)

    async def _open(self, puppet: Puppet, broker: catbus.Broker, address: str, made: Certificates) -> Scene:
        secure = "s" if self.tls or self.proxy else ""
        await puppet.load(f"http{secure}://{address}/catbus.js")
        return Scene(puppet, f"ws{secure}://{address}/ws", str(made.authority) if secure else None, broker)


WAYS = {
    "plain": Way(),
    "TLS": Way(tls=True),
    "nginx": Way(proxy="nginx"),
    "HAProxy": Way(proxy="HAProxy"),
    "Caddy": Way(proxy="Caddy"),
    "Caddy with http2xconnect": Way(proxy="Caddy", environment={"GODEBUG": "http2xconnect=1"}),
}
EXTENDED_CONNECT = "HAProxy", "Caddy with http2xconnect"
"""Ways on which WebSocket over HTTP/2 (RFC 8441) is possible."""
