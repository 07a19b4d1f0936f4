"""Hostile peers: their connection ends or their resources are bounded, and no method raises."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
from aioquic.buffer import encode_uint_var
from aioquic.quic.packet import QuicErrorCode
from aioquic.tls import Epoch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from catbus.webtransport import (
    ConnectionLimits,
    SessionOpened,
    SessionRequested,
    StreamData,
    StreamReset,
    Terminated,
    WebTransportConnection,
)
from catbus.webtransport.connectionless_packets import MAX_PACKET_SIZE
from catbus.webtransport.http3_connection import PROTOCOL_TOKEN_DRAFT_15
from catbus.webtransport.http3_error_codes import Http3ErrorCode
from catbus.webtransport.quic_connection import MAX_RECEIVED_RANGES
from tests.hostile.packets import one_rtt as packet
from tests.webtransport.simulated_link import CLIENT, Link, client_config, server_config

FEW = settings(max_examples=settings().max_examples * 3 // 10, suppress_health_check=[HealthCheck.too_slow])
v = encode_uint_var


def raw(connection: WebTransportConnection) -> Any:
    """The QUIC connection, to send frames that this code does not send."""
    return connection._quic


def send_raw(link: Link, data: bytes, *, unidirectional: bool, end: bool = False) -> int:
    """Open a stream of the client with exactly these bytes."""
    quic = raw(link.client.it)
    stream: int = quic.get_next_available_stream_id(is_unidirectional=unidirectional)
    quic.send_stream_data(stream, data, end)
    return stream


def ended_with(link: Link, code: int) -> bool:
    """Whether the server has closed the connection with this code."""
    ending = raw(link.server.it)._close_event
    return ending is not None and ending.error_code == code


# Random bytes.


@FEW
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from([b"", *[v(kind) for kind in (0, 1, 2, 3, 4, 5, 7, 13, 0x21, 0x41, 0x54, 0x2843)], b"\x40"]),
            st.binary(max_size=60),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
@example([(False, v(1), v(3) + b"\xff\xff\xff", False)])
@example([(True, v(0x54), b"\x01", True), (False, v(0x41), b"\x07", True)])
def test_random_bytes_on_any_stream_raise_nothing(streams: list[tuple[bool, bytes, bytes, bool]]) -> None:
    link = Link().open()
    for unidirectional, kind, garbage, end in streams:
        send_raw(link, kind + garbage, unidirectional=unidirectional, end=end)
    link.run(1)
    assert not link.server.it._failed
    if link.server.lost is None:
        stream = link.client.it.open_stream(bidirectional=True)
        assert stream is not None
        link.client.it.send(stream, b"still here", end=True)
        link.until(lambda: stream in link.server.ended)
    else:
        link.until(lambda: link.server.saw(Terminated))


@FEW
@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=5), st.booleans())
def test_packets_of_random_frames_raise_nothing(payloads: list[bytes], to_server: bool) -> None:
    link = Link().open()
    link.run(0.1)
    end, other = (link.server, link.client) if to_server else (link.client, link.server)
    for payload in payloads:
        end.it.receive_datagram(packet(other.it._quic, payload), other.address, link.now)
    link.run(100)
    assert not end.it._failed


@FEW
@given(st.binary(max_size=100), st.booleans())
def test_random_bytes_after_the_reply_raise_nothing(garbage: bytes, end: bool) -> None:
    link = Link().open()
    raw(link.server.it).send_stream_data(0, garbage, end)
    raw(link.client.it).send_stream_data(0, garbage, end)
    link.run(1)
    assert not link.server.it._failed and not link.client.it._failed


@pytest.mark.parametrize("method", ["receive_datagram", "handle_timer", "datagrams_to_send"])
def test_internal_error_ends_one_connection(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link().open()

    def fails(*args: object, **kwargs: object) -> None:
        raise KeyError("aioquic")

    monkeypatch.setattr(link.server.it._quic, method, fails)
    link.client.it.ping()
    link.run(120)
    assert link.server.lost == "internal error: KeyError"
    assert len([event for event in link.server.events if isinstance(event, Terminated)]) == 1
    assert link.client.lost


def test_connection_that_fails_repeatedly_terminates(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link().open()

    def fails(*args: object, **kwargs: object) -> None:
        raise KeyError("aioquic")

    for method in ("receive_datagram", "datagrams_to_send"):
        monkeypatch.setattr(link.server.it._quic, method, fails)
    link.server.it.receive_datagram(b"\x40", CLIENT, link.now)
    assert link.server.it.datagrams_to_send(link.now) == []
    link.server.take(link.now)
    assert link.server.saw(Terminated)
    assert link.server.it.timer is None
    link.server.it.receive_datagram(b"\x40", CLIENT, link.now)
    link.server.it.handle_timer(link.now)


def test_invalid_first_packet_opens_nothing() -> None:
    connection = WebTransportConnection.server(server_config(), b"12345678")
    assert connection.timer is None
    assert connection.datagrams_to_send(0.0) == []
    connection.handle_timer(0.0)
    connection.receive_datagram(b"\xc0\0\0\0\1\x0812345678\0\0\x44\x00" + bytes(1200), CLIENT, 1.0)
    assert connection.datagrams_to_send(1.0) == []
    assert connection.timer == 1.0 + ConnectionLimits().silence_timeout
    connection.handle_timer(11.0)
    events = list(connection.events())
    assert [type(event).__name__ for event in events] in (["ConnectionLost", "Terminated"], ["ConnectionLost"])
    connection.datagrams_to_send(11.0)
    while (at := connection.timer) is not None:
        assert at < 20
        connection.handle_timer(at)
        connection.datagrams_to_send(at)


def test_connection_closed_before_the_handshake_terminates() -> None:
    connection = WebTransportConnection.server(server_config(), b"12345678")
    connection.close()
    assert [type(event).__name__ for event in connection.events()] == ["ConnectionLost", "Terminated"]
    assert connection.timer is None


def test_oversized_datagram_is_not_processed(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link().open()
    seen: list[int] = []
    monkeypatch.setattr(link.server.it._quic, "receive_datagram", lambda data, *_: seen.append(len(data)))
    for size in (MAX_PACKET_SIZE, MAX_PACKET_SIZE + 1, 65507):
        link.server.it.receive_datagram(bytes(size), CLIENT, link.now)
    assert seen == [MAX_PACKET_SIZE]


# Requests.


def test_other_request_gets_status_404() -> None:
    link = Link().open()
    http3 = link.client.it._connect_stream.http3
    assert http3 is not None
    seen: list[Any] = []
    handle = link.client.it._demultiplexer._handle_http3
    link.client.it._demultiplexer._handle_http3 = lambda event: (seen.append(event), handle(event))  # type: ignore[assignment, func-returns-value]
    for _ in range(40):
        quic = raw(link.client.it)
        stream = quic.get_next_available_stream_id()
        http3.send_headers(
            stream,
            [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"x"), (b":path", b"/")],
            end_stream=True,
        )
        link.client.it._streams.register(stream)
        link.run(0.1)
    assert [dict(event.headers)[b":status"] for event in seen if hasattr(event, "headers")] == [b"404"] * 40
    assert len(link.server.it._streams) < 10
    server_http3 = link.server.it._connect_stream.http3
    assert server_http3 is not None
    assert len(server_http3._stream) < 10
    assert link.server.it.session_open


@pytest.mark.parametrize("token", [b"webtransport", b"webtransport-h3"])
def test_second_session_is_refused(token: bytes) -> None:
    link = Link().open()
    http3 = link.client.it._connect_stream.http3
    assert http3 is not None
    for _ in range(40):
        stream = raw(link.client.it).get_next_available_stream_id()
        headers = [(b":method", b"CONNECT"), (b":scheme", b"https"), (b":authority", b"x"), (b":path", b"/")]
        http3.send_headers(stream, [*headers, (b":protocol", token)])
        link.client.it._streams.register(stream)
        link.run(0.1)
    assert len(link.server.saw(SessionRequested)) == 1
    assert link.server.it.session_open and link.client.it.session_open
    server_http3 = link.server.it._connect_stream.http3
    assert server_http3 is not None
    assert len(server_http3._stream) < 10
    assert len(link.server.it._streams) < 10


@pytest.mark.parametrize("prefix", [v(1), v(0x40), v(0)], ids=["headers", "unknown frame", "data"])
def test_frame_with_a_huge_length_closes_the_connection(prefix: bytes) -> None:
    link = Link().open()
    quic = raw(link.client.it)
    stream = send_raw(link, prefix + v(2**40), unidirectional=False)
    for _ in range(100):
        quic.send_stream_data(stream, bytes(4000))
        link.run(0.1)
        http3 = link.server.it._connect_stream.http3
        assert http3 is not None
        assert sum(len(one.buffer) for one in http3._stream.values()) <= 32 * 1024
    # An unknown frame is skipped (RFC 9114 section 9). The others are errors.
    assert (link.server.lost is None) == (prefix == v(0x40))


def test_settings_with_a_huge_length_close_the_connection() -> None:
    link = Link().open()
    server_http3 = link.server.it._connect_stream.http3
    assert server_http3 is not None
    server_http3._settings_received = False
    raw(link.client.it).send_stream_data(2, v(4) + v(2**40) + bytes(40_000))
    link.until(lambda: link.server.lost)
    assert ended_with(link, Http3ErrorCode.EXCESSIVE_LOAD)


def test_small_headers_do_not_expand_to_large_ones() -> None:
    """Make a QPACK bomb: an entry of 4 KB in the dynamic table, then one byte per reference to it."""
    link = Link().open()
    # Set Dynamic Table Capacity 4096 on the encoder stream, the client's third stream.
    raw(link.client.it).send_stream_data(6, b"\x3f\xe1\x1f")
    link.until(lambda: link.server.lost)
    assert ended_with(link, 0x201)


def test_push_is_refused() -> None:
    link = Link().open()
    quic = raw(link.server.it)
    quic.send_stream_data(quic.get_next_available_stream_id(is_unidirectional=True), v(1) + v(0))
    link.until(lambda: link.client.lost)
    assert raw(link.client.it)._close_event.error_code == Http3ErrorCode.ID_ERROR


def test_request_from_a_server_is_refused() -> None:
    link = Link().open()
    quic = raw(link.server.it)
    quic.send_stream_data(quic.get_next_available_stream_id(), v(1) + v(0))
    link.until(lambda: link.client.lost)
    assert raw(link.client.it)._close_event.error_code == Http3ErrorCode.STREAM_CREATION_ERROR


@pytest.mark.parametrize("unidirectional", [True, False])
def test_invalid_session_id_closes_the_connection(unidirectional: bool) -> None:
    link = Link().open()
    send_raw(link, v(0x54 if unidirectional else 0x41) + v(3), unidirectional=unidirectional)
    link.until(lambda: link.server.lost)
    assert ended_with(link, Http3ErrorCode.ID_ERROR)


@pytest.mark.parametrize("unidirectional", [True, False])
def test_stream_of_another_session_is_refused(unidirectional: bool) -> None:
    link = Link().open()
    stream = send_raw(link, v(0x54 if unidirectional else 0x41) + v(400) + b"x" * 1000, unidirectional=unidirectional)
    link.run(1)
    assert not link.server.saw(StreamData)
    assert raw(link.client.it)._streams.get(stream) is None or raw(link.client.it)._streams[stream].sender.is_finished
    assert link.server.it._streams.get(stream) is None
    assert link.server.it.session_open


def test_streams_of_unknown_types_are_refused_and_dropped() -> None:
    link = Link().open()
    quic = raw(link.client.it)
    for number in range(50):
        stream = send_raw(link, v(0x21 + 0x1F * number) + bytes(20_000), unidirectional=True)
        link.run(0.3)
        assert quic._streams.get(stream) is None, "stopped, and so reset"
    assert link.server.it.session_open
    assert len(link.server.it._streams) < 10
    assert not link.server.saw(StreamData) and not link.server.saw(StreamReset)


# Data before the session.


def early_link(limits: ConnectionLimits | None = None) -> Link:
    """Make a link whose client has not sent its request, so that its streams arrive before it."""
    link = Link(
        server=server_config(limits or ConnectionLimits(session_timeout=1000)),
        client=client_config(ConnectionLimits(session_timeout=1000)),
    )
    demultiplexer = link.client.it._demultiplexer
    wanted, demultiplexer._session_request = demultiplexer._session_request, None
    link.client.it._deadline = 2000.0
    link.run(1)
    assert wanted is not None
    # The request gets stream id 0, which must be allocated before the others.
    raw(link.client.it)._local_next_stream_id_bidi = 4
    link.late = lambda: request(link, *wanted)  # type: ignore[attr-defined]
    return link


def request(link: Link, *wanted: Any) -> None:
    quic = raw(link.client.it)
    after, quic._local_next_stream_id_bidi = quic._local_next_stream_id_bidi, 0
    link.client.it._connect_stream.request(PROTOCOL_TOKEN_DRAFT_15, *wanted)
    quic._local_next_stream_id_bidi = after


def test_streams_before_their_session_are_buffered() -> None:
    link = early_link()
    send_raw(link, v(0x54) + v(0) + b"early", unidirectional=True, end=True)
    send_raw(link, v(0x54) + v(8) + b"another's", unidirectional=True, end=True)
    link.run(1)
    assert not link.server.saw(StreamData)
    link.late()  # type: ignore[attr-defined]
    link.until(lambda: link.client.saw(SessionOpened))
    link.run(1)
    assert [event.data for event in link.server.saw(StreamData)] == [b"early"]
    types = [type(event) for event in link.server.events if not type(event).__name__.startswith("Id")]
    assert types.index(SessionRequested) < types.index(StreamData)
    assert link.server.it.unconsumed == 0


def test_buffer_before_a_session_is_bounded() -> None:
    link = early_link(ConnectionLimits(session_timeout=1000, early_stream_data=10_000))
    for _ in range(40):
        send_raw(link, v(0x54) + v(0) + bytes(3000), unidirectional=True)
        link.run(0.3)
        assert link.server.it.unconsumed <= 10_000
        assert sum(len(event.data) for event in link.server.it._demultiplexer._early_data) <= 10_000
    assert len(link.server.it._streams) <= 16
    link.late()  # type: ignore[attr-defined]
    link.until(lambda: link.client.saw(SessionOpened))
    link.run(1)
    assert len(link.server.saw(StreamData)) >= 1


def test_many_small_pieces_count_with_their_overhead() -> None:
    link = early_link(ConnectionLimits(session_timeout=1000, early_stream_data=10_000))
    stream = send_raw(link, v(0x54) + v(0), unidirectional=True)
    for _ in range(200):
        found = raw(link.client.it)._streams.get(stream)
        if found is None or found.sender._reset_error_code is not None:
            break
        found.sender.write(b"x")
        link.run(0.05)
    else:
        pytest.fail("it is never stopped")
    assert len(link.server.it._demultiplexer._early_data) < 100


# Limits.


def lawless(link: Link) -> Any:
    """Make a client ignore the flow-control windows."""
    quic = raw(link.client.it)
    quic._remote_max_data = 2**40
    quic._remote_max_stream_data_bidi_remote = quic._remote_max_stream_data_uni = 2**40
    for stream in quic._streams.values():
        stream.max_stream_data_remote = 2**40
    return quic


LIMITS = ConnectionLimits(connection_window=100_000, stream_window=40_000)


def kept(link: Link) -> int:
    """Count the client's bytes that the server holds: unconsumed, or received out of order."""
    waiting = sum(len(one.receiver._buffer) for one in raw(link.server.it)._streams.values())
    return link.server.it.unconsumed + waiting


