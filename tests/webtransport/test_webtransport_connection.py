"""catbus.webtransport.webtransport_connection: a session from its request to its close, over a lossless link"""

from __future__ import annotations

import pytest

from catbus.webtransport import (
    ConnectionIdIssued,
    ConnectionIdRetired,
    ConnectionLimits,
    ConnectionLost,
    Datagram,
    SessionClosed,
    SessionOpened,
    SessionRefused,
    SessionRequested,
    StreamData,
    StreamReset,
    StreamStopped,
    Terminated,
)
from catbus.webtransport.http3_connection import Http3Connection
from catbus.webtransport.http3_error_codes import Http3ErrorCode, to_http3_error_code
from tests.webtransport.simulated_link import CLIENT, SERVER, Damage, End, Link, client_config, server_config, untouched


def both(link: Link) -> list[tuple[End, End]]:
    """Yield each side with its peer, for properties that hold on both sides."""
    return [(link.client, link.server), (link.server, link.client)]


SIDES = pytest.mark.parametrize("side", [0, 1], ids=["client", "server"])
BOTH = pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "unidirectional"])


# The request.


def test_request_has_path_authority_and_origin() -> None:
    link = Link(path="/any/päth?q", authority="bus.example:4433", origin="https://page.example").open()
    [request] = link.server.saw(SessionRequested)
    assert request == SessionRequested("/any/päth?q", "bus.example:4433", "https://page.example")


def test_client_outside_a_browser_sends_no_origin() -> None:
    assert Link().open().server.saw(SessionRequested)[0].origin is None


def test_both_sides_announce_the_settings_of_all_drafts() -> None:
    link = Link().open()
    for one, _ in both(link):
        http3 = one.it._connect_stream.http3
        assert http3 is not None
        settings = http3.received_settings
        assert settings is not None
        for name in (0x2B603742, 0xC671706A, 0x14E9CD29, 0x2C7CF000, 0x08, 0x33):
            assert settings[name] == 1, hex(name)
        assert settings[0x01] == settings[0x07] == 0, "no dynamic table"


@pytest.mark.parametrize("status", [403, 404, 429, 503])
def test_refused_session_closes_the_connection(status: int) -> None:
    link = Link()
    link.server.answer = lambda connection, now: connection.refuse(status, now)
    link.until(lambda: link.server.lost and link.client.lost)
    assert link.client.saw(SessionRefused) == [SessionRefused(status)]
    assert not link.client.saw(SessionOpened)
    assert not link.client.saw(SessionClosed)
    assert not link.client.it.session_open


def test_withdrawn_request_cannot_be_accepted() -> None:
    link = Link()
    link.server.answer = lambda connection, now: None
    link.until(lambda: link.server.saw(SessionRequested))
    link.client.it.close()
    link.until(lambda: link.server.lost)
    assert link.server.it.accept() is False
    assert link.server.it.refuse(403, link.now) is False


def test_accept_without_a_request_returns_false() -> None:
    link = Link().open()
    assert link.client.it.accept() is False
    assert link.server.it.accept() is False
    assert link.server.it.refuse(403, link.now) is False


def test_nothing_is_sent_before_the_session_opens() -> None:
    link = Link()
    assert link.client.it.open_stream(bidirectional=True) is None
    assert link.client.it.stream_credit(bidirectional=True) == 0
    assert link.client.it.send_datagram(b"x") is False
    assert link.client.it.close_session(0, "", link.now) is False


def test_session_must_be_requested_in_time() -> None:
    link = Link()
    link.client.it._demultiplexer._session_request = None
    link.until(lambda: link.server.lost)
    assert link.server.lost == "no session was requested in time"
    assert 1009 < link.now < 1012
    link.until(lambda: link.client.lost)


def test_client_gives_up_a_server_without_a_reply() -> None:
    link = Link(damage=lambda data: [])
    link.until(lambda: link.client.lost)
    assert link.client.lost == "no session was requested in time"
    assert 1009 < link.now < 1012
    link.until(lambda: link.client.saw(Terminated))
    assert link.client.it.timer is None


