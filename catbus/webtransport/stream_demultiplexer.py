"""The demultiplexer of a connection: assigns received streams to HTTP/3 or to the session, and makes events of them."""

from __future__ import annotations

from collections import deque

from aioquic.h3.connection import SettingsError
from aioquic.h3.events import (
    DatagramReceived,
    DataReceived,
    H3Event,
    HeadersReceived,
    WebTransportStreamDataReceived,
)
from aioquic.quic import events as quic_events

from . import varint
from .capsules import CapsuleError
from .connect_stream import ConnectState, ConnectStream
from .events import (
    Datagram,
    Event,
    SessionClosed,
    SessionOpened,
    SessionRefused,
    SessionRequested,
    StreamData,
    StreamReset,
    StreamStopped,
)
from .http3_connection import MAX_BUFFERED_FRAME, PROTOCOL_TOKEN, PROTOCOL_TOKEN_DRAFT_15, Http3Connection
from .http3_error_codes import Http3ErrorCode, from_http3_error_code
from .quic_configuration import WebTransportConfiguration
from .quic_connection import BoundedQuicConnection
from .stream_table import (
    BIDIRECTIONAL_SIGNAL,
    HTTP3_STREAM_TYPES,
    UNIDIRECTIONAL_STREAM_TYPE,
    Stream,
    StreamKind,
    StreamTable,
)

CERTIFICATE_HASH_MISMATCH = "the server's certificate does not have the expected hash"
"""The reason of the close when `client_configuration` was given the hash of another certificate."""

_EVENT_OVERHEAD = 128
"""Approximate bytes of memory of an event, without its data."""

_MAX_QUEUED_DATAGRAMS = 256
"""Received datagrams that wait for `next_event`. More are dropped."""


