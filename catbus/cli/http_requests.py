"""HTTP requests of the commands to a broker."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

import click

from ..client.broker_address import make_ssl_context
from ..errors import Unavailable
from .connection_options import ConnectionOptions

_REQUEST_TIMEOUT = 5.0
_MAX_RESPONSE_BYTES = 16 << 20

_NOT_FOUND = (
    "the broker at {url} has no {path}: it is of an earlier release, or a proxy does not forward this path "
    "(--url may be the address of the broker itself)"
)
_NOT_ALLOWED = "{error} (set CATBUS_TOKEN to the admin key, or to a token of: catbus grant -p all '*')"


def send_request(broker: ConnectionOptions, path: str, token: str = "", *, method: str = "GET") -> tuple[int, str]:
    """Send a request without a body. Return the status and the body of the response.

    Raises `Unavailable` if no response comes within seconds, and `click.UsageError` for a URL of WebTransport.
    """
    parts = urlsplit(broker.url)
    if parts.scheme not in ("ws", "wss"):
        raise click.UsageError("--url: this command uses HTTP over TCP: the URL must begin with ws:// or wss://")
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    if parts.scheme == "wss":
        context = make_ssl_context(broker.ca)
        connection = http.client.HTTPSConnection(host, parts.port, timeout=_REQUEST_TIMEOUT, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=_REQUEST_TIMEOUT)
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        return response.status, response.read(_MAX_RESPONSE_BYTES).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unavailable(f"cannot reach a broker at {broker.url}: {reason}") from None
    finally:
        connection.close()


def call_api(
    broker: ConnectionOptions, path: str, query: Mapping[str, object] | None = None, *, method: str = "GET"
) -> dict[str, Any]:
    """Send a request to a path of `/api/`, and return the object of the response.

    Raises `click.ClickException`, whose text says what to do, for a missing token and for an error of the broker.
    """
    broker.require_token()
    assert broker.token is not None
    status, text = send_request(broker, f"{path}?{urlencode(query)}" if query else path, broker.token, method=method)
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if status == 200 and isinstance(found, dict):
        return found
    error = found.get("error", text) if isinstance(found, dict) else f"HTTP status {status}"
    match status:
        case 404:
            raise click.ClickException(_NOT_FOUND.format(url=broker.url, path=path))
        case 401 | 403:
            raise click.ClickException(_NOT_ALLOWED.format(error=error))
        case _:
            raise click.ClickException(f"the broker at {broker.url} answered: {error}")
