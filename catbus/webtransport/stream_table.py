"""The table of a connection's streams, with the accounting of their received and unacknowledged bytes."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

from aioquic.quic.connection import stream_is_client_initiated, stream_is_unidirectional
from aioquic.quic.stream import QuicStream, QuicStreamSender

from . import varint
from .http3_error_codes import Http3ErrorCode
from .quic_configuration import ConnectionLimits
from .quic_connection import BoundedQuicConnection, discard_send_buffer, unacknowledged_bytes

UNIDIRECTIONAL_STREAM_TYPE = 0x54
"""The type of a session's unidirectional stream (draft-ietf-webtrans-http3 section 4.2)."""

BIDIRECTIONAL_SIGNAL = 0x41
"""The signal value at the start of a session's bidirectional stream (draft-ietf-webtrans-http3 section 4.3)."""

HTTP3_STREAM_TYPES = range(4)
"""The types of HTTP/3's unidirectional streams: control, push, and two of QPACK."""


class StreamKind(Enum):
    UNKNOWN = auto()
    """The first bytes, which determine the kind, have not all arrived."""
    HTTP3 = auto()
    SESSION = auto()
    UNSUPPORTED = auto()
    """A stream of an unknown type (RFC 9114 section 6.2.3)."""


class Stream:
    """One stream. It is kept until nothing remains to be sent, acknowledged, received or consumed."""

    __slots__ = (
        "consumed",
        "header_length",
        "id",
        "kind",
        "prefix",
        "quic",
        "received",
        "receiving",
        "send_finished",
        "sender",
        "session_id",
        "wanted",
    )

    def __init__(self, quic: QuicStream, kind: StreamKind, *, unidirectional: bool, ours: bool) -> None:
        assert quic.stream_id is not None
        self.id: int = quic.stream_id
        self.quic = quic
        self.kind = kind
        self.session_id: int | None = None
        self.prefix = b""
        self.header_length = 0
        """Length of the header with the session id, on a stream of this side. A reset must not drop the header."""
        self.received = 0
        """Bytes received in order."""
        self.consumed = 0
        """Received bytes that were consumed."""
        self.receiving = not (unidirectional and ours)
        """Whether the peer has neither finished nor reset the stream."""
        self.wanted = True
        """Whether further data is reported. Otherwise it is dropped."""
        self.sender: QuicStreamSender | None = quic.sender if ours or not unidirectional else None
        """aioquic's sender; None when it no longer keeps data to send."""
        self.send_finished = False
        """Whether this side has finished or reset the stream."""

    @property
    def unidirectional(self) -> bool:
        return stream_is_unidirectional(self.id)

    @property
    def unacknowledged(self) -> int:
        return unacknowledged_bytes(self.sender) if self.sender else 0

    @property
    def finished(self) -> bool:
        return self.sender is None and not self.receiving and self.consumed == self.received


