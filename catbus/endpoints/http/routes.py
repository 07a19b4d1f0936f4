"""What there is on the WebSocket port beside WebSocket: which path answers what."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import blake2b
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING

import msgspec

from ...auth.grants import Identity, client_of
from ...certificates import discovery
from ...errors import ErrorCode, PeerError, Unavailable
from ...log import Outcome, Rejected
from ...protocol import wire_messages as wire
from .forwarded_headers import origin_of

if TYPE_CHECKING:
    from ...replica import Replica

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


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A whole response."""

    status: int
    body: bytes
    headers: Headers = ()
    type: bytes = b"text/plain; charset=utf-8"


def line(status: int, text: str = "", headers: Headers = ()) -> HttpResponse:
    """An answer of one plain line: `text`, or what the status is called."""
    return HttpResponse(status, (text or HTTPStatus(status).phrase.lower()).encode() + b"\n", headers)


def json(value: object, status: int = 200, headers: Headers = ()) -> HttpResponse:
    """An answer in JSON, on one line."""
    return HttpResponse(status, wire.to_json(value) + b"\n", headers, b"application/json")


Handler = Callable[["Replica", HttpRequest], Awaitable[HttpResponse]]


async def health(replica: Replica, request: HttpRequest) -> HttpResponse:
    """Alive, whatever else may be wrong. Exactly `ok`, which programs compare it with."""
    return HttpResponse(200, b"ok")


async def ready(replica: Replica, request: HttpRequest) -> HttpResponse:
    """Whether new clients should be sent here.

    A database that is away does not change that, nor does a hole in the log: all replicas share them, and taking all of
    them out of service would make an outage of a pause.
    """
    match replica.readiness:
        case "ready":
            return line(200, "ready")
        case "degraded":
            return line(200, f"degraded: {replica.log.trouble}")
        case other:
            return line(503, other)


async def metrics(replica: Replica, request: HttpRequest) -> HttpResponse:
    """What is counted and measured, for Prometheus."""
    if replica.scrape is None:
        return line(503, "not open yet")
    body, content_type = replica.scrape()
    return HttpResponse(200, body, type=content_type.encode())


async def script(replica: Replica, request: HttpRequest) -> HttpResponse:
    """A module of the JavaScript client, for pages anywhere.

    A browser asks each time whether it has the present one: modules of two releases do not go together.
    """
    body, tag = _scripts()[request.path]
    headers = [(b"access-control-allow-origin", b"*"), (b"cache-control", b"no-cache"), (b"etag", tag)]
    known = [each.strip().removeprefix(b"W/") for each in request.header(b"if-none-match").split(b",")]
    if tag in known or known == [b"*"]:
        return HttpResponse(304, b"", headers)
    return HttpResponse(200, body, headers, b"text/javascript; charset=utf-8")


@cache
def _scripts() -> dict[str, tuple[bytes, bytes]]:
    """The modules of the JavaScript client by path, each with its entity tag: the first, and those that it imports."""
    static = resources.files("catbus") / "static"
    files = {"/catbus.js": static / "catbus.js"}
    files |= {f"/catbus/{file.name}": file for file in (static / "catbus").iterdir() if file.name.endswith(".js")}
    bodies = {path: file.read_bytes() for path, file in files.items()}
    return {path: (body, b'"%b"' % blake2b(body, digest_size=12).hexdigest().encode()) for path, body in bodies.items()}


async def status(replica: Replica, request: HttpRequest) -> HttpResponse:
    """How this replica is, for who may read everything."""
    try:
        identity = await replica.authenticate(_bearer(request), request.network)
        if not identity.grants.may_read("*"):
            raise PeerError(ErrorCode.UNAUTHORIZED, "only who may read `*` is told")
    except PeerError as error:
        return _refusal(replica, error)
    return json(replica.report(), headers=[(b"cache-control", b"no-store")])


async def discover(replica: Replica, request: HttpRequest) -> HttpResponse:
    """Where the other ways in are, by the name under which this one was reached."""
    secure, host = origin_of(request, tls=replica.config.websocket.tls)
    if not host:
        return line(400, "the request does not say which host it is for")
    made = None if replica.certificates is None else replica.certificates.self_made(datetime.now(UTC))
    return json(
        discovery(host, replica.webtransport_port, made, secure=secure),
        headers=[(b"access-control-allow-origin", b"*"), (b"cache-control", b"no-store")],
    )


async def websocket(replica: Replica, request: HttpRequest) -> HttpResponse:
    """A plain request where there is only WebSocket."""
    return UPGRADE_REQUIRED


UPGRADE_REQUIRED = line(
    426,
    "this is a WebSocket endpoint",
    [(b"upgrade", b"websocket"), (b"connection", b"upgrade"), (b"sec-websocket-version", b"13")],
)

CROWDED = json(
    {"error": "this address has too many connections (limits.address_connections)", "code": ErrorCode.OVERLOADED},
    429,
    [(b"retry-after", b"5")],
)

# POST /publish

STATUSES = {
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.AUTH_TIMEOUT: 408,
    ErrorCode.TOKEN_EXPIRED: 401,
    ErrorCode.TOKEN_NOT_VALID_YET: 503,
    ErrorCode.UNAUTHORIZED: 403,
    ErrorCode.REVOKED: 403,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.LIMIT: 429,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.UNKNOWN: 504,
    ErrorCode.SHUTTING_DOWN: 503,
    ErrorCode.INTERNAL: 500,
}
"""What a refusal is in HTTP, where it is not 400."""


