"""One QUIC connection that carries one WebTransport session, on either side. No I/O, no clock.

Whoever drives a `Connection` passes on datagrams and times. After every `receive_datagram`, `handle_timer` and verb:
take the events, send what `datagrams_to_send` returns, then look at `timer` again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from aioquic.quic import events as quic_events
from aioquic.quic.packet import QuicErrorCode, QuicFrameType

from . import varint
from .connect_stream import State
from .connectionless_packets import ID_LENGTH, MAX_PACKET
from .events import ConnectionLost, Datagram, Event, IdIssued, IdRetired, Terminated
from .http3_error_codes import H3Code, to_http3
from .quic_configuration import Configuration
from .quic_connection import Quic
from .stream_demultiplexer import Demultiplexer
from .stream_table import Kind, Stream

Address = Any
"""What the socket calls the peer. Only compared, and returned with what is to be sent there."""

_DATAGRAM_OVERHEAD = 1 + 20 + 4 + 16 + 3
"""First byte, connection ID, packet number, tag; type and length of the frame: each as large as it may be."""


class Connection:
    """The state of one connection. Nothing that a peer sends makes a method raise.

    What a peer may send is bounded by what is `consumed` of its streams; what we may, by `writable`.

    Events: SessionRequested or SessionOpened, StreamData and the like, SessionClosed when the peer closes,
    then ConnectionLost, once, whoever ended it, then Terminated.
    """

    def __init__(self, configuration: Configuration, quic: Quic, wanted: tuple[str, str, str | None] | None) -> None:
        """Use `server` or `client`."""
        self._configuration = configuration
        self._limits = configuration.limits
        self._quic = quic
        self._events: deque[Event] = deque()
        self._demultiplexer = Demultiplexer(configuration, quic, self._events, wanted)
        self._streams = self._demultiplexer.streams
        self._session = self._demultiplexer.session
        self._deadline: float | None = None
        self._trusted = wanted is not None
        self._heard = 0.0
        self._asked = False
        """Whether a newcomer was pinged since something was heard of it: it may be silent, but it has to be there."""
        self._pinging = False
        self._lost = False
        self._terminated = False
        self._broken = False
        self._ids: set[bytes] = {quic.host_cid}

    @classmethod
    def server(
        cls,
        configuration: Configuration,
        original_destination: bytes,
        *,
        retry_source: bytes | None = None,
        reset_token: Callable[[bytes], bytes] | None = None,
    ) -> Connection:
        """For a client's first Initial, which is then passed to `receive_datagram`.

        `original_destination` is the connection ID that the client chose; after a Retry, `retry_source` is the one
        that the Retry gave it. `reset_token` makes the 16 bytes with which a connection ID is reset without state.
        """
        quic = Quic(
            configuration,
            original_destination=original_destination,
            retry_source=retry_source,
            reset_token=reset_token,
        )
        connection = cls(configuration, quic, None)
        connection._ids.add(retry_source or original_destination)
        return connection

    @classmethod
    def client(
        cls,
        configuration: Configuration,
        address: Address,
        now: float,
        *,
        authority: str,
        path: str = "/",
        origin: str | None = None,
    ) -> Connection:
        """Begin a connection to `address` and ask for a session at `https://<authority><path>`."""
        quic = Quic(configuration)
        connection = cls(configuration, quic, (authority, path, origin))
        connection._deadline = now + configuration.limits.opening
        quic.connect(address, now)
        return connection

    # Driving it.

    @property
    def connection_ids(self) -> frozenset[bytes]:
        """Packets to these belong to this connection; IdIssued and IdRetired tell of changes."""
        return frozenset(self._ids)

    @property
    def address_validated(self) -> bool:
        """Whether the peer is known to be where its packets say that they come from."""
        return self._quic.address_validated

    @property
    def violation(self) -> str | None:
        """How the peer broke the rules of QUIC or HTTP/3, if that is why the connection ends."""
        return self._quic.violation

    @property
    def peer_address(self) -> Address | None:
        """Where the peer is just now; it may move."""
        return self._quic.get_peer_address()

    @property
    def timer(self) -> float | None:
        """When to call `handle_timer`. Changes with everything, `datagrams_to_send` above all."""
        if self._terminated:
            return None
        at = self._quic.get_timer()
        for other in (self._deadline, None if self._trusted else self._patience):
            if other is not None and (at is None or other < at):
                at = other
        return at

    def receive_datagram(self, data: bytes, address: Address, now: float) -> None:
        """Take a UDP datagram. One that is no good is ignored; one that breaks the rules ends the connection."""
        if self._terminated or len(data) > MAX_PACKET:
            return
        self._heard, self._asked = now, False
        if self._deadline is None and not self._lost and self._session.state is State.NONE:
            self._deadline = now + self._limits.opening
        try:
            self._quic.receive_datagram(data, address, now)
            self._take_events()
            self._streams.something_arrived()
            self._go_on(now)
        except Exception as error:  # noqa: BLE001 - whatever a peer's bytes set off ends that peer's connection only
            self._break(error)
        # Where a connection ID would stand, a stateless reset has noise.
        if data[1 : 1 + ID_LENGTH] not in self._ids and not self._lost and self._quic.is_stateless_reset(data):
            self._lose("the server does not know this connection any more")
            self._terminate()

    def handle_timer(self, now: float) -> None:
        """What is due by now. May be called at any time."""
        if self._terminated:
            return
        try:
            at = self._quic.get_timer()
            if at is not None and at <= now:
                self._quic.handle_timer(now)
            if self._deadline is not None and self._deadline <= now and self._session.state.opening:
                self.close("no session in time")
            if self._patience is not None and self._patience <= now:
                self._ask_or_give_up()
            self._take_events()
            self._go_on(now)
        except Exception as error:  # noqa: BLE001
            self._break(error)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Address]]:
        """What is to be sent now, and where. Take the events before it goes out: connection IDs are issued here."""
        if self._terminated or not self._quic.has_path:
            return []
        try:
            self._go_on(now)
            datagrams: list[tuple[bytes, Address]] = self._quic.datagrams_to_send(now)
            self._take_events()
        except Exception as error:  # noqa: BLE001
            self._break(error)
            return []
        return datagrams

    def next_event(self) -> Event | None:
        """The next event, if there is one."""
        if not self._events:
            return None
        event = self._events.popleft()
        if type(event) is Datagram:
            self._demultiplexer.datagrams_waiting -= 1
        return event

    def events(self) -> Iterator[Event]:
        """All events that there are."""
        while (event := self.next_event()) is not None:
            yield event

    # The session.

    @property
    def session_open(self) -> bool:
        """Whether streams and datagrams can be sent."""
        return self._session.state is State.OPEN and not self._lost

    def accept(self) -> bool:
        """Open the session that was asked for. False when nobody waits for it any more."""
        return not self._lost and self._demultiplexer.accept()

    def refuse(self, status: int, now: float) -> bool:
        """Answer the request for a session with this HTTP status, then close the connection."""
        if self._lost or not self._session.refuse(status):
            return False
        self._deadline = now + self._limits.closing
        return True

    def close_session(self, code: int, reason: str, now: float) -> bool:
        """End the session with a code of 32 bits and a reason, of which 1,024 bytes arrive.

        What has been sent before arrives first, for which it has `Limits.closing`. Nothing more can be sent, and what
        comes is dropped. Then the connection closes by itself: ConnectionLost. False when no session is open.
        """
        if not self.session_open:
            return False
        self._demultiplexer.close(code, reason)
        self._deadline = now + self._limits.closing
        self._go_on(now)
        return True

    def close(self, reason: str = "") -> None:
        """Close the connection at once, whatever is under way: ConnectionLost."""
        self._quic.close(H3Code.NO_ERROR, reason_phrase=reason)
        self._notice()

    @property
    def trusted(self) -> bool:
        """Whether `trust` was called; a client trusts its server."""
        return self._trusted

    def trust(self) -> None:
        """The peer of a server is no newcomer any more: `Limits.silence` does not hold for it."""
        self._trusted = True

    def ping(self) -> None:
        """Make the peer answer, which keeps the connection alive. Does nothing while one is unanswered."""
        if not self._pinging and not self._lost:
            self._pinging = True
            self._quic.send_ping(0)

    # Streams and datagrams.

    def stream_credit(self, *, bidirectional: bool) -> int:
        """How many more streams can be opened just now."""
        return self._streams.credit(bidirectional) if self.session_open else 0

    def open_stream(self, *, bidirectional: bool) -> int | None:
        """Open a stream and return its number; None when there is no credit or no session."""
        if not self.session_open or self._session.id is None:
            return None
        return self._streams.open(self._session.id, bidirectional)

    def send(self, stream: int, data: bytes, end: bool = False) -> bool:
        """Send all of `data` on a stream, and with `end` nothing after it.

        False, and nothing is sent, when the stream is unknown, ended, reset or stopped, or not `writable`.
        """
        found = self._mine(stream)
        return found is not None and self.session_open and self._streams.send(found, data, end)

    def writable(self, stream: int) -> bool:
        """Whether `send` takes more: the stream is open, and neither it nor the connection holds too much already."""
        found = self._mine(stream)
        return found is not None and self.session_open and self._streams.writable(found)

    def unacknowledged(self, stream: int | None = None) -> int:
        """Bytes handed over that the peer has not acknowledged, on one stream or on all together."""
        if stream is None:
            return self._streams.unacknowledged
        found = self._mine(stream)
        return found.unacknowledged if found else 0

    def reset(self, stream: int, code: int) -> bool:
        """Give up sending on a stream, telling the peer `code`. False when there was nothing more to send."""
        found = self._mine(stream)
        return found is not None and self._streams.reset(found, to_http3(code))

    def stop_sending(self, stream: int, code: int) -> bool:
        """Tell the peer that the rest of a stream is not wanted, and why. What still comes is dropped."""
        found = self._mine(stream)
        return found is not None and self._streams.unwanted(found, to_http3(code))

    def consumed(self, stream: int, count: int) -> None:
        """Say that `count` bytes of StreamData are done with, so that the peer may send as many more."""
        found = self._mine(stream)
        if found is not None:
            self._streams.consumed(found, count)

    @property
    def unconsumed(self) -> int:
        """Bytes that came on streams of the session and have not been consumed."""
        return sum([one.arrived - one.returned for one in self._streams if one.kind is Kind.SESSION])

    @property
    def max_datagram_size(self) -> int:
        """The largest datagram that fits into a packet; 0 when the peer takes none."""
        if not self.session_open or self._session.id is None:
            return 0
        room = self._configuration.quic.max_datagram_size - _DATAGRAM_OVERHEAD
        return max(0, min(room, self._quic.max_datagram_frame - 3) - len(varint.encode(self._session.id // 4)))

    def send_datagram(self, data: bytes) -> bool:
        """Send a datagram, at most once. False when it is too large, or too many wait already."""
        if len(data) > self.max_datagram_size or self._quic.waiting_datagrams >= self._limits.datagrams:
            return False
        return self._demultiplexer.send_datagram(data)

    # Inside.

    def _mine(self, stream_id: int) -> Stream | None:
        stream = self._streams.get(stream_id)
        return stream if stream and stream.kind is Kind.SESSION else None

    def _take_events(self) -> None:
        while (event := self._quic.next_event()) is not None:
            if isinstance(event, quic_events.ConnectionIdIssued):
                self._ids.add(event.connection_id)
                self._events.append(IdIssued(event.connection_id))
            elif isinstance(event, quic_events.ConnectionIdRetired):
                self._ids.discard(event.connection_id)
                self._events.append(IdRetired(event.connection_id))
            elif isinstance(event, quic_events.ConnectionTerminated):
                self._lose(_reason(event))
                self._terminate()
            elif isinstance(event, quic_events.PingAcknowledged):
                self._pinging = False
            elif not self._lost:
                self._demultiplexer.handle(event)
                self._notice()
        self._notice()

    @property
    def _patience(self) -> float | None:
        """When a newcomer that says nothing is asked whether it is there, and then when it is given up."""
        if self._trusted or self._lost or not self._quic.has_path:
            return None
        asked = self._asked or not self._quic.handshake_complete
        return self._heard + (self._limits.silence if asked else self._limits.silence / 2)

    def _ask_or_give_up(self) -> None:
        if self._quic.handshake_complete and not self._asked:
            self._asked = True
            self.ping()
        else:
            self._lose("the newcomer has gone")
            self._terminate()

    def _go_on(self, now: float) -> None:
        """Close what can be closed by now."""
        state = self._session.state
        if state is State.OPEN:
            self._deadline = None
        elif state is State.CLOSING and self._deadline is not None:
            if not self._session.said:
                if self._demultiplexer.all_acknowledged or now >= self._deadline:
                    self._session.say_goodbye()
                    self._deadline = now + self._limits.closing
            elif self._session.heard:
                self._leave()
            elif now >= self._deadline:
                self.close()
        elif state is State.OVER and not self._lost:
            self._leave()

    def _leave(self) -> None:
        """The session has ended, and so does the connection.

        With the code of QUIC (RFC 9000 section 20.1), not with HTTP/3's: Chromium may see the connection close before
        it has told its page how the session did, and takes every other code for a failure of the session.
        """
        self._quic.close(QuicErrorCode.NO_ERROR, frame_type=QuicFrameType.PADDING)
        self._notice()

    def _notice(self) -> None:
        """Tell of the end when it begins; aioquic does when it is complete."""
        ending = self._quic.ending
        if ending is None or self._lost:
            return
        self._lose(_reason(ending))
        if not self._quic.has_path:
            self._terminate()

    def _lose(self, reason: str, fault: Exception | None = None) -> None:
        if not self._lost:
            self._lost = True
            self._deadline = None
            self._session.state = State.OVER
            self._demultiplexer.clear()
            self._events.append(ConnectionLost(reason, fault))

    def _terminate(self) -> None:
        if not self._terminated:
            self._terminated = True
            self._events.append(Terminated())

    def _break(self, error: Exception) -> None:
        """What should not happen: close, say so, and if that fails too, have done with it."""
        again, self._broken = self._broken, True
        self._quic.close(H3Code.INTERNAL_ERROR)
        self._lose(f"internal error: {type(error).__name__}", error)
        if again or not self._quic.has_path:
            self._terminate()


def _reason(ending: quic_events.ConnectionTerminated) -> str:
    if ending.reason_phrase:
        return ending.reason_phrase
    return "closed" if ending.error_code in (0, H3Code.NO_ERROR) else f"closed with code {ending.error_code:#x}"