def test_client_leaves_a_server_without_webtransport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Http3Connection, "_get_local_settings", lambda self: {0x1: 0, 0x7: 0, 0x8: 1})
    link = Link()
    link.until(lambda: link.client.lost)
    assert link.client.lost == "the server does not support WebTransport"
    assert not link.server.saw(SessionRequested)


# Streams.


@SIDES
@BOTH
def test_stream_delivers_bytes_and_its_end(side: int, bidirectional: bool) -> None:
    link = Link().open()
    here, there = both(link)[side]
    stream = here.it.open_stream(bidirectional=bidirectional)
    assert stream is not None
    assert here.it.send(stream, b"one ")
    assert here.it.send(stream, b"two", end=True)
    link.until(lambda: stream in there.ended)
    assert there.received[stream] == b"one two"
    if bidirectional:
        assert there.it.send(stream, b"three", end=True)
        link.until(lambda: stream in here.ended)
        assert here.received[stream] == b"three"
    else:
        assert there.it.send(stream, b"three") is False
    link.run(1)
    assert here.it._session_stream(stream) is None
    assert there.it._session_stream(stream) is None


@SIDES
def test_stream_end_without_bytes_is_delivered(side: int) -> None:
    link = Link().open()
    here, there = both(link)[side]
    stream = here.it.open_stream(bidirectional=False)
    assert stream is not None
    assert here.it.send(stream, b"", end=True)
    link.until(lambda: there.ended)
    assert there.saw(StreamData) == [StreamData(stream, b"", ended=True)]


@SIDES
def test_send_after_the_end_or_on_an_unknown_stream_returns_false(side: int) -> None:
    link = Link().open()
    here, there = both(link)[side]
    stream = here.it.open_stream(bidirectional=True)
    assert stream is not None
    here.it.send(stream, b"x", end=True)
    for unknown in (stream, 0, 1, 2, 3, 4000, 4001, -1):
        assert here.it.send(unknown, b"more") is False
        assert here.it.send(unknown, b"", end=True) is False
        assert here.it.writable(unknown) is False
    for unknown in (0, 2, 3, 4000, -1):
        assert here.it.reset(unknown, 1) is False
        assert here.it.stop_sending(unknown, 1) is False
        assert here.it.unacknowledged(unknown) == 0
        here.it.consumed(unknown, 5)
    link.until(lambda: stream in there.ended)
    link.run(1)
    assert there.received[stream] == b"x"
    assert link.client.lost is link.server.lost is None


@SIDES
@BOTH
def test_reset_delivers_its_code(side: int, bidirectional: bool) -> None:
    link = Link().open()
    here, there = both(link)[side]
    stream = here.it.open_stream(bidirectional=bidirectional)
    assert stream is not None
    here.it.send(stream, b"x" * 100)
    link.run(0.1)
    assert here.it.reset(stream, 7) is True
    assert here.it.reset(stream, 8) is False
    assert here.it.send(stream, b"y") is False
    link.until(lambda: there.saw(StreamReset))
    assert there.saw(StreamReset) == [StreamReset(stream, 7)]
    if bidirectional:
        assert there.it.send(stream, b"the other way still goes", end=True)
        link.until(lambda: stream in here.ended)
    link.run(1)
    assert here.it._session_stream(stream) is there.it._session_stream(stream) is None


