"""The requirements of the drafts of WebTransport over HTTP/3 on both sides, from draft 02 to draft 16."""

from __future__ import annotations

from typing import Any

import pytest
from aioquic.buffer import Buffer, encode_uint_var  # type: ignore[attr-defined]
from aioquic.h3.events import HeadersReceived
from aioquic.quic.connection import QuicConnectionError
from aioquic.quic.packet import QuicErrorCode

from catbus.webtransport import SessionClosed, SessionOpened, SessionRequested, StreamReset
from catbus.webtransport.capsules import encode_close
from catbus.webtransport.connect_stream import ConnectStream
from catbus.webtransport.http3_connection import H3_DATAGRAM, WEBTRANSPORT_SETTINGS, Http3Connection
from catbus.webtransport.http3_error_codes import Http3ErrorCode, to_http3_error_code
from catbus.webtransport.quic_connection import RESET_STREAM_AT, BoundedQuicConnection
from tests.webtransport.simulated_link import Link
from tests.webtransport.test_hostile_peers import ended_with, raw, send_raw

v = encode_uint_var


def announce(monkeypatch: pytest.MonkeyPatch, *, client: bool, **changes: int | None) -> None:
    """Replace the settings that one side announces. None omits a setting."""
    original = Http3Connection._get_local_settings

    def settings(self: Http3Connection) -> dict[int, int]:
        found = original(self)
        if self._quic.configuration.is_client == client:
            found.update({int(name, 16): value for name, value in changes.items() if value is not None})
            found = {name: value for name, value in found.items() if changes.get(hex(name), 0) is not None}
        return found

    monkeypatch.setattr(Http3Connection, "_get_local_settings", settings)


def ask(monkeypatch: pytest.MonkeyPatch, token: bytes, **parameters: Any) -> Link:
    """Make the client request its session with this `:protocol`."""
    monkeypatch.setattr(Http3Connection, "choose_protocol_token", lambda self: token)
    return Link(**parameters)


def record_tokens(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    tokens: list[bytes] = []
    request = ConnectStream.request

    def recording(self: ConnectStream, token: bytes, *wanted: Any) -> None:
        tokens.append(token)
        request(self, token, *wanted)

    monkeypatch.setattr(ConnectStream, "request", recording)
    return tokens


# The protocol token.


@pytest.mark.parametrize("token", [b"webtransport", b"webtransport-h3"])
def test_session_opens_with_both_protocol_tokens(monkeypatch: pytest.MonkeyPatch, token: bytes) -> None:
    link = ask(monkeypatch, token, path="/x").open()
    assert [request.path for request in link.server.saw(SessionRequested)] == ["/x"]


def test_unknown_protocol_gets_status_501(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = []
    handle = Http3Connection.handle_event

    def recording(self: Http3Connection, event: Any) -> Any:
        events = handle(self, event)
        statuses.extend(dict(one.headers).get(b":status") for one in events if isinstance(one, HeadersReceived))
        return events

    monkeypatch.setattr(Http3Connection, "handle_event", recording)
    link = ask(monkeypatch, b"connect-udp")
    link.run(1)
    assert b"501" in statuses
    assert not link.server.saw(SessionRequested)


def test_client_requests_the_newest_protocol_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = record_tokens(monkeypatch)
    Link().open()
    with monkeypatch.context() as older:
        announce(older, client=False, **{hex(WEBTRANSPORT_SETTINGS[-1]): None})
        Link().open()
    with monkeypatch.context() as older:
        older.setattr(
            BoundedQuicConnection,
            "_serialize_transport_parameters",
            super(BoundedQuicConnection, BoundedQuicConnection)._serialize_transport_parameters,
        )
        Link().open()
    assert tokens == [b"webtransport-h3", b"webtransport", b"webtransport"]


def test_client_leaves_a_server_with_invalid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, client=False, **{hex(WEBTRANSPORT_SETTINGS[-1]): 2})
    link = Link()
    link.until(lambda: link.client.lost)
    assert raw(link.client.it)._close_event.error_code == Http3ErrorCode.SETTINGS_ERROR


def test_client_tells_a_server_without_webtransport_why_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, client=False, **{hex(name): None for name in WEBTRANSPORT_SETTINGS})
    link = Link()
    link.until(lambda: link.client.lost)
    assert raw(link.client.it)._close_event.error_code == Http3ErrorCode.REQUIREMENTS_NOT_MET


# Settings.


