"""The discovery document: the URLs of a broker, as `/.well-known/catbus` returns them."""

from __future__ import annotations

import base64

from ...certificates import Certificate
from .host_header import host_name


def discovery(
    host: str, webtransport_port: int | None, certificate: Certificate | None, *, secure: bool = False
) -> dict[str, str]:
    """What `/.well-known/catbus` tells somebody who came by the name `host`, the Host header of the request.

    Unless that is `host` or `host:port`, there are no URLs. `certificate` is given
    when it is self-made; `secure` when the WebSocket port is reached through TLS.
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
