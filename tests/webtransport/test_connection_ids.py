"""Connection IDs that name a worker."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.webtransport import WebTransportConnection
from catbus.webtransport.connection_ids import ALL_CONNECTION_IDS, ConnectionIdShare
from catbus.webtransport.connectionless_packets import read_header
from tests.webtransport.simulated_link import CLIENT, Link, server_config


@given(st.integers(1, 128), st.data())
def test_named_id_is_in_one_share_and_keeps_its_other_bytes(count: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, count - 1))
    original = data.draw(st.binary(min_size=1, max_size=20))
    named = ConnectionIdShare(number, count).name(original)
    assert named[1:] == original[1:]
    assert [each for each in range(count) if named in ConnectionIdShare(each, count)] == [number]


@given(st.binary(min_size=1, max_size=20))
def test_server_without_workers_changes_no_id(connection_id: bytes) -> None:
    assert ALL_CONNECTION_IDS.name(connection_id) == connection_id
    assert connection_id in ALL_CONNECTION_IDS


@pytest.mark.parametrize("number", range(3))
def test_all_ids_of_a_connection_name_its_worker_also_after_changes(number: int) -> None:
    share = ConnectionIdShare(number, 3)
    link = Link()
    [first, *_] = link.client.it.datagrams_to_send(link.now)
    header = read_header(first[0])
    assert header is not None
    server = WebTransportConnection.server(server_config(), header.destination, share=share)
    link.server.connection = server
    seen: set[bytes] = set()
    server.receive_datagram(first[0], CLIENT, link.now)
    for _ in range(12):
        link.run(1)
        # The client asks for other IDs, and the server issues new ones for those that are retired.
        link.client.it._quic.change_connection_id()
        seen |= server.connection_ids
    issued = seen - {header.destination}
    assert len(issued) > 8
    assert all(each in share for each in issued)
    assert server._quic._local_initial_source_connection_id in share


def test_random_ids_are_spread_over_all_workers() -> None:
    counts = [0] * 3
    for _ in range(300):
        original = os.urandom(8)
        counts[next(each for each in range(3) if original in ConnectionIdShare(each, 3))] += 1
    assert min(counts) > 0