@SIDES
@BOTH
def test_stop_sending_delivers_its_code(side: int, bidirectional: bool) -> None:
    link = Link().open()
    here, there = both(link)[side]
    stream = here.it.open_stream(bidirectional=bidirectional)
    assert stream is not None
    here.it.send(stream, b"x" * 100)
    link.run(0.1)
    assert there.it.stop_sending(stream, 0xFFFFFFFF) is True
    assert there.it.stop_sending(stream, 1) is False
    # Bytes sent before STOP_SENDING arrives are lost, and nothing is raised.
    assert here.it.send(stream, b"racing")
    link.until(lambda: here.saw(StreamStopped))
    assert here.saw(StreamStopped) == [StreamStopped(stream, 0xFFFFFFFF)]
    assert here.it.send(stream, b"y") is False
    assert here.it.reset(stream, 1) is False
    assert here.it.unacknowledged(stream) == 0
    link.run(1)
    assert there.received[stream] == b"x" * 100
    assert not there.saw(StreamReset), "the answer to our own request is no news"
    if bidirectional:
        assert there.it.send(stream, b"the other way still goes", end=True)
        link.until(lambda: stream in here.ended)
    link.run(1)
    assert here.it._session_stream(stream) is there.it._session_stream(stream) is None


def test_http3_code_is_reported_as_none() -> None:
    link = Link().open()
    stream = link.client.it.open_stream(bidirectional=True)
    assert stream is not None
    link.client.it.send(stream, b"x")
    link.run(0.1)
    link.client.it._quic.reset_stream(stream, Http3ErrorCode.REQUEST_CANCELLED)
    link.until(lambda: link.server.saw(StreamReset))
    assert link.server.saw(StreamReset) == [StreamReset(stream, None)]


@SIDES
@BOTH
def test_open_streams_are_limited_by_the_peer(side: int, bidirectional: bool) -> None:
    limits = ConnectionLimits(incoming_bidirectional=5, incoming_unidirectional=7)
    link = Link(server=server_config(limits), client=client_config(limits)).open()
    here, there = both(link)[side]
    # The CONNECT stream and the three streams of HTTP/3 count.
    expected = (4 if side == 0 else 5) if bidirectional else 4
    assert here.it.stream_credit(bidirectional=bidirectional) == expected
    streams = [here.it.open_stream(bidirectional=bidirectional) for _ in range(expected)]
    assert None not in streams
    assert here.it.open_stream(bidirectional=bidirectional) is None
    assert here.it.stream_credit(bidirectional=bidirectional) == 0
    first = streams[0]
    assert first is not None
    here.it.send(first, b"x", end=True)
    link.until(lambda: first in there.ended)
    if bidirectional:
        there.it.send(first, b"", end=True)
    link.until(lambda: here.it.stream_credit(bidirectional=bidirectional) == 1)
    assert here.it.open_stream(bidirectional=bidirectional) is not None


def test_open_streams_are_limited_by_the_own_limit() -> None:
    generous = client_config(ConnectionLimits(incoming_unidirectional=1000))
    link = Link(client=generous, server=server_config(ConnectionLimits(outgoing_streams=10))).open()
    assert link.server.it.stream_credit(bidirectional=False) == 10
    opened = [link.server.it.open_stream(bidirectional=False) for _ in range(11)]
    assert opened[-1] is None
    assert opened[9] is not None
    link.server.it.reset(opened[9], 0)
    link.until(lambda: link.server.it.stream_credit(bidirectional=False) == 1)


def test_stopped_streams_count_until_the_reset_is_acknowledged() -> None:
    generous = client_config(ConnectionLimits(incoming_unidirectional=1000))
    link = Link(client=generous, server=server_config(ConnectionLimits(outgoing_streams=10))).open()
    opened = [link.server.it.open_stream(bidirectional=False) for _ in range(10)]
    link.run(1)
    link.damage = lambda data: ()
    link.upwards = untouched
    for stream in opened:
        assert stream is not None
        link.client.it._quic.stop_stream(stream, 0)
    link.until(lambda: len(link.server.saw(StreamStopped)) == 10)
    assert link.server.it.stream_credit(bidirectional=False) == 0
    link.damage = untouched
    link.until(lambda: link.server.it.stream_credit(bidirectional=False) == 10)


# Datagrams.