async def publish(replica: Replica, request: HttpRequest) -> HttpResponse:
    """Publish the message in the body, or all of an array of them, in order.

    One that is refused says so in its place, and the status is that of the first of those; the others are published.
    """
    try:
        token = _bearer(request)
        identity = await replica.authenticate(token, request.network)
        single, items = _split(await request.read(), replica.config.limits.pending_publishes)
        wanted = [_decode(item, replica.config.limits.message_size) for item in items]
        requests = [item for item in wanted if isinstance(item, wire.Publish)]
        client = client_of(identity, token, request.network)
        outcomes = iter(await replica.publish(identity, requests, _producer(request, identity), client))
    except (PeerError, Unavailable) as error:
        return _refusal(replica, error)
    results: list[dict[str, object]] = []
    refusals: list[ErrorCode] = []
    for item in wanted:
        outcome = Rejected(item.code, item.message) if isinstance(item, PeerError) else next(outcomes)
        if isinstance(outcome, Rejected):
            refusals.append(outcome.code)
            replica.runtime_statistics.refused(outcome.code)
        results.append(_result(item, outcome))
    status = STATUSES.get(refusals[0], 400) if refusals else 200
    return json(results[0] if single else results, status, _advice(status))


def _bearer(request: HttpRequest) -> str:
    scheme, _, token = request.header(b"authorization").partition(b" ")
    if scheme.lower() != b"bearer" or not token.strip():
        raise PeerError(ErrorCode.UNAUTHENTICATED, "a token is needed: `Authorization: Bearer ...`")
    return token.strip().decode("latin-1")


def _producer(request: HttpRequest, identity: Identity) -> bytes:
    """Whom a request with an `Idempotency-Key` publishes for: the same one whenever the same client repeats the key."""
    key = request.header(b"idempotency-key")
    if len(key) > 255:
        raise PeerError(ErrorCode.BAD_MESSAGE, "an Idempotency-Key has at most 255 bytes")
    subject = (identity.client_id or "").encode()
    return blake2b(key + b"\0" + subject, digest_size=16, person=b"catbus publish").digest() if key else b""


def _split(body: bytes, most: int) -> tuple[bool, Sequence[bytes | msgspec.Raw]]:
    """Whether the body is a single message, and the messages in it; raises `PeerError`."""
    if not body.lstrip(b" \t\r\n").startswith(b"["):
        return True, [body]
    try:
        items = msgspec.json.decode(body, type=list[msgspec.Raw])
    except wire.UNDECODABLE as error:
        raise wire.refusal(error) from None
    if len(items) > most:
        raise PeerError(ErrorCode.TOO_LARGE, f"at most {most} messages in a request")
    return False, items


def _decode(item: bytes | msgspec.Raw, limit: int) -> wire.Publish | PeerError:
    data = bytes(item)
    if len(data) > limit:
        return PeerError(ErrorCode.TOO_LARGE, f"a message may have at most {limit} bytes")
    try:
        return wire.decode_publish(data)
    except wire.UNDECODABLE as error:
        return wire.refusal(error)


def _result(item: wire.Publish | PeerError, outcome: Outcome | None) -> dict[str, object]:
    if isinstance(outcome, Rejected):
        return {"error": outcome.message, "code": outcome.code}
    assert isinstance(item, wire.Publish)
    if outcome is None:
        return {"channel": item.channel}
    result: dict[str, object] = {"seq": outcome.seq, "channel": item.channel}
    return {**result, "duplicate": True} if outcome.duplicate else result


def _refusal(replica: Replica, error: PeerError | Unavailable) -> HttpResponse:
    code = error.code if isinstance(error, PeerError) else ErrorCode.UNAVAILABLE
    replica.runtime_statistics.refused(code)
    status = STATUSES.get(code, 400)
    wait = error.retry_after if isinstance(error, PeerError) else None
    return json({"error": str(error), "code": code}, status, _advice(status, wait or 1.0))


def _advice(status: int, wait: float = 1.0) -> Headers:
    """`wait`: for how many seconds the same would be refused again."""
    match status:
        case 401:
            return [(b"www-authenticate", b'Bearer realm="catbus"')]
        case 429 | 503:
            return [(b"retry-after", b"%d" % math.ceil(wait))]
        case _:
            return ()


ROUTES: dict[str, dict[str, Handler]] = {
    "/health": {"GET": health},
    "/ready": {"GET": ready},
    "/status": {"GET": status},
    "/metrics": {"GET": metrics},
    "/catbus.js": {"GET": script},
    "/.well-known/catbus": {"GET": discover},
    "/publish": {"POST": publish},
    "/ws": {"GET": websocket},
}


def route_of(path: str) -> str | None:
    """The route that serves a path; all modules of the JavaScript client have one."""
    if path in ROUTES:
        return path
    return "/catbus.js" if path in _scripts() else None


def find(method: str, path: str) -> Handler | HttpResponse:
    """Who answers a request, or the answer if there is nobody. What can be asked for with GET can be with HEAD."""
    route = route_of(path)
    methods = None if route is None else ROUTES[route]
    if methods is None:
        return line(404)
    handler = methods.get("GET" if method == "HEAD" else method)
    if handler is None:
        allowed = ", ".join("GET, HEAD" if name == "GET" else name for name in methods)
        return line(405, headers=[(b"allow", allowed.encode())])
    return handler