def test_peer_stops_when_its_bytes_are_not_consumed() -> None:
    link = Link(server=server_config(LIMITS)).open()
    link.server.consumes = False
    streams = [link.client.it.open_stream(bidirectional=False) for _ in range(5)]
    for _ in range(20):
        for stream in streams:
            assert stream is not None
            link.client.it.send(stream, bytes(50_000))
        link.run(0.2)
        assert kept(link) <= 100_000
    assert kept(link) > 90_000, "the window is used"
    assert link.server.lost is None
    assert all(len(data) <= 40_000 for data in link.server.received.values())
    # When everything is consumed, the client continues.
    link.server.consumes = True
    for number, data in link.server.received.items():
        link.server.it.consumed(number, len(data))
    before = sum(map(len, link.server.received.values()))
    link.until(lambda: sum(map(len, link.server.received.values())) > before + 200_000)


def test_consumed_bytes_are_limited_to_received_bytes() -> None:
    link = Link(server=server_config(LIMITS)).open()
    link.server.consumes = False
    stream = link.client.it.open_stream(bidirectional=False)
    assert stream is not None
    link.client.it.send(stream, bytes(1000))
    link.run(0.1)
    link.server.it.consumed(stream, 10**9)
    link.server.it.consumed(stream, -5)
    assert link.server.it.unconsumed == 0
    assert raw(link.server.it)._consumed == raw(link.server.it)._local_max_data.used