@SIDES
def test_datagrams_are_delivered_both_ways(side: int) -> None:
    link = Link().open()
    here, there = both(link)[side]
    largest = here.it.max_datagram_size
    assert largest > 1100
    assert here.it.send_datagram(b"x" * (largest + 1)) is False
    assert here.it.send_datagram(b"x" * largest) is True
    assert here.it.send_datagram(b"") is True
    link.run(1)
    assert there.saw(Datagram) == [Datagram(b"x" * largest), Datagram(b"")]


def test_largest_datagram_is_sent_beside_other_frames() -> None:
    link = Link().open()
    stream = link.client.it.open_stream(bidirectional=True)
    assert stream is not None
    for _ in range(10):
        link.client.it.send(stream, b"y" * 3000)
        link.client.it.ping()
        assert link.client.it.send_datagram(b"x" * link.client.it.max_datagram_size)
        link.run(0.2)
    assert len(link.server.saw(Datagram)) == 10


def test_datagrams_above_the_queue_limit_are_dropped() -> None:
    link = Link(server=server_config(ConnectionLimits(queued_datagrams=5))).open()
    assert [link.server.it.send_datagram(b"x") for _ in range(7)] == [True] * 5 + [False] * 2
    link.run(0.1)
    for _ in range(100):
        for _ in range(10):
            link.client.it.send_datagram(b"z")
        for data, _to in link.client.it.datagrams_to_send(link.now):
            link.server.it.receive_datagram(data, link.client.address, link.now)
        for data, _to in link.server.it.datagrams_to_send(link.now):
            link.client.it.receive_datagram(data, link.server.address, link.now)
        link.now += 0.03
    assert len(link.server.it._events) == 256
    link.server.take(link.now)
    assert link.server.it._demultiplexer.datagrams_waiting == 0


# Closing.


@SIDES
@pytest.mark.parametrize("code", [0, 1, 4401, 0xFFFFFFFF])
def test_close_code_and_reason_are_delivered(side: int, code: int) -> None:
    link = Link().open()
    here, there = both(link)[side]
    assert here.it.close_session(code, "grüße", link.now) is True
    assert here.it.close_session(1, "again", link.now) is False
    link.until(lambda: here.lost and there.lost)
    assert there.saw(SessionClosed) == [SessionClosed(code, "grüße")]
    assert not here.saw(SessionClosed)
    assert [type(event) for event in there.events[-2:]] == [SessionClosed, ConnectionLost]
    link.until(lambda: here.saw(Terminated) and there.saw(Terminated))
    assert link.now < 1005
    assert here.it.timer is there.it.timer is None
    assert len(here.saw(ConnectionLost)) == len(there.saw(ConnectionLost)) == 1


@pytest.mark.parametrize("apart", [False, True])
def test_lost_packet_delays_only_its_own_stream(apart: bool) -> None:
    link = Link().open()
    link.run(1)
    one = link.server.it.open_stream(bidirectional=False)
    other = link.server.it.open_stream(bidirectional=False) if apart else one
    assert one is not None and other is not None
    for stream in (one, other):
        link.server.it.send(stream, b"begin;")
    link.run(1)
    link.damage = lambda data: []
    link.server.it.send(one, b"lost;")
    link.flush()
    link.damage = untouched
    link.server.it.send(other, b"next;")
    link.until(lambda: link.client.received[other].endswith(b"next;"))
    assert (b"lost;" in link.client.received[one]) is not apart
    link.until(lambda: b"lost;" in link.client.received[one])


