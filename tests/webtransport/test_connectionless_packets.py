"""catbus.webtransport.connectionless_packets"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.webtransport import SessionOpened, Terminated, WebTransportConnection
from catbus.webtransport.connectionless_packets import (
    VERSIONS,
    PacketHeader,
    encode_retry,
    encode_stateless_reset,
    encode_version_negotiation,
    read_header,
)
from tests.webtransport.simulated_link import CLIENT, SERVER, Link, client_config, server_config


def first_initial() -> tuple[WebTransportConnection, bytes]:
    connection = WebTransportConnection.client(client_config(), SERVER, 0.0, authority="localhost")
    [(data, to)] = connection.datagrams_to_send(0.0)
    assert to == SERVER
    return connection, data


def test_initial_packet_of_a_client_is_read() -> None:
    connection, data = first_initial()
    header = read_header(data)
    assert header is not None
    assert header.is_initial and header.is_supported_version and not header.is_version_negotiation
    assert len(data) >= 1200
    assert {header.source} == connection.connection_ids
    assert header.version == VERSIONS[0]
    assert header.token == b""


@given(st.binary(max_size=100))
def test_arbitrary_bytes_raise_nothing(data: bytes) -> None:
    header = read_header(data)
    assert header is None or len(header.destination) <= 255


def test_short_header_is_read() -> None:
    assert read_header(b"\x40" + b"12345678" + b"rest") == PacketHeader(None, False, b"12345678", b"", b"")
    assert read_header(b"\x40" + b"1234567") is None
    assert read_header(b"\x00" + b"12345678" + b"rest") is None


def test_unknown_version_gets_a_version_negotiation_packet() -> None:
    strange = b"\xc0" + b"\x1a\x2a\x3a\x4a" + b"\x03abc" + b"\x02de" + bytes(1200)
    header = read_header(strange)
    assert header is not None
    assert not header.is_supported_version and not header.is_initial and not header.is_version_negotiation
    answer = read_header(encode_version_negotiation(header))
    assert answer is not None
    assert answer.is_version_negotiation
    assert (answer.destination, answer.source) == (b"de", b"abc")


def test_client_connects_again_after_a_retry() -> None:
    connection, data = first_initial()
    header = read_header(data)
    assert header is not None
    connection.receive_datagram(encode_retry(header, b"newplace", b"token"), SERVER, 0.1)
    [(again, _)] = connection.datagrams_to_send(0.1)
    second = read_header(again)
    assert second is not None
    assert (second.token, second.destination) == (b"token", b"newplace")

    server = WebTransportConnection.server(server_config(), header.destination, retry_source=b"newplace")
    assert b"newplace" in server.connection_ids
    link = Link(connect=False)
    link.now = 0.2
    link.client.connection, link.server.connection = connection, server
    link.arrive(SERVER, again)
    link.until(lambda: link.client.saw(SessionOpened))


def test_stateless_reset_ends_a_client_connection_immediately() -> None:
    link = Link(connect=False)
    connection, data = first_initial()
    header = read_header(data)
    assert header is not None
    link.client.connection, link.now = connection, 0.1
    link.server.connection = WebTransportConnection.server(
        server_config(), header.destination, reset_token=lambda connection_id: connection_id * 2
    )
    link.arrive(SERVER, data)
    link.open()
    link.run(1)
    used = link.client.it._quic._peer_cid.cid
    for one in link.client.it._quic._peer_cid_available:
        assert one.stateless_reset_token == one.cid * 2
    wrong = encode_stateless_reset(b"x" * 16, 100)
    right = encode_stateless_reset(used * 2, 100)
    assert wrong is not None and right is not None
    link.client.it.receive_datagram(wrong, SERVER, link.now)
    link.flush()
    assert link.client.lost is None
    link.client.it.receive_datagram(right, SERVER, link.now)
    link.flush()
    assert link.client.lost == "the server no longer knows this connection"
    assert link.client.saw(Terminated)
    assert link.client.it.timer is None


@pytest.mark.parametrize(("size", "length"), [(21, None), (22, 21), (44, 43), (1200, 43)])
def test_stateless_reset_is_smaller_than_its_packet(size: int, length: int | None) -> None:
    packet = encode_stateless_reset(b"t" * 16, size)
    assert (packet and len(packet)) == length
    if packet:
        assert packet.endswith(b"t" * 16)
        assert packet[0] & 0xC0 == 0x40


def test_server_ignores_a_stateless_reset() -> None:
    link = Link().open()
    link.server.it.receive_datagram(encode_stateless_reset(bytes(16), 100) or b"", CLIENT, link.now)
    link.flush()
    assert link.server.lost is None