def test_peer_that_ignores_the_windows_is_disconnected() -> None:
    link = Link(server=server_config(LIMITS)).open()
    link.server.consumes = False
    lawless(link)
    stream = link.client.it.open_stream(bidirectional=False)
    assert stream is not None
    raw(link.client.it).send_stream_data(stream, bytes(300_000))
    link.until(lambda: link.server.lost)
    assert ended_with(link, 0x3)  # FLOW_CONTROL_ERROR
    assert sum(len(event.data) for event in link.server.saw(StreamData)) <= 40_000


@pytest.mark.parametrize("how", ["consumed", "reset", "stopped", "ended", "foreign", "of another session"])
def test_windows_recover_completely(how: str) -> None:
    """Many times the window is sent, on streams that end in different ways."""
    link = Link(server=server_config(LIMITS)).open()
    for number in range(40):
        if how == "foreign":
            send_raw(link, v(0x21) + bytes(9_999), unidirectional=True)
        elif how == "of another session":
            send_raw(link, v(0x54) + v(400) + bytes(9_999), unidirectional=True)
        else:
            link.server.consumes = how in ("consumed", "ended")
            stream = link.client.it.open_stream(bidirectional=False)
            assert stream is not None
            assert link.client.it.send(stream, bytes(10_000), end=how in ("ended", "consumed"))
            if how == "reset":
                # Every second time, the bytes sent before are lost. They count against the window, too.
                link.upwards = (lambda data: []) if number % 2 else None
                link.flush()
                link.upwards = None
                link.client.it.reset(stream, 1)
            elif how == "stopped":
                link.run(0.05)
                link.server.it.stop_sending(stream, 1)
        link.run(0.3)
    assert link.server.lost is None
    assert link.server.it.unconsumed == 0
    quic = raw(link.server.it)
    limit = quic._local_max_data
    assert limit.used > (50_000 if how == "reset" else 300_000)
    assert limit.value - limit.used >= 50_000
    assert quic._consumed == limit.used, "all that counts against the window has been given back"


