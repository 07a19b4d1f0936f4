"""One HTTP request: its head, and the way to its body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ...errors import ErrorCode, PeerError

Headers = Sequence[tuple[bytes, bytes]]


async def _nothing() -> bytes:
    return b""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """The head of a request, and the way to its body. Header names are in lower case."""

    method: str
    path: str
    headers: Headers = ()
    version: bytes = b"1.1"
    host: str = ""
    """The name and port that the client asks for; empty where HTTP/1.0 does not say."""
    network: str = ""
    """Where the client is: see `network_of`."""
    read: Callable[[], Awaitable[bytes]] = _nothing
    """Reads the body, once. Nothing is kept of a body that is not asked for: see first who sends it."""

    @property
    def has_body(self) -> bool:
        """Whether the head announces a body that is not empty."""
        return bool(self.header(b"transfer-encoding")) or self.header(b"content-length") not in (b"", b"0")

    def header(self, name: bytes) -> bytes:
        """The value of a header, empty if there is none; several are joined by commas."""
        return b", ".join(value for key, value in self.headers if key == name)


def bearer_token(request: HttpRequest) -> str:
    scheme, _, token = request.header(b"authorization").partition(b" ")
    if scheme.lower() != b"bearer" or not token.strip():
        raise PeerError(ErrorCode.UNAUTHENTICATED, "a token is needed: `Authorization: Bearer ...`")
    return token.strip().decode("latin-1")