@SIDES
def test_connection_closes_without_an_error_after_its_session(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chromium may process the close of the connection before it has reported the close of the session to its page. With
    # any code but QUIC's NO_ERROR, the page gets "Connection lost" and no close code.
    link = Link().open()
    here, there = both(link)[side]
    monkeypatch.setattr(there.it, "close", lambda reason="": None)
    here.it.close_session(4001, "", link.now)
    link.until(lambda: here.lost and there.lost)
    assert there.saw(SessionClosed) == [SessionClosed(4001, "")]
    assert_no_error(there)


@SIDES
def test_connection_closes_without_an_error_when_the_peer_closes_the_session(side: int) -> None:
    link = Link().open()
    here, there = both(link)[side]
    here.it.close_session(7, "enough", link.now)
    link.until(lambda: here.lost and there.lost)
    # Here the peer closed first.
    assert_no_error(here)


def assert_no_error(end: End) -> None:
    """Check that the peer closed the connection with QUIC's NO_ERROR."""
    ending = end.it._quic.termination
    assert ending is not None
    assert (ending.error_code, ending.frame_type) == (0, 0)


@SIDES
def test_close_capsule_arrives_before_the_connection_closes(side: int) -> None:
    link = Link().open()
    here, there = both(link)[side]
    stream = here.it.open_stream(bidirectional=True)
    assert stream is not None
    here.it.send(stream, b"w" * 100_000)
    link.run(0.025)
    assert 0 < len(there.received[stream]) < 100_000
    there.it.send(stream, b"what comes while we close is dropped")
    for bidirectional in (True, False):
        other = there.it.open_stream(bidirectional=bidirectional)
        assert other is not None
        there.it.send(other, b"and so is this")
    here.it.close_session(4000, "", link.now)
    assert here.it.send(stream, b"too late") is False
    assert not here.it.session_open
    link.until(lambda: there.lost)
    assert there.received[stream] == b"w" * 100_000
    assert there.saw(SessionClosed) == [SessionClosed(4000, "")]
    assert not here.saw(StreamData)


def test_peer_that_does_not_read_does_not_delay_the_close() -> None:
    link = Link().open()
    link.run(1)
    stream = link.server.it.open_stream(bidirectional=True)
    assert stream is not None
    link.damage = lambda data: []
    link.server.it.send(stream, b"x" * 1000)
    link.server.it.close_session(1, "", link.now)
    began = link.now
    link.until(lambda: link.server.lost)
    assert 3.9 < link.now - began < 5


@SIDES
def test_stream_end_without_a_capsule_is_a_close_with_code_0(side: int) -> None:
    link = Link().open()
    here, there = both(link)[side]
    http3 = here.it._connect_stream.http3
    assert http3 is not None
    http3.send_data(0, b"", end_stream=True)
    link.until(lambda: there.lost)
    assert there.saw(SessionClosed) == [SessionClosed(0, "")]
    assert link.now < 1000.2, "a browser leaves the connection open"


@SIDES
def test_connection_closes_when_the_peer_has_acknowledged_the_capsule(side: int) -> None:
    link = Link().open()
    here, there = both(link)[side]
    # As in a browser, the other side does not close the connection.
    there.it._demultiplexer._peer_ended_session = lambda code, reason: None  # type: ignore[method-assign]
    here.it.close_session(1, "", link.now)
    link.until(lambda: here.lost)
    assert link.now < 1000.2


@SIDES
@pytest.mark.parametrize("how", ["reset", "stop", "half a capsule", "a lying capsule"])
def test_aborted_session_has_no_close_code(side: int, how: str) -> None:
    link = Link().open()
    here, there = both(link)[side]
    http3 = here.it._connect_stream.http3
    assert http3 is not None
    if how == "reset":
        here.it._quic.reset_stream(0, to_http3_error_code(5))
    elif how == "stop":
        here.it._quic.stop_stream(0, to_http3_error_code(5))
    elif how == "half a capsule":
        http3.send_data(0, b"\x68\x43\x08\0\0", end_stream=True)
    else:
        http3.send_data(0, b"\x68\x43\x02\0\0", end_stream=False)
    link.until(lambda: there.lost)
    assert there.saw(SessionClosed) == [SessionClosed(None, "")]
    link.until(lambda: here.lost)


@SIDES
def test_close_of_the_peer_is_reported_immediately(side: int) -> None:
    link = Link().open()
    here, there = both(link)[side]
    here.it.close("going")
    assert [event for event in here.it.events() if isinstance(event, ConnectionLost)] == [ConnectionLost("going")]
    began = link.now
    link.until(lambda: there.lost)
    assert there.lost == "going"
    assert link.now - began < 0.05
    assert here.it.send(4, b"") is False
    assert there.it.open_stream(bidirectional=True) is None


@SIDES
def test_vanished_peer_is_reported_after_the_idle_timeout(side: int) -> None:
    link = Link().open()
    link.server.it.trust()
    link.run(1)
    here, there = both(link)[side]
    link.damage = lambda data: []
    here.it.close()
    began = link.now
    link.until(lambda: there.lost)
    assert there.lost == "Idle timeout"
    assert 55 < link.now - began <= 61


@pytest.mark.parametrize("session", [True, False])
def test_vanished_unauthenticated_client_is_dropped_after_the_silence_timeout(session: bool) -> None:
    link = Link()
    if session:
        link.open()
    else:
        link.client.it._demultiplexer._session_request = None
        link.until(lambda: link.server.connection is not None and link.server.it.address_validated)
    link.run(1)
    link.damage = lambda data: []
    link.client.it.close()
    began = link.now
    link.until(lambda: link.server.saw(Terminated))
    assert link.server.lost == "the client is gone"
    assert link.now - began <= ConnectionLimits().silence_timeout


def test_slow_acknowledgements_do_not_extend_the_silence_timeout() -> None:
    # RFC 9000 section 10.1 recommends three probe timeouts, whose length the peer controls.
    link = Link(damage=lambda data: [(1.9, data)], client=client_config(ConnectionLimits(session_timeout=60)))
    link.until(lambda: link.server.connection is not None and link.server.it.address_validated)
    link.damage = lambda data: []
    link.run(1.9)  # Datagrams in transit arrive.
    began = link.now
    link.until(lambda: link.server.saw(Terminated))
    assert link.now - began <= ConnectionLimits().silence_timeout


def test_silent_unauthenticated_client_is_pinged_and_stays() -> None:
    link = Link().open()
    link.run(40)
    assert link.server.lost is link.client.lost is None
    assert not link.server.it.trusted


def test_authenticated_client_may_be_silent() -> None:
    link = Link().open()
    link.run(1)
    link.server.it.trust()
    link.damage = lambda data: []
    began = link.now
    link.until(lambda: link.server.lost)
    assert 55 < link.now - began <= 61


def test_handshake_survives_lost_packets() -> None:
    """The delay is half a second each way, and the first packets of each side are lost twice."""
    lost = {SERVER: 2, CLIENT: 2}
    link = Link(client=client_config(ConnectionLimits(session_timeout=60)))

    def damage(to: object) -> Damage:
        def carry(data: bytes) -> list[tuple[float, bytes]]:
            lost[to] -= 1
            return [] if lost[to] >= 0 else [(0.5, data)]

        return carry

    link.upwards, link.damage = damage(SERVER), damage(CLIENT)
    link.open()
    link.run(20)
    assert link.server.lost is link.client.lost is None


def test_pings_keep_a_connection_alive() -> None:
    link = Link().open()
    for _ in range(10):
        link.server.it.ping()
        link.server.it.ping()
        assert len(link.server.it._quic._ping_pending) == 1
        link.run(20)
    assert link.server.lost is link.client.lost is None


@SIDES
def test_events_report_all_connection_ids(side: int) -> None:
    link = Link().open()
    link.run(1)
    here, _ = both(link)[side]
    issued = {event.connection_id for event in here.saw(ConnectionIdIssued)}
    assert len(issued) == 7
    assert issued < here.it.connection_ids
    known = {one.cid for one in here.it._quic._host_cids}
    assert known <= here.it.connection_ids
    assert here.it._quic.host_cid in known


def test_retired_connection_id_is_reported() -> None:
    link = Link().open()
    link.run(1)
    before = link.server.it.connection_ids
    link.client.it._quic.change_connection_id()
    link.client.it.ping()
    link.run(1)
    [retired] = link.server.saw(ConnectionIdRetired)
    assert retired.connection_id in before
    assert retired.connection_id not in link.server.it.connection_ids
    assert len(link.server.it.connection_ids) == len(before)