@pytest.mark.parametrize("side", [0, 1])
def test_memory_for_a_peer_that_never_acknowledges_is_bounded(side: int) -> None:
    limits = ConnectionLimits(stream_unacknowledged=50_000, unacknowledged=200_000)
    link = Link(server=server_config(limits), client=None).open()
    link.run(1)
    if side:
        link.damage = lambda data: []
    else:
        # The peer requests data, but its acknowledgements do not arrive.
        link.damage = lambda data: []
        link.upwards = lambda data: [(0.01, data)]
    streams = [link.server.it.open_stream(bidirectional=False) for _ in range(10)]
    taken = 0
    for _ in range(100):
        for stream in streams:
            assert stream is not None
            taken += link.server.it.send(stream, bytes(10_000))
            assert link.server.it.unacknowledged(stream) <= 60_000
        link.server.it.send_datagram(b"x")
        link.run(0.1)
        assert link.server.it.unacknowledged() <= 210_000
    held = sum(sys.getsizeof(one.sender._buffer) for one in raw(link.server.it)._streams.values())
    assert held < 400_000
    assert 19 <= taken < 60
    # A reset frees the bytes, even if the peer has not acknowledged it.
    for stream in streams:
        assert stream is not None
        link.server.it.reset(stream, 1)
    assert link.server.it.unacknowledged() < 1000
    held = sum(sys.getsizeof(one.sender._buffer) for one in raw(link.server.it)._streams.values())
    assert held < 10_000


