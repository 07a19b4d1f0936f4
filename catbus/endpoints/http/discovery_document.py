"""The discovery document: the URLs of a broker, as `/.well-known/catbus` returns them."""

from __future__ import annotations

import base64

from ...certificates import Certificate
from .host_header import host_name


def discovery_document(
    host: str, webtransport_port: int | None, certificate: Certificate | None, *, secure: bool = False
) -> dict[str, str]:
    """Return the discovery document for a client that connected to `host`, the Host header of its request.

    Without a valid `host` the document has no URLs. `certificate` is the development certificate, if one is used, and
    `secure` says whether clients reach the WebSocket port through TLS.
    """
    found = {"protocol": "catbus.v1"}
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