def test_request_of_draft_15_waits_for_the_settings_of_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link()
    known = []
    received = Http3Connection.received_settings

    def settings(self: Http3Connection) -> Any:
        mine = not self._quic.configuration.is_client
        return received.fget(self) if known or not mine else None  # type: ignore[attr-defined]

    monkeypatch.setattr(Http3Connection, "received_settings", property(settings))
    link.run(1)
    assert link.server.it._connect_stream.id is not None
    assert not link.server.saw(SessionRequested)
    known.append(True)
    # The settings are read with the next bytes of HTTP/3.
    link.client.it._connect_stream.http3.send_data(0, b"", end_stream=False)  # type: ignore[union-attr]
    link.until(lambda: link.client.saw(SessionOpened))


def test_request_that_is_withdrawn_while_it_waits_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link()
    received = Http3Connection.received_settings
    hidden = property(lambda self: received.fget(self) if self._quic.configuration.is_client else None)  # type: ignore[attr-defined]
    with monkeypatch.context() as hiding:
        hiding.setattr(Http3Connection, "received_settings", hidden)
        link.run(1)
        raw(link.client.it).reset_stream(0, Http3ErrorCode.REQUEST_CANCELLED)
        link.run(0.2)
    link.run(5)
    assert not link.server.saw(SessionRequested)
    assert not link.server.it._failed


def test_draft_15_requires_datagrams(monkeypatch: pytest.MonkeyPatch) -> None:
    # aioquic itself rejects the setting of draft 02 without datagrams.
    announce(monkeypatch, client=True, **{hex(H3_DATAGRAM): None, hex(WEBTRANSPORT_SETTINGS[0]): None})
    link = Link()
    link.run(1)
    assert not link.server.saw(SessionRequested)
    assert not link.client.it.session_open
    older = ask(monkeypatch, b"webtransport").open()
    assert older.server.it.session_open


# The CONNECT stream.


def test_capsules_before_the_reply_are_read_after_it() -> None:
    link = Link()
    link.server.answer = lambda connection, now: None
    link.until(lambda: link.server.saw(SessionRequested))
    http3 = link.client.it._connect_stream.http3
    assert http3 is not None
    http3.send_data(0, encode_close(9, "early"), end_stream=True)
    link.run(1)
    assert not link.server.saw(SessionClosed)
    assert link.server.it.accept()
    link.run(1)
    assert link.server.saw(SessionClosed) == [SessionClosed(9, "early")]


def test_capsules_before_the_reply_are_bounded() -> None:
    link = Link()
    link.server.answer = lambda connection, now: None
    link.until(lambda: link.server.saw(SessionRequested))
    http3 = link.client.it._connect_stream.http3
    assert http3 is not None
    for _ in range(20):
        http3.send_data(0, bytes(1000), end_stream=False)
    link.run(1)
    assert len(link.server.it._demultiplexer._early_capsules) < 20_000
    assert link.server.lost
    assert not link.server.it.accept()


def test_reason_that_is_not_utf8_ends_the_session_without_a_code() -> None:
    link = Link().open()
    http3 = link.client.it._connect_stream.http3
    assert http3 is not None
    http3.send_data(0, v(0x2843) + v(5) + b"\0\0\0\1\xff", end_stream=False)
    link.run(1)
    assert link.server.saw(SessionClosed) == [SessionClosed(None, "")]


def test_stream_signal_behind_other_frames_is_an_error() -> None:
    link = Link().open()
    send_raw(link, v(0x21) + v(1) + b"x" + v(0x41) + v(0) + b"data", unidirectional=False)
    link.until(lambda: link.server.lost)
    assert ended_with(link, Http3ErrorCode.FRAME_ERROR)