def test_one_stream_does_not_use_the_whole_limit() -> None:
    link = Link(server=server_config(ConnectionLimits(stream_unacknowledged=50_000, unacknowledged=200_000))).open()
    link.run(1)
    full, free = (link.server.it.open_stream(bidirectional=False) for _ in range(2))
    assert full is not None and free is not None
    sends = [link.server.it.send(full, bytes(10_000)) for _ in range(10)]
    assert sends == [True] * 5 + [False] * 5
    assert not link.server.it.writable(full)
    assert link.server.it.writable(free)
    assert link.server.it.send(full, b"", end=True), "an end always fits"
    link.until(lambda: full in link.client.ended)
    assert len(link.client.received[full]) == 50_000


def test_every_stream_has_a_minimum_despite_the_others() -> None:
    limits = ConnectionLimits(stream_unacknowledged=50_000, unacknowledged=100_000, stream_minimum=5_000)
    link = Link(server=server_config(limits)).open()
    link.run(1)
    first, second, third = (link.server.it.open_stream(bidirectional=False) for _ in range(3))
    assert first is not None and second is not None and third is not None
    for full in (first, second):
        while link.server.it.send(full, bytes(10_000)):
            pass
    assert [link.server.it.send(third, bytes(3_000)) for _ in range(3)] == [True, True, False]
    assert link.server.it.unacknowledged() < 100_000 + 2 * 10_000 + 5_000 + 3_000


