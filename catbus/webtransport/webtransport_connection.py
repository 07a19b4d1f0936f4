"""One QUIC connection that carries one WebTransport session, on either side. No I/O, no clock.

The caller passes in datagrams and times. After every call of `receive_datagram`, `handle_timer` or another method that
changes something, take the events, send the result of `datagrams_to_send`, then read `timer` again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from aioquic.quic import events as quic_events
from aioquic.quic.packet import QuicErrorCode, QuicFrameType

from . import varint
from .connect_stream import ConnectState
from .connection_ids import ALL_CONNECTION_IDS, ConnectionIdShare
from .connectionless_packets import ID_LENGTH, MAX_PACKET_SIZE
from .events import ConnectionIdIssued, ConnectionIdRetired, ConnectionLost, Datagram, Event, Terminated
from .http3_error_codes import Http3ErrorCode, to_http3_error_code
from .quic_configuration import WebTransportConfiguration
from .quic_connection import BoundedQuicConnection
from .stream_demultiplexer import StreamDemultiplexer
from .stream_table import Stream, StreamKind

Address = Any
"""The peer's socket address. It is only compared, and returned with the datagrams for it."""

_DATAGRAM_OVERHEAD = 1 + 20 + 4 + 16 + 3
"""Bytes of first byte, connection ID, packet number and tag, and of the frame's type and length, at their maximum."""