class StreamDemultiplexer:
    """Converts aioquic's events into those of `events`.

    The session's streams bypass aioquic's HTTP/3: it keeps state of each stream for as long as the connection lasts,
    and would parse the peer's data on a stream that this side opened as HTTP/3.
    """

    def __init__(
        self,
        configuration: WebTransportConfiguration,
        quic: BoundedQuicConnection,
        events: deque[Event],
        wanted: tuple[str, str, str | None] | None,
    ) -> None:
        self.streams = StreamTable(quic, configuration.limits)
        self.connect_stream = ConnectStream(quic, self.streams)
        self.datagrams_waiting = 0
        self._certificate_hash = configuration.certificate_hash
        self._early_data: list[StreamData] = []
        self._early_size = 0
        self._early_limit = configuration.limits.early_stream_data
        self._early_capsules = b""
        """Capsule data that arrived before the session was accepted. `_early_end`: whether the stream ended with it."""
        self._early_end = False
        self._events = events
        self._pending_request: SessionRequested | None = None
        """A request of draft 15 or later, until the client's SETTINGS arrive."""
        self._http3: Http3Connection | None = None
        self._is_client = configuration.quic.is_client
        self._quic = quic
        self._session_request = wanted

    def handle(self, event: quic_events.QuicEvent) -> None:
        if isinstance(event, quic_events.StreamDataReceived):
            self._handle_stream_data(event)
        elif isinstance(event, quic_events.StreamReset):
            self._handle_reset(event)
        elif isinstance(event, quic_events.StopSendingReceived):
            self._handle_stop_sending(event)
        elif isinstance(event, quic_events.DatagramFrameReceived):
            self._feed_http3(event)
        elif isinstance(event, quic_events.ProtocolNegotiated):
            if event.alpn_protocol != "h3":
                self._close_with_error(Http3ErrorCode.VERSION_FALLBACK, "HTTP/3 was not negotiated")
                return
            self._http3 = self.connect_stream.http3 = Http3Connection(self._quic)
        elif isinstance(event, quic_events.HandshakeCompleted) and not self._certificate_matches():
            self._close_with_error(Http3ErrorCode.NO_ERROR, CERTIFICATE_HASH_MISMATCH)

    def clear(self) -> None:
        """Drop all streams and early data: the connection is lost."""
        self.streams.clear()
        self._early_data.clear()

    def _certificate_matches(self) -> bool:
        return self._certificate_hash is None or self._certificate_hash == self._quic.certificate_hash()

    def _close_with_error(self, code: int, reason: str) -> None:
        self._quic.close(code, reason_phrase=reason)

    # Streams.

    def _handle_stream_data(self, event: quic_events.StreamDataReceived) -> None:
        stream = self.streams.get_or_create(event.stream_id)
        if stream is None:
            return
        stream.received += len(event.data)
        data: bytes | None = event.data
        if not stream.wanted:
            self.streams.consumed(stream, len(event.data))
        else:
            if stream.kind is StreamKind.UNKNOWN:
                data = self._classify(stream, event.data)
            if stream.kind is StreamKind.HTTP3:
                event.data = data or b""
                self.streams.consumed(stream, stream.received - stream.consumed)
                self._feed_http3(event)
            elif stream.kind is StreamKind.SESSION and data is not None and (data or event.end_stream):
                self._handle_session_data(stream, data, event.end_stream)
        if event.end_stream:
            if stream.kind is StreamKind.UNKNOWN:
                self.streams.abandon(stream, Http3ErrorCode.REQUEST_CANCELLED)
            self.streams.receive_ended(stream)

    def _classify(self, stream: Stream, data: bytes) -> bytes | None:
        """Determine a stream's kind from its first bytes. Return the data behind them, or None if it is undecided."""
        stream.prefix += data
        first = varint.decode(stream.prefix)
        if first is None:
            return None
        kind, end = first
        if kind != (UNIDIRECTIONAL_STREAM_TYPE if stream.unidirectional else BIDIRECTIONAL_SIGNAL):
            if stream.unidirectional and kind not in HTTP3_STREAM_TYPES:
                stream.kind = StreamKind.UNSUPPORTED
                self.streams.stop_receiving(stream, Http3ErrorCode.STREAM_CREATION_ERROR)
                return None
            if not stream.unidirectional and self._is_client:
                self._close_with_error(Http3ErrorCode.STREAM_CREATION_ERROR, "a server opened a request stream")
                return None
            stream.kind = StreamKind.HTTP3
            whole, stream.prefix = stream.prefix, b""
            return whole
        second = varint.decode(stream.prefix, end)
        if second is None:
            return None
        stream.session_id, end = second
        stream.kind = StreamKind.SESSION
        rest, stream.prefix = stream.prefix[end:], b""
        self.streams.consumed(stream, end)
        if stream.session_id % 4:
            self._close_with_error(Http3ErrorCode.ID_ERROR, "this is not a valid session id")
            return None
        return rest

    def _handle_session_data(self, stream: Stream, data: bytes, ended: bool) -> None:
        state = self.connect_stream.state
        if state is ConnectState.OPEN and stream.session_id == self.connect_stream.id:
            self._events.append(StreamData(stream.id, data, ended))
        elif state.before_open:
            size = len(data) + _EVENT_OVERHEAD
            if self._early_size + size > self._early_limit:
                self.streams.abandon(stream, Http3ErrorCode.BUFFERED_STREAM_REJECTED)
                return
            self._early_size += size
            self._early_data.append(StreamData(stream.id, data, ended))
        else:
            self.streams.abandon(stream, Http3ErrorCode.SESSION_GONE)

    def _handle_reset(self, event: quic_events.StreamReset) -> None:
        stream = self.streams.get_or_create(event.stream_id)
        if stream is None:
            return
        reported = (
            stream.kind is StreamKind.SESSION and stream.wanted and self.connect_stream.state is ConnectState.OPEN
        )
        if stream.kind is StreamKind.HTTP3:
            self._feed_http3(event)
        elif stream.kind is StreamKind.UNKNOWN or self.connect_stream.state.before_open:
            self.streams.reset(stream, Http3ErrorCode.REQUEST_CANCELLED)
        stream.wanted = False
        self.streams.receive_ended(stream)
        if reported:
            self._events.append(StreamReset(stream.id, from_http3_error_code(event.error_code)))
        elif stream.id == self.connect_stream.id:
            self._peer_ended_session(None, "")

    def _handle_stop_sending(self, event: quic_events.StopSendingReceived) -> None:
        stream = self.streams.get_or_create(event.stream_id)
        if stream is None or stream.kind is StreamKind.HTTP3:
            self._feed_http3(event)
        if stream is None:
            return
        reported = (
            stream.kind is StreamKind.SESSION
            and stream.sender is not None
            and self.connect_stream.state is ConnectState.OPEN
        )
        self.streams.peer_stopped(stream)
        if reported:
            self._events.append(StreamStopped(stream.id, from_http3_error_code(event.error_code)))
        elif stream.id == self.connect_stream.id:
            self._peer_ended_session(None, "")

    # HTTP/3.

    def _feed_http3(self, event: quic_events.QuicEvent) -> None:
        http3 = self._http3
        if http3 is None:
            return
        for one in http3.handle_event(event):
            self._handle_http3(one)
        if (
            isinstance(event, quic_events.StreamDataReceived)
            and http3.buffered_bytes(event.stream_id) > MAX_BUFFERED_FRAME
        ):
            self._close_with_error(Http3ErrorCode.EXCESSIVE_LOAD, "a frame is too large")
        if http3.received_settings is not None:
            self._settings_received(http3)

    def _settings_received(self, http3: Http3Connection) -> None:
        """Send the session request, or report the received one, if it waited for the peer's SETTINGS."""
        if self._session_request is not None:
            wanted, self._session_request = self._session_request, None
            try:
                token = http3.choose_protocol_token()
            except SettingsError as error:
                self._close_with_error(Http3ErrorCode.SETTINGS_ERROR, error.reason_phrase)
                return
            if token is None:
                self._close_with_error(Http3ErrorCode.REQUIREMENTS_NOT_MET, "the server does not support WebTransport")
            else:
                self.connect_stream.request(token, *wanted)
        elif self._pending_request is not None:
            held, self._pending_request = self._pending_request, None
            if self.connect_stream.state is not ConnectState.REQUESTED:
                return  # The client has withdrawn the request.
            if http3.meets_draft_15_requirements:
                self._events.append(held)
            else:
                self.connect_stream.reset_as_malformed()
                self._peer_ended_session(None, "")

    def _handle_http3(self, event: H3Event) -> None:
        if isinstance(event, HeadersReceived):
            headers = dict(event.headers)
            if not self._is_client:
                self._handle_request(event.stream_id, headers)
            elif event.stream_id == self.connect_stream.id:
                self._handle_response(int(headers.get(b":status", b"0")))
            if event.stream_ended and event.stream_id == self.connect_stream.id:
                self._peer_ended_session(0, "")
        elif isinstance(event, DataReceived):
            if event.stream_id == self.connect_stream.id:
                self._handle_capsule_data(event.data, event.stream_ended)
        elif isinstance(event, WebTransportStreamDataReceived):
            # Streams of a session bypass HTTP/3, so this one has WT_STREAM behind another frame of HTTP/3.
            self._close_with_error(Http3ErrorCode.FRAME_ERROR, "WT_STREAM inside a stream")
        elif isinstance(event, DatagramReceived):
            here = self.connect_stream.state is ConnectState.OPEN and event.stream_id == self.connect_stream.id
            if here and self.datagrams_waiting < _MAX_QUEUED_DATAGRAMS:
                self.datagrams_waiting += 1
                self._events.append(Datagram(event.data))

    def _handle_request(self, stream_id: int, headers: dict[bytes, bytes]) -> None:
        """Handle the header block of a client's request. A block without a method is a trailer and ignored."""
        stream = self.streams.get(stream_id)
        if stream is None or b":method" not in headers or self._http3 is None:
            return
        protocol = headers.get(b":protocol")
        if headers[b":method"] != b"CONNECT" or protocol not in (PROTOCOL_TOKEN, PROTOCOL_TOKEN_DRAFT_15):
            if stream.sender is not None:
                # RFC 9220 section 3: 501 for an unsupported protocol.
                status = b"501" if protocol is not None else b"404"
                self._http3.send_headers(stream_id, [(b":status", status)], end_stream=True)
                self.streams.finish(stream)
            self._http3.forget_request(stream_id)
            self.streams.stop_receiving(stream)
        elif self.connect_stream.state is ConnectState.NONE:
            self.connect_stream.id = stream_id
            self.connect_stream.state = ConnectState.REQUESTED
            origin = headers.get(b"origin")
            request = SessionRequested(
                _text(headers.get(b":path", b"/")),
                _text(headers[b":authority"]),
                None if origin is None else _text(origin),
            )
            if protocol == PROTOCOL_TOKEN_DRAFT_15:
                self._pending_request = request
            else:
                self._events.append(request)
        else:
            # One session per connection (draft-ietf-webtrans-http3 section 5.2).
            self._http3.forget_request(stream_id)
            self.streams.abandon(stream, Http3ErrorCode.REQUEST_REJECTED)

    def _handle_response(self, status: int) -> None:
        if self.connect_stream.state is not ConnectState.REQUESTED or 100 <= status < 200:
            return
        if 200 <= status < 300:
            self.connect_stream.state = ConnectState.OPEN
            self._events.append(SessionOpened())
            self._deliver_early_data()
        else:
            self.connect_stream.state = ConnectState.CLOSED
            self._events.append(SessionRefused(status))

    def accept(self) -> bool:
        if not self.connect_stream.accept():
            return False
        self._deliver_early_data()
        early, self._early_capsules = self._early_capsules, b""
        if early or self._early_end:
            self._handle_capsule_data(early, self._early_end)
        return True

    def _deliver_early_data(self) -> None:
        """Report the data that arrived before the session was open. Streams of other sessions are reset."""
        early, self._early_data = self._early_data, []
        for stream in self.streams:
            if stream.kind is StreamKind.SESSION and stream.session_id != self.connect_stream.id:
                self.streams.abandon(stream, Http3ErrorCode.SESSION_GONE)
        for event in early:
            stream_now = self.streams.get(event.stream)
            if stream_now is not None and stream_now.wanted:
                self._events.append(event)

    # Closing the session.

    def _handle_capsule_data(self, data: bytes, ended: bool) -> None:
        if self.connect_stream.state is ConnectState.CLOSED:
            return
        if self.connect_stream.state is ConnectState.REQUESTED:
            self._early_capsules += data
            self._early_end = ended
            if len(self._early_capsules) > MAX_BUFFERED_FRAME:
                self.connect_stream.reset_as_malformed()
                self._peer_ended_session(None, "")
            return
        try:
            close = self.connect_stream.capsules.feed(data)
        except CapsuleError:
            self.connect_stream.reset_as_malformed()
            self._peer_ended_session(None, "")
            return
        if close is not None:
            self._peer_ended_session(close.code, close.reason)
        elif ended:
            # The end of the stream without a close capsule means code 0 (draft-ietf-webtrans-http3 section 6).
            self._peer_ended_session(0 if self.connect_stream.capsules.at_boundary else None, "")

    def _peer_ended_session(self, code: int | None, reason: str) -> None:
        """Handle the end of the session by the peer."""
        if self.connect_stream.state in (ConnectState.REQUESTED, ConnectState.OPEN):
            self._events.append(SessionClosed(code, reason))
        self.connect_stream.state = ConnectState.CLOSED

    def close(self, code: int, reason: str) -> None:
        """Close the session from this side. Data from the peer is no longer accepted."""
        self.connect_stream.close(code, reason)
        for stream in self.streams:
            if stream.kind is StreamKind.SESSION:
                self.streams.stop_receiving(stream, Http3ErrorCode.SESSION_GONE)

    @property
    def all_acknowledged(self) -> bool:
        return not any(stream.unacknowledged for stream in self.streams if stream.kind is StreamKind.SESSION)

    def send_datagram(self, data: bytes) -> bool:
        if self._http3 is None or self.connect_stream.id is None:
            return False
        self._http3.send_datagram(self.connect_stream.id, data)
        return True


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
