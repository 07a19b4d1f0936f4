"""The kernel's choice of a worker for each datagram, on real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from catbus.config import Config, WebTransportSettings
from catbus.errors import ConfigError
from catbus.processes.held_sockets import HeldSockets, open_held_sockets
from tests.endpoints.test_quic_endpoint import first_flight

WORKERS = 3


@pytest.fixture(params=["127.0.0.1", "[::1]", "0.0.0.0"])
def held(request: pytest.FixtureRequest, tmp_path: object) -> Iterator[HeldSockets]:
    with open_held_sockets(config(f"{request.param}:0"), WORKERS) as held:
        yield held


def config(bind: str) -> Config:
    # It is not read.
    return Config(
        websocket={"bind": ["127.0.0.1:0"]},  # type: ignore[arg-type]
        webtransport=WebTransportSettings(bind=(bind,), cert="cert", key="key"),
    )


def receivers(held: HeldSockets, *datagrams: bytes) -> list[int]:
    """The worker that receives each of the datagrams, sent from another port each."""
    found = []
    port = held.webtransport_port
    family = held.udp[0][0].family
    for data in datagrams:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.sendto(data, ("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
        arrived = [number for number in range(WORKERS) if _receive(held.udp[number][0]) == data]
        assert len(arrived) == 1
        found += arrived
    return found


def _receive(sock: socket.socket) -> bytes | None:
    try:
        return sock.recv(4096)
    except BlockingIOError:
        return None


def test_first_byte_of_the_connection_id_chooses_the_worker(held: HeldSockets) -> None:
    assert held.steered
    for first in range(256):
        connection_id = bytes([first]) + os.urandom(7)
        short = b"\x40" + connection_id + bytes(30)
        long = b"\xc0\x00\x00\x00\x01\x08" + connection_id + bytes(30)
        assert receivers(held, short, long, short) == [first % WORKERS] * 3


def test_short_datagrams_reach_a_worker(held: HeldSockets) -> None:
    assert receivers(held, b"\x40", b"\xc0\x00") == [0, 0]


def test_first_packets_of_clients_are_spread_and_repeated_to_one_worker(held: HeldSockets) -> None:
    flights = [first_flight("127.0.0.1:4433") for _ in range(40)]
    workers = [receivers(held, *flight) for flight in flights]
    assert all(len(set(each)) == 1 for each in workers)
    assert {each[0] for each in workers} == {0, 1, 2}


def test_sockets_of_another_broker_are_not_joined(held: HeldSockets) -> None:
    host, port = held.udp[0][0].getsockname()[:2]
    bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with pytest.raises(ConfigError, match="cannot listen on UDP"), open_held_sockets(config(bind), WORKERS):
        pass
