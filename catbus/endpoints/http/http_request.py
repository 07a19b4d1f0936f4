"""One HTTP request: its head, and the way to its body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from ...error_codes import ErrorCode
from ...errors import PeerError
from .query import ACCESS_TOKEN, find_access_token

Headers = Sequence[tuple[bytes, bytes]]


async def _nothing() -> bytes:
    return b""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """The head of a request, and a function that reads its body. Header names are in lower case."""

    method: str
    path: str
    headers: Headers = field(default=(), repr=False)
    version: bytes = b"1.1"
    host: str = ""
    """The host and port that the client requested; empty if an HTTP/1.0 request has no `Host`."""
    query: str = field(default="", repr=False)
    """The part of the target after `?`, as it was sent. It may contain a token, so it is never logged."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """The parameters of the path, decoded."""
    network: str = ""
    """The network of the client: see `network_of`."""
    read: Callable[[], Awaitable[bytes]] = _nothing
    """Reads the body, once. A body that no handler reads is not kept, so handlers check the token first."""
    wait_disconnected: Callable[[], Awaitable[None]] = trio.sleep_forever
    """Waits until the client has disconnected. For handlers that have checked the token, and only without a body."""

    @property
    def has_body(self) -> bool:
        """Whether the head announces a body that is not empty."""
        return bool(self.header(b"transfer-encoding")) or self.header(b"content-length") not in (b"", b"0")

    def header(self, name: bytes) -> bytes:
        """Return the value of a header; empty if it is missing, and joined by commas if there are several."""
        return b", ".join(value for key, value in self.headers if key == name)


def bearer_token(request: HttpRequest) -> str:
    """Return the token in the `Authorization` header. Raises `PeerError` (unauthenticated) without one."""
    scheme, _, token = request.header(b"authorization").partition(b" ")
    if scheme.lower() != b"bearer" or not token.strip():
        raise PeerError(ErrorCode.UNAUTHENTICATED, "a token is needed: `Authorization: Bearer ...`")
    return token.strip().decode("latin-1")


def request_token(request: HttpRequest) -> str:
    """Return the token in the `Authorization` header or in the `access_token` of the query (RFC 6750, section 2.3).

    Raises `PeerError`: unauthenticated without a token, and bad_message for two of them (section 2).
    """
    token = find_access_token(request.query)
    if token is None:
        return bearer_token(request)
    if request.header(b"authorization"):
        raise PeerError(ErrorCode.BAD_MESSAGE, f"both `Authorization` and `{ACCESS_TOKEN}`: send one token")
    if not token:
        raise PeerError(ErrorCode.UNAUTHENTICATED, f"`{ACCESS_TOKEN}` is empty")
    return token
