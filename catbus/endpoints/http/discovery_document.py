"""The discovery document: the URLs of a broker, as `/.well-known/catbus` returns them."""

from __future__ import annotations

import base64
from typing import Required, TypedDict

from ...certificates import Certificate
from .host_header import host_name


class DiscoveryDocument(TypedDict, total=False):
    """The URLs of a broker, and a certificate that it has generated: its SHA-256 in base64, and itself in PEM."""

    protocol: Required[str]
    websocket: str
    webtransport: str
    certificate_hash: str
    certificate: str


def discovery_document(
    host: str, webtransport_port: int | None, certificate: Certificate | None, *, secure: bool = False
) -> DiscoveryDocument:
    """Return the discovery document for a client that connected to `host`, the Host header of its request.

    Without a valid `host` the document has no URLs. `certificate` is the development certificate, if one is used, and
    `secure` says whether clients reach the WebSocket port through TLS.
    """
    found: DiscoveryDocument = {"protocol": "catbus.v1"}
    name = host_name(host)
    if name:
        found["websocket"] = f"{'wss' if secure else 'ws'}://{host}/ws"
    if webtransport_port is not None:
        if name:
            found["webtransport"] = f"https://{name}:{webtransport_port}"
        if certificate:
            found["certificate_hash"] = base64.b64encode(certificate.sha256).decode()
            found["certificate"] = certificate.certificate_pem
    return found