def test_bytes_count_until_they_are_acknowledged() -> None:
    link = Link().open()
    link.run(1)
    stream = link.client.it.open_stream(bidirectional=True)
    assert stream is not None
    before = link.client.it.unacknowledged()
    link.client.it.send(stream, bytes(1000))
    assert link.client.it.unacknowledged(stream) == 1000 + 3
    assert link.client.it.unacknowledged() == before + 1000
    link.flush()
    assert link.client.it.unacknowledged() == before + 1000
    link.run(1)
    assert link.client.it.unacknowledged(stream) == 0
    assert link.client.it.unacknowledged() == 0


def test_unused_open_streams_are_limited() -> None:
    link = Link(server=server_config(ConnectionLimits(incoming_bidirectional=8, incoming_unidirectional=8))).open()
    quic = raw(link.client.it)
    quic._remote_max_streams_uni = 1000
    link.run(1)
    send_raw(link, b"\x40", unidirectional=True)
    quic.send_stream_data(7 * 4 + 2, b"\x40")
    link.run(1)
    assert link.server.lost is None
    assert len(raw(link.server.it)._streams) <= 8 + 8 + 4
    quic.send_stream_data(8 * 4 + 2, b"\x40")
    link.until(lambda: link.server.lost)
    assert ended_with(link, 0x4)  # STREAM_LIMIT_ERROR


def test_stream_with_many_ranges_ends_the_connection_before_it_costs_cpu() -> None:
    link = Link().open()
    quic = link.client.it._quic
    stream = send_raw(link, v(0x54) + v(0), unidirectional=True)
    link.run(0.1)
    began = time.process_time()
    for first in range(10, 60_000, 200):
        frames = b"".join(
            b"\x0e" + v(stream) + (0x80000000 | offset).to_bytes(4, "big") + b"\x01x"
            for offset in range(first, first + 200, 2)
        )
        link.server.it.receive_datagram(packet(quic, frames), CLIENT, link.now)
        if raw(link.server.it)._close_event:
            break
    link.flush()
    assert link.server.lost == "too many disjoint ranges"
    assert first / 2 < MAX_RECEIVED_RANGES + 200
    assert time.process_time() - began < 2


def test_handshake_with_many_ranges_ends_the_connection() -> None:
    link = Link().open()
    for first in range(100, 60_000, 200):
        frames = b"".join(
            b"\x06" + (0x80000000 | offset).to_bytes(4, "big") + b"\x01x" for offset in range(first, first + 200, 2)
        )
        link.server.it.receive_datagram(packet(link.client.it._quic, frames), CLIENT, link.now)
        if raw(link.server.it)._close_event:
            break
    link.flush()
    assert link.server.lost == "too many disjoint ranges"
    assert first < 3 * MAX_RECEIVED_RANGES


def test_oversized_handshake_ends_the_connection() -> None:
    link = Link()
    sender = raw(link.client.it)._crypto_streams[Epoch.INITIAL].sender
    # A ClientHello of 16 MiB is announced to the server, and its first 17 KiB arrive.
    sender._buffer[:4] = b"\x01\xff\xff\xff"
    sender.write(bytes(17_000))
    link.run(2)
    assert ended_with(link, QuicErrorCode.CRYPTO_BUFFER_EXCEEDED)
    assert not link.client.saw(SessionOpened)


def test_endless_stopped_stream_uses_no_memory() -> None:
    link = Link(server=server_config(LIMITS)).open()
    stream = link.client.it.open_stream(bidirectional=True)
    assert stream is not None
    link.client.it.send(stream, b"x")
    link.run(0.1)
    # A client that ignores STOP_SENDING.
    raw(link.client.it)._streams[stream].sender.reset = lambda error_code: None
    link.client.it._demultiplexer._handle_stop_sending = lambda event: None  # type: ignore[method-assign]
    link.server.it.stop_sending(stream, 1)
    for _ in range(20):
        raw(link.client.it).send_stream_data(stream, bytes(30_000))
        link.run(0.3)
        assert kept(link) == 0
    assert link.server.received[stream] == b"x"
    assert raw(link.server.it)._local_max_data.used > 500_000
