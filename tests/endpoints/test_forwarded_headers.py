"""The scheme and the host that a client used, behind proxies."""

from __future__ import annotations

import pytest

from catbus.endpoints.http.forwarded_headers import forwarded_origin
from catbus.endpoints.http.http_request import HttpRequest

PLAIN, SECURE = False, True
HERE = "bus:8080"

CASES = {
    "nothing": ("", (PLAIN, HERE)),
    "X-Forwarded-Proto: http": ("", (PLAIN, HERE)),
    "X-Forwarded-Proto: https": ("", (SECURE, HERE)),
    "X-Forwarded-Proto: HTTPS": ("", (SECURE, HERE)),
    "X-Forwarded-Proto: wss": ("", (SECURE, HERE)),
    "X-Forwarded-Proto: ws": ("", (PLAIN, HERE)),
    "X-Forwarded-Proto: https, http": ("", (SECURE, HERE)),
    "X-Forwarded-Proto: http,https": ("", (PLAIN, HERE)),
    "X-Forwarded-Proto: gopher": ("", (PLAIN, HERE)),
    "X-Forwarded-Host: a.example": ("", (PLAIN, "a.example")),
    "X-Forwarded-Host: a.example:8443, b.example": ("", (PLAIN, "a.example:8443")),
    "X-Forwarded-Host: a/b": ("", (PLAIN, HERE)),
    "Forwarded: proto=https": ("", (SECURE, HERE)),
    "Forwarded: proto=https;host=a.example": ("", (SECURE, "a.example")),
    "Forwarded: Proto=HTTPS; Host=a.example": ("", (SECURE, "a.example")),
    'Forwarded: host="a.example:8443";proto="https"': ("", (SECURE, "a.example:8443")),
    'Forwarded: host="[2001:db8::1]:443";proto=wss': ("", (SECURE, "[2001:db8::1]:443")),
    "Forwarded: host=a.example:8443": ("without the quotes that belong there", (PLAIN, "a.example:8443")),
    'Forwarded: host="a\\.example"': ("an escape", (PLAIN, "a.example")),
    'Forwarded: for="a;proto=http,b\\"";proto=https': ("separators between quotes", (SECURE, HERE)),
    'Forwarded: for=192.0.2.60;proto=https;by=203.0.113.43, for="[2001:db8::1]";proto=http': ("", (SECURE, HERE)),
    "Forwarded: for=192.0.2.60, for=198.51.100.17;proto=https": ("only the second says it", (SECURE, HERE)),
    "Forwarded: ;;proto=https;,;": ("empty pairs", (SECURE, HERE)),
    "Forwarded: proto=https;proto=http": ("twice", (SECURE, HERE)),
    "Forwarded: host=a/b;proto=https": ("no host", (SECURE, HERE)),
    "Forwarded: proto=": ("no value", (PLAIN, HERE)),
    'Forwarded: proto=https;host="a': ("an open quote", (PLAIN, HERE)),
    "Forwarded: proto https": ("no pair", (PLAIN, HERE)),
    "Forwarded: proto = https": ("white space where none may be", (PLAIN, HERE)),
}


@pytest.mark.parametrize("said", CASES)
def test_origin_is_the_one_that_the_first_proxy_reports(said: str) -> None:
    name, _, value = said.partition(": ")
    request = HttpRequest("GET", "/", [(name.lower().encode(), value.encode())] if value else [], host=HERE)
    assert forwarded_origin(request, tls=False) == CASES[said][1]


def test_forwarded_header_has_precedence() -> None:
    headers = [(b"x-forwarded-proto", b"http"), (b"x-forwarded-host", b"b"), (b"forwarded", b"proto=https;host=a")]
    assert forwarded_origin(HttpRequest("GET", "/", headers, host=HERE), tls=False) == (SECURE, "a")
    assert forwarded_origin(HttpRequest("GET", "/", headers[:2], host=HERE), tls=True) == (PLAIN, "b")


def test_repeated_headers_form_one_list() -> None:
    headers = [(b"forwarded", b"for=a;proto=https"), (b"forwarded", b"for=b;proto=http")]
    assert forwarded_origin(HttpRequest("GET", "/", headers, host=HERE), tls=False) == (SECURE, HERE)


def test_tls_port_is_secure_without_a_header() -> None:
    assert forwarded_origin(HttpRequest("GET", "/", host=HERE), tls=True) == (SECURE, HERE)


def test_long_header_is_parsed_in_linear_time() -> None:
    for text in ("a" * 16_000, "a=" * 8_000, 'a="' + "\\" * 16_000, "a=b;" * 4_000 + '"', "a=b;" + " " * 16_000 + "x"):
        assert forwarded_origin(HttpRequest("GET", "/", [(b"forwarded", text.encode())], host=HERE), tls=False) == (
            PLAIN,
            HERE,
        )
