"""Parsing of broker URLs."""

from __future__ import annotations

import pytest

from catbus.client.broker_address import parse_address


@pytest.mark.parametrize(
    ("url", "host", "port", "target", "secure", "authority"),
    [
        ("ws://127.0.0.1:8080/ws", "127.0.0.1", 8080, "/ws", False, "127.0.0.1:8080"),
        ("ws://bus.example.com", "bus.example.com", 80, "/ws", False, "bus.example.com"),
        ("wss://bus.example.com", "bus.example.com", 443, "/ws", True, "bus.example.com"),
        ("wss://bus.example.com:80/", "bus.example.com", 80, "/", True, "bus.example.com:80"),
        ("WS://[::1]:8080/a/b?c=d", "::1", 8080, "/a/b?c=d", False, "[::1]:8080"),
    ],
)
def test_url_is_parsed(url: str, host: str, port: int, target: str, secure: bool, authority: str) -> None:
    address = parse_address(url)
    assert (address.host, address.port, address.target, address.secure) == (host, port, target, secure)
    assert address.authority == authority
    assert address.socket is None


@pytest.mark.parametrize(
    ("url", "socket", "target"),
    [("ws+unix:/run/bus.sock", "/run/bus.sock", "/ws"), ("ws+unix:/run/bus.sock:/other", "/run/bus.sock", "/other")],
)
def test_unix_socket_url_contains_a_path(url: str, socket: str, target: str) -> None:
    address = parse_address(url)
    assert (address.socket, address.target, address.authority) == (socket, target, "localhost")


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://example.com/ws", "begins with ws://"),
        ("example.com", "begins with ws://"),
        ("", "begins with ws://"),
        ("ws:///ws", "no host"),
        ("ws://a..b/ws", "not a valid host name"),
        ("ws://" + "x" * 64 + "/ws", "not a valid host name"),
        ("ws://host:99999/", "[Pp]ort"),
        ("ws://token@host/ws", "no user"),
        ("ws://host/ws#part", "no fragment"),
        ("ws://host/a b", "percent-encoded"),
        ("ws://host/ä", "percent-encoded"),
        ("ws+unix:relative.sock", "unix socket"),
        ("ws+unix://host/x", "unix socket"),
    ],
)
def test_invalid_url_is_a_value_error(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_address(url)