class WebTransportConnection:
    """The state of one connection. No input from a peer makes a method raise.

    `consumed` bounds how much the peer may send, `writable` how much this side may send.

    Order of events: SessionRequested or SessionOpened; StreamData and others; SessionClosed if the peer closes; then
    ConnectionLost, exactly once, whichever side ended the connection; then Terminated.
    """

    def __init__(
        self,
        configuration: WebTransportConfiguration,
        quic: BoundedQuicConnection,
        wanted: tuple[str, str, str | None] | None,
    ) -> None:
        """Use `server` or `client` instead."""
        self._configuration = configuration
        self._limits = configuration.limits
        self._quic = quic
        self._events: deque[Event] = deque()
        self._demultiplexer = StreamDemultiplexer(configuration, quic, self._events, wanted)
        self._streams = self._demultiplexer.streams
        self._connect_stream = self._demultiplexer.connect_stream
        self._deadline: float | None = None
        self._trusted = wanted is not None
        self._last_received = 0.0
        self._silence_pinged = False
        """Whether an unauthenticated client was pinged since its last packet. It may be idle, but it must be alive."""
        self._pinging = False
        self._lost = False
        self._terminated = False
        self._failed = False
        self._ids: set[bytes] = {quic.host_cid}

    @classmethod
    def server(
        cls,
        configuration: WebTransportConfiguration,
        original_destination: bytes,
        *,
        retry_source: bytes | None = None,
        reset_token: Callable[[bytes], bytes] | None = None,
        share: ConnectionIdShare = ALL_CONNECTION_IDS,
    ) -> WebTransportConnection:
        """Make the connection for a client's first Initial packet. Then pass that packet to `receive_datagram`.

        `original_destination` is the connection ID that the client chose, and `retry_source` the one that a Retry
        packet gave it. `reset_token` returns the 16-byte stateless reset token of a connection ID. All IDs that the
        connection issues are in `share`.
        """
        quic = BoundedQuicConnection(
            configuration,
            original_destination=original_destination,
            retry_source=retry_source,
            reset_token=reset_token,
            share=share,
        )
        connection = cls(configuration, quic, None)
        connection._ids.add(retry_source or original_destination)
        return connection

    @classmethod
    def client(
        cls,
        configuration: WebTransportConfiguration,
        address: Address,
        now: float,
        *,
        authority: str,
        path: str = "/",
        origin: str | None = None,
    ) -> WebTransportConnection:
        """Start a connection to `address` and request a session at `https://<authority><path>`."""
        quic = BoundedQuicConnection(configuration)
        connection = cls(configuration, quic, (authority, path, origin))
        connection._deadline = now + configuration.limits.session_timeout
        quic.connect(address, now)
        return connection

    # Datagrams, timers and events.

    @property
    def connection_ids(self) -> frozenset[bytes]:
        """The connection IDs of this connection. ConnectionIdIssued and ConnectionIdRetired report changes."""
        return frozenset(self._ids)

    @property
    def address_validated(self) -> bool:
        """Whether the peer's address has been validated (RFC 9000 section 8)."""
        return self._quic.address_validated

    @property
    def violation(self) -> str | None:
        """The violation of QUIC or HTTP/3 by the peer that ended the connection, if any."""
        return self._quic.violation

    @property
    def peer_address(self) -> Address | None:
        """The peer's current address. It can change (connection migration)."""
        return self._quic.get_peer_address()

    @property
    def timer(self) -> float | None:
        """When to call `handle_timer`. Every call can change it, `datagrams_to_send` above all."""
        if self._terminated:
            return None
        at = self._quic.get_timer()
        for other in (self._deadline, None if self._trusted else self._silence_deadline):
            if other is not None and (at is None or other < at):
                at = other
        return at

    def receive_datagram(self, data: bytes, address: Address, now: float) -> None:
        """Process a UDP datagram. An invalid one is ignored; a protocol violation ends the connection."""
        if self._terminated or len(data) > MAX_PACKET_SIZE:
            return
        self._last_received, self._silence_pinged = now, False
        if self._deadline is None and not self._lost and self._connect_stream.state is ConnectState.NONE:
            self._deadline = now + self._limits.session_timeout
        try:
            self._quic.receive_datagram(data, address, now)
            self._take_events()
            self._streams.recount_unacknowledged()
            self._advance_close(now)
        except Exception as error:  # noqa: BLE001 - an error that a peer's bytes cause ends that peer's connection only
            self._fail(error)
        # A stateless reset has random bytes in the place of the connection ID.
        if data[1 : 1 + ID_LENGTH] not in self._ids and not self._lost and self._quic.is_stateless_reset(data):
            self._mark_lost("the server no longer knows this connection")
            self._terminate()

    def handle_timer(self, now: float) -> None:
        """Process the timers that have expired. May be called at any time."""
        if self._terminated:
            return
        try:
            at = self._quic.get_timer()
            if at is not None and at <= now:
                self._quic.handle_timer(now)
            if self._deadline is not None and self._deadline <= now and self._connect_stream.state.before_open:
                self.close("no session was requested in time")
            if self._silence_deadline is not None and self._silence_deadline <= now:
                self._ping_or_give_up()
            self._take_events()
            self._advance_close(now)
        except Exception as error:  # noqa: BLE001
            self._fail(error)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Address]]:
        """Return the datagrams to send now. Take the events before sending them: this issues connection IDs."""
        if self._terminated or not self._quic.has_path:
            return []
        try:
            self._advance_close(now)
            datagrams: list[tuple[bytes, Address]] = self._quic.datagrams_to_send(now)
            self._take_events()
        except Exception as error:  # noqa: BLE001
            self._fail(error)
            return []
        return datagrams

    def next_event(self) -> Event | None:
        """Return the next event, or None."""
        if not self._events:
            return None
        event = self._events.popleft()
        if type(event) is Datagram:
            self._demultiplexer.datagrams_waiting -= 1
        return event

    def events(self) -> Iterator[Event]:
        """Iterate over the waiting events."""
        while (event := self.next_event()) is not None:
            yield event

    # The session.

    @property
    def session_open(self) -> bool:
        """Whether streams and datagrams can be sent."""
        return self._connect_stream.state is ConnectState.OPEN and not self._lost

    def accept(self) -> bool:
        """Accept the requested session. Return False if the client no longer waits for it."""
        return not self._lost and self._demultiplexer.accept()

    def refuse(self, status: int, now: float) -> bool:
        """Reply to the session request with this HTTP status, then close the connection."""
        if self._lost or not self._connect_stream.refuse(status):
            return False
        self._deadline = now + self._limits.close_timeout
        return True

    def close_session(self, code: int, reason: str, now: float) -> bool:
        """Close the session with a 32-bit code and a reason, of which 1,024 bytes are sent.

        Data that was sent before is delivered first, within `ConnectionLimits.close_timeout`. Nothing more can be sent,
        and received data is dropped. Then the connection closes by itself: ConnectionLost. Return False if no session
        is open.
        """
        if not self.session_open:
            return False
        self._demultiplexer.close(code, reason)
        self._deadline = now + self._limits.close_timeout
        self._advance_close(now)
        return True

    def close(self, reason: str = "") -> None:
        """Close the connection immediately, without delivering waiting data: ConnectionLost."""
        self._quic.close(Http3ErrorCode.NO_ERROR, reason_phrase=reason)
        self._detect_close()

    @property
    def trusted(self) -> bool:
        """Whether `trust` was called. A client always trusts its server."""
        return self._trusted

    def trust(self) -> None:
        """Mark the client as authenticated: `ConnectionLimits.silence_timeout` no longer applies."""
        self._trusted = True

    def ping(self) -> None:
        """Send a PING frame, which keeps the connection alive. Does nothing while another one is unacknowledged."""
        if not self._pinging and not self._lost:
            self._pinging = True
            self._quic.send_ping(0)

    # Streams and datagrams.

    def stream_credit(self, *, bidirectional: bool) -> int:
        """The number of streams that can be opened now."""
        return self._streams.credit(bidirectional) if self.session_open else 0

    def open_stream(self, *, bidirectional: bool) -> int | None:
        """Open a stream and return its id. Return None without credit or without a session."""
        if not self.session_open or self._connect_stream.id is None:
            return None
        return self._streams.open(self._connect_stream.id, bidirectional)

    def send(self, stream: int, data: bytes, end: bool = False) -> bool:
        """Send all of `data` on a stream. With `end`, finish the stream.

        Return False, and send nothing, if the stream is unknown, finished, reset, stopped or not `writable`.
        """
        found = self._session_stream(stream)
        return found is not None and self.session_open and self._streams.send(found, data, end)

    def writable(self, stream: int) -> bool:
        """Whether `send` accepts data: the stream is open, and the limits on unacknowledged data are not reached."""
        found = self._session_stream(stream)
        return found is not None and self.session_open and self._streams.writable(found)

    def unacknowledged(self, stream: int | None = None) -> int:
        """Bytes sent and not acknowledged by the peer, on one stream or on all together."""
        if stream is None:
            return self._streams.unacknowledged
        found = self._session_stream(stream)
        return found.unacknowledged if found else 0

    def reset(self, stream: int, code: int) -> bool:
        """Reset a stream with an error code. Return False if there was nothing more to send."""
        found = self._session_stream(stream)
        return found is not None and self._streams.reset(found, to_http3_error_code(code))

    def stop_sending(self, stream: int, code: int) -> bool:
        """Ask the peer to stop sending on a stream, with an error code. Data that still arrives is dropped."""
        found = self._session_stream(stream)
        return found is not None and self._streams.stop_receiving(found, to_http3_error_code(code))

    def consumed(self, stream: int, count: int) -> None:
        """Report that `count` bytes of StreamData were processed, so that the peer may send as many more."""
        found = self._session_stream(stream)
        if found is not None:
            self._streams.consumed(found, count)

    @property
    def unconsumed(self) -> int:
        """Bytes received on the session's streams and not yet consumed."""
        return sum([one.received - one.consumed for one in self._streams if one.kind is StreamKind.SESSION])

    @property
    def max_datagram_size(self) -> int:
        """The size of the largest datagram that fits into a packet; 0 if the peer accepts none."""
        if not self.session_open or self._connect_stream.id is None:
            return 0
        room = self._configuration.quic.max_datagram_size - _DATAGRAM_OVERHEAD
        return max(
            0, min(room, self._quic.peer_max_datagram_frame_size - 3) - len(varint.encode(self._connect_stream.id // 4))
        )

    def send_datagram(self, data: bytes) -> bool:
        """Send a datagram, at most once. Return False if it is too large or the queue is full."""
        if len(data) > self.max_datagram_size or self._quic.queued_datagrams >= self._limits.queued_datagrams:
            return False
        return self._demultiplexer.send_datagram(data)

    # Internals.

    def _session_stream(self, stream_id: int) -> Stream | None:
        stream = self._streams.get(stream_id)
        return stream if stream and stream.kind is StreamKind.SESSION else None

    def _take_events(self) -> None:
        while (event := self._quic.next_event()) is not None:
            if isinstance(event, quic_events.ConnectionIdIssued):
                self._ids.add(event.connection_id)
                self._events.append(ConnectionIdIssued(event.connection_id))
            elif isinstance(event, quic_events.ConnectionIdRetired):
                self._ids.discard(event.connection_id)
                self._events.append(ConnectionIdRetired(event.connection_id))
            elif isinstance(event, quic_events.ConnectionTerminated):
                self._mark_lost(_reason(event))
                self._terminate()
            elif isinstance(event, quic_events.PingAcknowledged):
                self._pinging = False
            elif not self._lost:
                self._demultiplexer.handle(event)
                self._detect_close()
        self._detect_close()

    @property
    def _silence_deadline(self) -> float | None:
        """When a silent unauthenticated client is pinged, and after that, when its connection is dropped."""
        if self._trusted or self._lost or not self._quic.has_path:
            return None
        asked = self._silence_pinged or not self._quic.handshake_complete
        return self._last_received + (self._limits.silence_timeout if asked else self._limits.silence_timeout / 2)

    def _ping_or_give_up(self) -> None:
        if self._quic.handshake_complete and not self._silence_pinged:
            self._silence_pinged = True
            self.ping()
        else:
            self._mark_lost("the client is gone")
            self._terminate()

    def _advance_close(self, now: float) -> None:
        """Take the next step of the close, if it is due."""
        state = self._connect_stream.state
        if state is ConnectState.OPEN:
            self._deadline = None
        elif state is ConnectState.CLOSING and self._deadline is not None:
            if not self._connect_stream.close_sent:
                if self._demultiplexer.all_acknowledged or now >= self._deadline:
                    self._connect_stream.send_close()
                    self._deadline = now + self._limits.close_timeout
            elif self._connect_stream.close_acknowledged:
                self._close_quic()
            elif now >= self._deadline:
                self.close()
        elif state is ConnectState.CLOSED and not self._lost:
            self._close_quic()

    def _close_quic(self) -> None:
        """Close the connection after its session.

        The code is QUIC's NO_ERROR (RFC 9000 section 20.1), not HTTP/3's: Chromium may process the close of the
        connection before it has reported the close of the session to its page, and treats every other code as a failed
        session.
        """
        self._quic.close(QuicErrorCode.NO_ERROR, frame_type=QuicFrameType.PADDING)
        self._detect_close()

    def _detect_close(self) -> None:
        """Report the loss when the close begins. aioquic reports it when draining is complete."""
        ending = self._quic.termination
        if ending is None or self._lost:
            return
        self._mark_lost(_reason(ending))
        if not self._quic.has_path:
            self._terminate()

    def _mark_lost(self, reason: str, fault: Exception | None = None) -> None:
        if not self._lost:
            self._lost = True
            self._deadline = None
            self._connect_stream.state = ConnectState.CLOSED
            self._demultiplexer.clear()
            self._events.append(ConnectionLost(reason, fault))

    def _terminate(self) -> None:
        if not self._terminated:
            self._terminated = True
            self._events.append(Terminated())

    def _fail(self, error: Exception) -> None:
        """Handle an internal error: close and report it. If closing fails too, terminate."""
        again, self._failed = self._failed, True
        self._quic.close(Http3ErrorCode.INTERNAL_ERROR)
        self._mark_lost(f"internal error: {type(error).__name__}", error)
        if again or not self._quic.has_path:
            self._terminate()


def _reason(ending: quic_events.ConnectionTerminated) -> str:
    if ending.reason_phrase:
        return ending.reason_phrase
    return "closed" if ending.error_code in (0, Http3ErrorCode.NO_ERROR) else f"closed with code {ending.error_code:#x}"
