"""What the state machine asks of a broker as an administrator."""

from __future__ import annotations

import os
from urllib.parse import quote
from urllib.request import Request, urlopen

from ..client.broker_address import make_ssl_context

TIMEOUT = 10.0
"""Seconds to wait for an answer."""


def disconnect_client(url: str, token: str, client_id: str, *, ca: str | os.PathLike[str] | None = None) -> None:
    """Close all sessions of a client, on every replica. `url` is the origin of the HTTP endpoint of any of them.

    Raises `OSError` if there is no answer, or another status than 200.
    """
    request = Request(f"{url}/api/clients/{quote(client_id, safe='')}/disconnect", method="POST")  # noqa: S310  # an origin
    request.add_header("Authorization", f"Bearer {token}")
    context = make_ssl_context(ca) if url.startswith("https:") else None
    with urlopen(request, timeout=TIMEOUT, context=context):  # noqa: S310  # an origin
        pass