class StreamTable:
    """The streams of a connection that are not finished."""

    def __init__(self, quic: BoundedQuicConnection, limits: ConnectionLimits) -> None:
        self._quic = quic
        self._limits = limits
        self._streams: dict[int, Stream] = {}
        self._outgoing: set[int] = set()
        """Ids of this side's streams that aioquic may still keep: a reset one until the reset is acknowledged."""
        self._awaiting_acknowledgement: set[int] = set()
        self._unacknowledged: int | None = 0

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams.values()))

    def __len__(self) -> int:
        return len(self._streams)

    def get(self, stream_id: int) -> Stream | None:
        return self._streams.get(stream_id)

    def get_or_create(self, stream_id: int) -> Stream | None:
        """Return the stream that a frame has arrived for. The frame may open it. None if aioquic does not know it."""
        stream = self._streams.get(stream_id)
        if stream is None:
            quic = self._quic.stream(stream_id)
            if quic is None or stream_is_client_initiated(stream_id) == self._quic.configuration.is_client:
                return None
            stream = self._add(quic, StreamKind.UNKNOWN, ours=False)
        return stream

    def register(self, stream_id: int) -> Stream:
        """Add a stream of HTTP/3 that this side has opened."""
        quic = self._quic.stream(stream_id)
        assert quic is not None
        return self._add(quic, StreamKind.HTTP3, ours=True)

    def _add(self, quic: QuicStream, kind: StreamKind, *, ours: bool) -> Stream:
        assert quic.stream_id is not None
        stream = Stream(quic, kind, unidirectional=stream_is_unidirectional(quic.stream_id), ours=ours)
        self._streams[stream.id] = stream
        return stream

    def clear(self) -> None:
        """Drop all streams and their buffers: the connection is lost."""
        for stream in self:
            if stream.sender:
                discard_send_buffer(stream.sender)
        self._streams.clear()
        self._outgoing.clear()
        self._awaiting_acknowledgement.clear()
        self._unacknowledged = 0

    # Sending.

    def credit(self, bidirectional: bool) -> int:
        self._outgoing = {number for number in self._outgoing if self._quic.stream(number) is not None}
        return min(self._quic.stream_credit(bidirectional), max(0, self._limits.outgoing_streams - len(self._outgoing)))

    def open(self, session: int, bidirectional: bool) -> int | None:
        if not self.credit(bidirectional):
            return None
        stream_id = self._quic.get_next_available_stream_id(is_unidirectional=not bidirectional)
        prefix = varint.encode(BIDIRECTIONAL_SIGNAL if bidirectional else UNIDIRECTIONAL_STREAM_TYPE) + varint.encode(
            session
        )
        self._quic.send_stream_data(stream_id, prefix)
        self._unacknowledged = None
        stream = self.register(stream_id)
        stream.kind = StreamKind.SESSION
        stream.session_id = session
        stream.header_length = len(prefix)
        self._outgoing.add(stream_id)
        return stream_id

    @property
    def unacknowledged(self) -> int:
        if self._unacknowledged is None:
            self._unacknowledged = self._quic.unacknowledged
        return self._unacknowledged

    def recount_unacknowledged(self) -> None:
        """Recompute the unacknowledged bytes after a received packet, and remove streams that are acknowledged."""
        self._unacknowledged = None
        if self._awaiting_acknowledgement:
            for stream_id in list(self._awaiting_acknowledgement):
                stream = self._streams[stream_id]
                if stream.sender is None or stream.sender.is_finished:
                    self._stop_sending(stream)

    def writable(self, stream: Stream) -> bool:
        sender = stream.sender
        if sender is None or stream.send_finished:
            return False
        held, limits = unacknowledged_bytes(sender), self._limits
        return held < limits.stream_minimum or (
            held < limits.stream_unacknowledged and self.unacknowledged < limits.unacknowledged
        )

    def send(self, stream: Stream, data: bytes, end: bool) -> bool:
        if stream.sender is None or stream.send_finished or (data and not self.writable(stream)):
            return False
        self._quic.send_stream_data(stream.id, data, end)
        if self._unacknowledged is not None:
            self._unacknowledged += len(data)
        if end:
            self.finish(stream)
        return True

    def finish(self, stream: Stream) -> None:
        """Mark a stream as completely sent. Its sending side is removed when the peer has acknowledged it."""
        stream.send_finished = True
        self._awaiting_acknowledgement.add(stream.id)

    def reset(self, stream: Stream, code: int) -> bool:
        """Reset a stream. Return False if it is already reset or completely acknowledged."""
        if stream.sender is None:
            return False
        self._quic.reset_reliably(stream.id, code, stream.header_length)
        self._stop_sending(stream)
        return True

    def peer_stopped(self, stream: Stream) -> None:
        """Handle STOP_SENDING of the peer, for which aioquic has reset the stream."""
        if stream.sender is not None:
            discard_send_buffer(stream.sender)
        self._stop_sending(stream)

    def _stop_sending(self, stream: Stream) -> None:
        self._unacknowledged = None
        stream.sender = None
        stream.send_finished = True
        self._awaiting_acknowledgement.discard(stream.id)
        self._remove_if_finished(stream)

    # Receiving.

    def consumed(self, stream: Stream, count: int) -> None:
        count = min(count, stream.received - stream.consumed)
        if count > 0:
            stream.consumed += count
            self._quic.consumed(stream.quic, count, stream.consumed)
            self._remove_if_finished(stream)

    def receive_ended(self, stream: Stream) -> None:
        """Mark a stream as completely received. Bytes that a reset omits count against the connection's window, too."""
        stream.receiving = False
        stream.received = stream.quic.receiver.highest_offset
        if not stream.wanted:
            self.consumed(stream, stream.received - stream.consumed)
        self._remove_if_finished(stream)

    def stop_receiving(self, stream: Stream, code: int = Http3ErrorCode.NO_ERROR) -> bool:
        """Send STOP_SENDING, and treat data that still arrives as consumed."""
        if not stream.wanted or not (stream.receiving or stream.received > stream.consumed):
            return False
        stream.wanted = False
        stream.prefix = b""
        if stream.receiving and not stream.quic.receiver.is_finished:
            self._quic.stop_stream(stream.id, code)
        self.consumed(stream, stream.received - stream.consumed)
        return True

    def abandon(self, stream: Stream, code: int) -> None:
        """Reset the sending side, and stop the receiving side."""
        self.reset(stream, code)
        self.stop_receiving(stream, code)

    def _remove_if_finished(self, stream: Stream) -> None:
        if stream.finished:
            self._streams.pop(stream.id, None)
