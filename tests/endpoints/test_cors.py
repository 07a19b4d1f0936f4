"""catbus.endpoints.http.cors, and OPTIONS"""

from __future__ import annotations

import pytest

from catbus.config import Config, WebSocketSettings
from catbus.endpoints.http.cors import ANY_PAGE, NO_PAGE
from catbus.endpoints.http.routes import ROUTES
from tests.endpoints.fake_replica import FakeReplica
from tests.endpoints.raw_peer import Response
from tests.endpoints.test_http_connection import TOKEN, error_code, get, post, served

LISTED = "https://page.example"
OTHER = "https://evil.example"
OWN = "https://bus.example:8080"
"""The origin whose host is that of the requests."""
BODY = b'{"channel":"a.b","payload":1}'
PREFLIGHT = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization,content-type")


def replica(*origins: str) -> FakeReplica:
    return FakeReplica(Config(websocket=WebSocketSettings(allowed_origins=origins)))


async def respond(message: bytes, *origins: str, broker: FakeReplica | None = None) -> Response:
    """The response to a request, after which the connection answers another one."""
    async with served(broker or replica(*origins)) as it:
        await it.peer.send(message)
        response = await it.peer.response()
        if response.headers.get("connection") != "close":
            await it.peer.send(get("/health"))
            assert (await it.peer.response()).body == b"ok"
        return response


def cors(response: Response) -> dict[str, str]:
    prefix = "access-control-"
    return {
        name.removeprefix(prefix): value
        for name, value in response.headers.items()
        if name.startswith(prefix) or (name == "vary" and value != "accept-encoding")
    }


READABLE = {"allow-origin": LISTED, "allow-credentials": "true", "vary": "Origin", "expose-headers": "Retry-After"}
OPEN = {"allow-origin": "*", "expose-headers": "Retry-After"}


async def test_page_of_a_listed_origin_publishes_and_reads_the_response() -> None:
    broker = replica(LISTED)
    response = await respond(post("/publish", BODY, TOKEN, f"Origin: {LISTED}"), broker=broker)
    assert (response.status, cors(response)) == (200, READABLE)
    assert len(broker.published) == 1


async def test_page_reads_the_errors_of_its_requests() -> None:
    for path, status in (("/status", 401), ("/nothing", 404), ("/publish", 405)):
        response = await respond(get(path, f"Origin: {LISTED}"), LISTED)
        assert (response.status, cors(response)) == (status, READABLE)


async def test_page_of_another_origin_does_nothing() -> None:
    broker = replica(LISTED)
    for path, message in (
        ("/publish", post("/publish", BODY, TOKEN, f"Origin: {OTHER}", "Content-Type: text/plain")),
        ("/status", get("/status", TOKEN, f"Origin: {OTHER}")),
        ("/nothing", get("/nothing", f"Origin: {OTHER}")),
        ("/status", get("/status", *PREFLIGHT, f"Origin: {OTHER}", method="OPTIONS")),
    ):
        response = await respond(message, broker=broker)
        assert (response.status, error_code(response)) == (403, "unauthorized"), path
        assert cors(response) == {"vary": "Origin"}
    assert broker.published == []


async def test_without_a_list_pages_of_all_origins_are_allowed_without_credentials() -> None:
    response = await respond(post("/publish", BODY, TOKEN, f"Origin: {OTHER}"))
    assert (response.status, cors(response)) == (200, OPEN)


@pytest.mark.parametrize(
    "origin", ["null", "https://page.example.evil.example", "HTTPS://page.example", f"{LISTED}, {LISTED}", "é"]
)
async def test_origin_that_is_not_exactly_a_listed_one_is_rejected(origin: str) -> None:
    assert (await respond(get("/status", TOKEN, f"Origin: {origin}"), LISTED)).status == 403


@pytest.mark.parametrize(
    ("origin", "lines", "status"),
    [
        (OWN, (), 200),
        ("http://bus.example:8080", (), 200),
        (OTHER, ("Sec-Fetch-Site: same-origin",), 200),
        (OTHER, ("Sec-Fetch-Site: cross-site",), 403),
        (OWN, ("Sec-Fetch-Site: same-site",), 403),
        ("https://public.example", ("X-Forwarded-Host: public.example",), 200),
        ("https://public.example", ("Forwarded: host=public.example;proto=https",), 200),
        ("https://bus.example", (), 403),
        ("https://bus.example:8081", (), 403),
        ("null", (), 403),
    ],
)
async def test_page_of_the_same_origin_needs_no_place_in_the_list(
    origin: str, lines: tuple[str, ...], status: int
) -> None:
    response = await respond(post("/publish", BODY, TOKEN, f"Origin: {origin}", *lines), LISTED)
    assert response.status == status


async def test_request_that_is_not_from_a_page_is_allowed() -> None:
    response = await respond(post("/publish", BODY, TOKEN), LISTED)
    assert (response.status, cors(response)) == (200, {"vary": "Origin"})


@pytest.mark.parametrize("path", sorted(ROUTES))
async def test_every_path_answers_a_preflight_request(path: str) -> None:
    methods = ", ".join([*("GET, HEAD" if name == "GET" else name for name in ROUTES[path]), "OPTIONS"])
    for origins, origin in (((LISTED,), LISTED), ((), OTHER)):
        target = path.replace("{", "").replace("}", "")
        response = await respond(get(target, *PREFLIGHT, f"Origin: {origin}", method="OPTIONS"), *origins)
        assert (response.status, response.body, response.headers["allow"]) == (204, b"", methods)
        assert "content-length" not in response.headers
        assert "content-type" not in response.headers
        expected = OPEN if path in ANY_PAGE or not origins else READABLE
        if path in NO_PAGE:
            expected = {"vary": "Origin"}
        assert cors(response) == expected | {
            "allow-methods": methods,
            "allow-headers": "Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID",
            "max-age": "7200",
        }


async def test_options_names_the_methods_of_a_path() -> None:
    response = await respond(get("/publish", method="OPTIONS"))
    assert (response.status, response.headers["allow"]) == (204, "POST, OPTIONS")
    assert cors(response) == OPEN
    assert (await respond(get("/nothing", method="OPTIONS"))).status == 404


@pytest.mark.parametrize(("origins", "allowed"), [((LISTED,), "true"), ((), None)])
async def test_page_of_the_internet_reaches_a_private_network_if_its_origin_is_listed(
    origins: tuple[str, ...], allowed: str | None
) -> None:
    private = "Access-Control-Request-Private-Network: true"
    response = await respond(get("/publish", *PREFLIGHT, private, f"Origin: {LISTED}", method="OPTIONS"), *origins)
    assert response.headers.get("access-control-allow-private-network") == allowed


@pytest.mark.parametrize("path", sorted(ANY_PAGE))
async def test_public_path_is_for_pages_of_all_origins(path: str) -> None:
    response = await respond(get(path, f"Origin: {OTHER}"), LISTED)
    assert (response.status, cors(response)) == (200, OPEN)


async def test_page_does_not_read_the_metrics() -> None:
    for origins, origin in (((LISTED,), LISTED), ((), OTHER)):
        response = await respond(get("/metrics", f"Origin: {origin}"), *origins)
        assert cors(response) == {"vary": "Origin"}
