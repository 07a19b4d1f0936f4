"""The addresses of clients, directly and behind trusted proxies."""

from __future__ import annotations

import time

import pytest

from catbus.endpoints.http.http_request import HttpRequest
from catbus.endpoints.trusted_proxies import UNKNOWN_ADDRESS, ClientAddress, TrustedProxies

PROXY = ClientAddress("10.0.0.1", "")
CLIENT = ClientAddress("198.51.100.7", "198.51.100.7")
SIXTH = ClientAddress("2001:db8:1:2::/64", "2001:db8:1:2::/64")

CASES = {
    "": PROXY,
    "X-Forwarded-For: 198.51.100.7": CLIENT,
    "X-Forwarded-For: 198.51.100.7:4711": CLIENT,
    "X-Forwarded-For: ::ffff:198.51.100.7": CLIENT,
    "X-Forwarded-For: 203.0.113.9, 198.51.100.7": CLIENT,
    "X-Forwarded-For: 203.0.113.9,10.9.9.9,198.51.100.7 , 10.2.3.4": CLIENT,
    "X-Forwarded-For: 198.51.100.7, fd00::3": CLIENT,
    "X-Forwarded-For: <script>, 198.51.100.7": CLIENT,
    "X-Forwarded-For: , 198.51.100.7": CLIENT,
    "X-Forwarded-For: 2001:db8:1:2::7": SIXTH,
    "X-Forwarded-For: [2001:db8:1:2::7]": SIXTH,
    "X-Forwarded-For: [2001:db8:1:2::7]:443": SIXTH,
    "X-Forwarded-For: 203.0.113.9, unknown": PROXY,
    "X-Forwarded-For: 203.0.113.9, unknown, 10.2.3.4": PROXY,
    "X-Forwarded-For: 198.51.100.7,": PROXY,
    "X-Forwarded-For: 198.51.100.700": PROXY,
    "X-Forwarded-For: 198.51.100.7/32": PROXY,
    "X-Forwarded-For: 10.2.3.4": ClientAddress("10.2.3.4", ""),
    "X-Forwarded-For: 203.0.113.9" + ", 10.2.3.4" * 32: ClientAddress("10.2.3.4", ""),
    "Forwarded: for=198.51.100.7": CLIENT,
    "Forwarded: For=198.51.100.7;proto=https;by=10.0.0.1": CLIENT,
    'Forwarded: for="198.51.100.7:4711"': CLIENT,
    'Forwarded: for="[2001:db8:1:2::7]:4711"': SIXTH,
    "Forwarded: for=203.0.113.9, for=198.51.100.7": CLIENT,
    'Forwarded: for="203.0.113.9, for=198.51.100.7': CLIENT,
    'Forwarded: for="a\\", for=198.51.100.7, for=10.2.3.4': CLIENT,
    "Forwarded: for=203.0.113.9, for=_hidden": PROXY,
    "Forwarded: for=203.0.113.9, proto=https": PROXY,
    'Forwarded: for="198.51.100.7': PROXY,
}


def asking(*headers: str) -> HttpRequest:
    pairs = [header.partition(": ") for header in headers if header]
    return HttpRequest("GET", "/", [(name.lower().encode(), value.encode()) for name, _, value in pairs])


@pytest.mark.parametrize("header", CASES, ids=lambda header: header[:60])
def test_client_is_the_last_address_that_is_not_a_trusted_proxy(header: str) -> None:
    proxies = TrustedProxies(["10.0.0.0/8", "fd00::/8"])
    assert proxies.client_address("10.0.0.1", asking(header)) == CASES[header]
    assert proxies.client_address("::ffff:10.0.0.1", asking(header)) == CASES[header]


def test_forwarded_header_is_ignored_beside_x_forwarded_for() -> None:
    request = asking("Forwarded: for=203.0.113.9", "X-Forwarded-For: 203.0.113.10", "X-Forwarded-For: 198.51.100.7")
    assert TrustedProxies(["10.0.0.0/8"]).client_address("10.0.0.1", request) == CLIENT


@pytest.mark.parametrize("header", ["X-Forwarded-For: 203.0.113.9", "Forwarded: for=203.0.113.9"])
def test_untrusted_proxy_is_ignored_and_logged_once(header: str, caplog: pytest.LogCaptureFixture) -> None:
    proxies = TrustedProxies(["10.0.0.0/8"])
    for _ in range(3):
        assert proxies.client_address("198.51.100.7", asking(header)) == CLIENT
        assert proxies.client_address("127.0.0.1", asking(header)) == ClientAddress("127.0.0.1", "")
        assert proxies.client_address("", asking(header)) == UNKNOWN_ADDRESS
    assert len(caplog.records) == 1
    assert "websocket.trusted_proxies" in caplog.text


def test_loopback_has_no_limit_and_may_be_a_trusted_proxy() -> None:
    assert TrustedProxies([]).connection_address("127.0.0.5") == ClientAddress("127.0.0.5", "")
    assert TrustedProxies([]).connection_address("::1").limited_network == ""
    assert TrustedProxies(["127.0.0.1"]).client_address("127.0.0.1", asking("X-Forwarded-For: 198.51.100.7")) == CLIENT


def test_long_header_is_parsed_in_linear_time() -> None:
    proxies = TrustedProxies(["10.0.0.0/8"])
    began = time.process_time()
    for value in ("10.0.0.1," * 1700, "[" * 16_000, "1." * 8_000, '"' * 16_000, 'for="' * 3000, "for=a;" * 2700):
        for name in ("X-Forwarded-For", "Forwarded"):
            proxies.client_address("10.0.0.1", asking(f"{name}: {value}"))
    assert time.process_time() - began < 5
