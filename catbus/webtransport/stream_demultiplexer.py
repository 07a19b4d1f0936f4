"""What arrives on a connection: which stream is whose, and what of it is the session's."""

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
from .connect_stream import Session, State
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
from .http3_connection import MAX_BUFFERED, NEW_TOKEN, TOKEN, Http3
from .http3_error_codes import H3Code, from_http3
from .quic_configuration import Configuration
from .quic_connection import Quic
from .stream_table import BIDIRECTIONAL, HTTP3_TYPES, UNIDIRECTIONAL, Kind, Stream, Streams

_EVENT_OVERHEAD = 128
"""What an event weighs beside its data, roughly, in bytes."""

_MAX_DATAGRAMS = 256
"""That wait to be taken."""


class Demultiplexer:
    """Takes aioquic's events and makes ours of them.

    WebTransport streams do not go through aioquic's HTTP/3: it keeps something of each for as long as the connection
    lasts, and takes what comes back on a stream that we have opened for HTTP/3.
    """

    def __init__(
        self,
        configuration: Configuration,
        quic: Quic,
        events: deque[Event],
        wanted: tuple[str, str, str | None] | None,
    ) -> None:
        self.streams = Streams(quic, configuration.limits)
        self.session = Session(quic, self.streams)
        self.datagrams_waiting = 0
        self._certificate_hash = configuration.certificate_hash
        self._early: list[StreamData] = []
        self._early_size = 0
        self._early_limit = configuration.limits.early
        self._early_capsules = b""
        """What came on the session's own stream before the session was accepted, and whether that was all of it."""
        self._early_end = False
        self._events = events
        self._held: SessionRequested | None = None
        """A request of the newest drafts, until the client's settings are there."""
        self._http3: Http3 | None = None
        self._is_client = configuration.quic.is_client
        self._quic = quic
        self._wanted = wanted

    def handle(self, event: quic_events.QuicEvent) -> None:
        if isinstance(event, quic_events.StreamDataReceived):
            self._data(event)
        elif isinstance(event, quic_events.StreamReset):
            self._reset(event)
        elif isinstance(event, quic_events.StopSendingReceived):
            self._stopped(event)
        elif isinstance(event, quic_events.DatagramFrameReceived):
            self._feed_http3(event)
        elif isinstance(event, quic_events.ProtocolNegotiated):
            if event.alpn_protocol != "h3":
                self._fail(H3Code.VERSION_FALLBACK, "HTTP/3 was not agreed on")
                return
            self._http3 = self.session.http3 = Http3(self._quic)
        elif isinstance(event, quic_events.HandshakeCompleted) and not self._certificate_matches():
            self._fail(H3Code.NO_ERROR, "the server has another certificate")

    def clear(self) -> None:
        """The connection is lost."""
        self.streams.clear()
        self._early.clear()

    def _certificate_matches(self) -> bool:
        return self._certificate_hash is None or self._certificate_hash == self._quic.certificate_hash()

    def _fail(self, code: int, reason: str) -> None:
        self._quic.close(code, reason_phrase=reason)

    # Streams.

    def _data(self, event: quic_events.StreamDataReceived) -> None:
        stream = self.streams.find(event.stream_id)
        if stream is None:
            return
        stream.arrived += len(event.data)
        data: bytes | None = event.data
        if not stream.wanted:
            self.streams.consumed(stream, len(event.data))
        else:
            if stream.kind is Kind.UNKNOWN:
                data = self._classify(stream, event.data)
            if stream.kind is Kind.HTTP3:
                event.data = data or b""
                self.streams.consumed(stream, stream.arrived - stream.returned)
                self._feed_http3(event)
            elif stream.kind is Kind.SESSION and data is not None and (data or event.end_stream):
                self._session_data(stream, data, event.end_stream)
        if event.end_stream:
            if stream.kind is Kind.UNKNOWN:
                self.streams.abandon(stream, H3Code.REQUEST_CANCELLED)
            self.streams.ended(stream)

    def _classify(self, stream: Stream, data: bytes) -> bytes | None:
        """Find out what a stream is from its first bytes. What is then to be handled; None when it is not known yet."""
        stream.prefix += data
        first = varint.decode(stream.prefix)
        if first is None:
            return None
        kind, end = first
        if kind != (UNIDIRECTIONAL if stream.unidirectional else BIDIRECTIONAL):
            if stream.unidirectional and kind not in HTTP3_TYPES:
                stream.kind = Kind.FOREIGN
                self.streams.unwanted(stream, H3Code.STREAM_CREATION_ERROR)
                return None
            if not stream.unidirectional and self._is_client:
                self._fail(H3Code.STREAM_CREATION_ERROR, "a server opened a request stream")
                return None
            stream.kind = Kind.HTTP3
            whole, stream.prefix = stream.prefix, b""
            return whole
        second = varint.decode(stream.prefix, end)
        if second is None:
            return None
        stream.session, end = second
        stream.kind = Kind.SESSION
        rest, stream.prefix = stream.prefix[end:], b""
        self.streams.consumed(stream, end)
        if stream.session % 4:
            self._fail(H3Code.ID_ERROR, "no session can have this number")
            return None
        return rest

    def _session_data(self, stream: Stream, data: bytes, ended: bool) -> None:
        state = self.session.state
        if state is State.OPEN and stream.session == self.session.id:
            self._events.append(StreamData(stream.id, data, ended))
        elif state.opening:
            size = len(data) + _EVENT_OVERHEAD
            if self._early_size + size > self._early_limit:
                self.streams.abandon(stream, H3Code.BUFFERED_STREAM_REJECTED)
                return
            self._early_size += size
            self._early.append(StreamData(stream.id, data, ended))
        else:
            self.streams.abandon(stream, H3Code.SESSION_GONE)

    def _reset(self, event: quic_events.StreamReset) -> None:
        stream = self.streams.find(event.stream_id)
        if stream is None:
            return
        told = stream.kind is Kind.SESSION and stream.wanted and self.session.state is State.OPEN
        if stream.kind is Kind.HTTP3:
            self._feed_http3(event)
        elif stream.kind is Kind.UNKNOWN or self.session.state.opening:
            self.streams.reset(stream, H3Code.REQUEST_CANCELLED)
        stream.wanted = False
        self.streams.ended(stream)
        if told:
            self._events.append(StreamReset(stream.id, from_http3(event.error_code)))
        elif stream.id == self.session.id:
            self._over(None, "")

    def _stopped(self, event: quic_events.StopSendingReceived) -> None:
        stream = self.streams.find(event.stream_id)
        if stream is None or stream.kind is Kind.HTTP3:
            self._feed_http3(event)
        if stream is None:
            return
        told = stream.kind is Kind.SESSION and stream.sender is not None and self.session.state is State.OPEN
        self.streams.stopped(stream)
        if told:
            self._events.append(StreamStopped(stream.id, from_http3(event.error_code)))
        elif stream.id == self.session.id:
            self._over(None, "")

    # HTTP/3.

    def _feed_http3(self, event: quic_events.QuicEvent) -> None:
        http3 = self._http3
        if http3 is None:
            return
        for one in http3.handle_event(event):
            self._handle_http3(one)
        if isinstance(event, quic_events.StreamDataReceived) and http3.buffered(event.stream_id) > MAX_BUFFERED:
            self._fail(H3Code.EXCESSIVE_LOAD, "a frame is too large")
        if http3.received_settings is not None:
            self._settings_received(http3)

    def _settings_received(self, http3: Http3) -> None:
        """Ask for the session, or pass on the request for it, if that has waited for the peer's settings."""
        if self._wanted is not None:
            wanted, self._wanted = self._wanted, None
            try:
                token = http3.choose_token()
            except SettingsError as error:
                self._fail(H3Code.SETTINGS_ERROR, error.reason_phrase)
                return
            if token is None:
                self._fail(H3Code.REQUIREMENTS_NOT_MET, "the server does not speak WebTransport")
            else:
                self.session.request(token, *wanted)
        elif self._held is not None:
            held, self._held = self._held, None
            if self.session.state is not State.REQUESTED:
                return  # It has been withdrawn.
            if http3.meets_requirements:
                self._events.append(held)
            else:
                self.session.reject()
                self._over(None, "")

    def _handle_http3(self, event: H3Event) -> None:
        if isinstance(event, HeadersReceived):
            headers = dict(event.headers)
            if not self._is_client:
                self._requested(event.stream_id, headers)
            elif event.stream_id == self.session.id:
                self._answered(int(headers.get(b":status", b"0")))
            if event.stream_ended and event.stream_id == self.session.id:
                self._over(0, "")
        elif isinstance(event, DataReceived):
            if event.stream_id == self.session.id:
                self._capsules(event.data, event.stream_ended)
        elif isinstance(event, WebTransportStreamDataReceived):
            # Those of a session do not come this way: it stands behind something else of HTTP/3.
            self._fail(H3Code.FRAME_ERROR, "WT_STREAM inside a stream")
        elif isinstance(event, DatagramReceived):
            here = self.session.state is State.OPEN and event.stream_id == self.session.id
            if here and self.datagrams_waiting < _MAX_DATAGRAMS:
                self.datagrams_waiting += 1
                self._events.append(Datagram(event.data))

    def _requested(self, stream_id: int, headers: dict[bytes, bytes]) -> None:
        """A client's request, or what follows one (trailers have no method)."""
        stream = self.streams.get(stream_id)
        if stream is None or b":method" not in headers or self._http3 is None:
            return
        protocol = headers.get(b":protocol")
        if headers[b":method"] != b"CONNECT" or protocol not in (TOKEN, NEW_TOKEN):
            if stream.sender is not None:
                # RFC 9220 section 3: another protocol than those that we know.
                status = b"501" if protocol is not None else b"404"
                self._http3.send_headers(stream_id, [(b":status", status)], end_stream=True)
                self.streams.finish(stream)
            self._http3.forget(stream_id)
            self.streams.unwanted(stream)
        elif self.session.state is State.NONE:
            self.session.id = stream_id
            self.session.state = State.REQUESTED
            origin = headers.get(b"origin")
            request = SessionRequested(
                _text(headers.get(b":path", b"/")),
                _text(headers[b":authority"]),
                None if origin is None else _text(origin),
            )
            if protocol == NEW_TOKEN:
                self._held = request
            else:
                self._events.append(request)
        else:
            # One session a connection (draft-ietf-webtrans-http3 section 5.2).
            self._http3.forget(stream_id)
            self.streams.abandon(stream, H3Code.REQUEST_REJECTED)

    def _answered(self, status: int) -> None:
        if self.session.state is not State.REQUESTED or 100 <= status < 200:
            return
        if 200 <= status < 300:
            self.session.state = State.OPEN
            self._events.append(SessionOpened())
            self._release()
        else:
            self.session.state = State.OVER
            self._events.append(SessionRefused(status))

    def accept(self) -> bool:
        if not self.session.accept():
            return False
        self._release()
        early, self._early_capsules = self._early_capsules, b""
        if early or self._early_end:
            self._capsules(early, self._early_end)
        return True

    def _release(self) -> None:
        """Hand over what came before the session did; streams of another session are refused."""
        early, self._early = self._early, []
        for stream in self.streams:
            if stream.kind is Kind.SESSION and stream.session != self.session.id:
                self.streams.abandon(stream, H3Code.SESSION_GONE)
        for event in early:
            stream_now = self.streams.get(event.stream)
            if stream_now is not None and stream_now.wanted:
                self._events.append(event)

    # The end.

    def _capsules(self, data: bytes, ended: bool) -> None:
        if self.session.state is State.OVER:
            return
        if self.session.state is State.REQUESTED:
            self._early_capsules += data
            self._early_end = ended
            if len(self._early_capsules) > MAX_BUFFERED:
                self.session.reject()
                self._over(None, "")
            return
        try:
            close = self.session.capsules.feed(data)
        except CapsuleError:
            self.session.reject()
            self._over(None, "")
            return
        if close is not None:
            self._over(close.code, close.reason)
        elif ended:
            # An end without words is one with code 0 (draft-ietf-webtrans-http3 section 6).
            self._over(0 if self.session.capsules.between else None, "")

    def _over(self, code: int | None, reason: str) -> None:
        """The peer has ended the session."""
        if self.session.state in (State.REQUESTED, State.OPEN):
            self._events.append(SessionClosed(code, reason))
        self.session.state = State.OVER

    def close(self, code: int, reason: str) -> None:
        """We end it: nothing more is taken from the peer."""
        self.session.close(code, reason)
        for stream in self.streams:
            if stream.kind is Kind.SESSION:
                self.streams.unwanted(stream, H3Code.SESSION_GONE)

    @property
    def all_acknowledged(self) -> bool:
        return not any(stream.unacknowledged for stream in self.streams if stream.kind is Kind.SESSION)

    def send_datagram(self, data: bytes) -> bool:
        if self._http3 is None or self.session.id is None:
            return False
        self._http3.send_datagram(self.session.id, data)
        return True


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