# RESET_STREAM_AT.


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record each received RESET_STREAM_AT: stream, code, final size, reliable size."""
    seen: list[tuple[int, ...]] = []
    handle = BoundedQuicConnection._handle_reset_stream_at_frame

    def recording(self: BoundedQuicConnection, context: Any, frame_type: int, buf: Any) -> None:
        at = buf.tell()
        seen.append(tuple(buf.pull_uint_var() for _ in range(4)))
        buf.seek(at)
        handle(self, context, frame_type, buf)

    monkeypatch.setattr(BoundedQuicConnection, "_handle_reset_stream_at_frame", recording)
    return seen


@pytest.mark.parametrize("wait", [0, 1], ids=["at once", "later"])
@pytest.mark.parametrize("first_lost", [False, True])
def test_reset_stream_still_delivers_its_session_id(frames: list[tuple[int, ...]], wait: int, first_lost: bool) -> None:
    link = Link().open()
    link.run(1)
    lost = first_lost

    def damage(data: bytes) -> list[tuple[float, bytes]]:
        nonlocal lost
        lost, dropped = False, lost
        return [] if dropped else [(0.01, data)]

    link.damage = damage
    stream = link.server.it.open_stream(bidirectional=False)
    assert stream is not None
    assert link.server.it.send(stream, b"x" * 5000)
    link.flush()
    link.run(wait)
    assert link.server.it.reset(stream, 7)
    assert link.server.it.unacknowledged(stream) == 0
    link.until(lambda: link.client.saw(StreamReset))
    assert link.client.saw(StreamReset) == [StreamReset(stream, 7)]
    assert {frame[0] for frame in frames} == {stream}
    assert {frame[1] for frame in frames} == {to_http3_error_code(7)}
    header = len(v(0x54) + v(0))
    assert {frame[3] for frame in frames} == {header}
    link.run(5)
    for end in (link.client, link.server):
        assert end.lost is None
        assert raw(end.it).stream(stream) is None
        assert not raw(end.it)._pending_resets and not raw(end.it)._deferred_resets and not raw(end.it)._reliable_sizes


def test_peer_without_reset_stream_at_gets_reset_stream(frames: list[tuple[int, ...]]) -> None:
    link = Link().open()
    raw(link.server.it).peer_supports_reset_stream_at = False
    stream = link.server.it.open_stream(bidirectional=False)
    assert stream is not None
    link.server.it.send(stream, b"x")
    link.run(1)
    link.server.it.reset(stream, 7)
    link.until(lambda: link.client.saw(StreamReset))
    assert link.client.saw(StreamReset) == [StreamReset(stream, 7)]
    assert not frames


def test_received_reset_waits_for_the_reliable_bytes() -> None:
    link = Link().open()
    link.run(1)
    client, server = raw(link.client.it), raw(link.server.it)
    stream = client.get_next_available_stream_id(is_unidirectional=True)
    at(server, stream, to_http3_error_code(3), 10, 6)
    server._apply_deferred_resets()
    assert not link.server.saw(StreamReset)
    client.send_stream_data(stream, v(0x54) + v(0) + b"abc")
    link.run(1)
    assert link.server.saw(StreamReset) == [StreamReset(stream, 3)]
    assert bytes(link.server.received[stream]) == b"abc"
    assert link.server.it.unconsumed == 0
    assert not server._deferred_resets


def at(quic: BoundedQuicConnection, stream: int, code: int, final: int, reliable: int) -> None:
    """Deliver a RESET_STREAM_AT frame to a connection."""
    values = b"".join(v(value) for value in (stream, code, final, reliable))
    quic._handle_reset_stream_at_frame(None, RESET_STREAM_AT, Buffer(data=values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("later", "code"),
    [
        ((1, 10, 11), QuicErrorCode.FRAME_ENCODING_ERROR),
        ((2, 10, 6), QuicErrorCode.STREAM_STATE_ERROR),
        ((1, 11, 6), QuicErrorCode.FINAL_SIZE_ERROR),
        ((1, 9, 6), QuicErrorCode.FINAL_SIZE_ERROR),
    ],
)
def test_contradictory_resets_close_the_connection(later: tuple[int, int, int], code: QuicErrorCode) -> None:
    quic = raw(Link().open().server.it)
    at(quic, 14, 1, 10, 6)
    with pytest.raises(QuicConnectionError) as error:
        at(quic, 14, *later)
    assert error.value.error_code == code


def test_later_reset_may_only_lower_the_reliable_size() -> None:
    quic = raw(Link().open().server.it)
    for reliable, kept in ((6, 6), (8, 6), (5, 5)):
        at(quic, 14, 1, 10, reliable)
        assert quic._deferred_resets[14].reliable == kept


def test_reset_counts_against_the_windows() -> None:
    quic = raw(Link().open().server.it)
    used = quic._local_max_data.used
    at(quic, 14, 1, 1000, 6)
    assert quic._local_max_data.used == used + 1000
    with pytest.raises(QuicConnectionError) as error:
        at(quic, 18, 1, 1 << 40, 6)
    assert error.value.error_code == QuicErrorCode.FLOW_CONTROL_ERROR


def test_transport_parameter_must_be_empty() -> None:
    quic = raw(Link().open().server.it)
    # The last parameter is the one of this extension.
    own = quic._serialize_transport_parameters()
    assert own.endswith(v(0x1D) + v(0))
    with pytest.raises(QuicConnectionError) as error:
        quic._parse_transport_parameters(own[:-2] + v(0x1D) + v(1) + b"x", from_session_ticket=True)
    assert error.value.error_code == QuicErrorCode.TRANSPORT_PARAMETER_ERROR
