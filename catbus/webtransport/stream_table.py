"""The streams of one connection, and how many bytes each holds of ours and of the peer's."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

from aioquic.quic.connection import stream_is_client_initiated, stream_is_unidirectional
from aioquic.quic.stream import QuicStream, QuicStreamSender

from . import varint
from .http3_error_codes import H3Code
from .quic_configuration import Limits
from .quic_connection import Quic, forget, unacknowledged

UNIDIRECTIONAL = 0x54
"""The type of a session's unidirectional stream (draft-ietf-webtrans-http3 section 4.2)."""

BIDIRECTIONAL = 0x41
"""What a session's bidirectional stream begins with (draft-ietf-webtrans-http3 section 4.3)."""

HTTP3_TYPES = range(4)
"""Control, push, and the two of QPACK."""


class Kind(Enum):
    UNKNOWN = auto()
    """What says it has not all arrived."""
    HTTP3 = auto()
    SESSION = auto()
    FOREIGN = auto()
    """Of a type that means nothing to us (RFC 9114 section 6.2.3)."""


class Stream:
    """One stream. It lasts until there is nothing left to send, to acknowledge, to receive or to consume."""

    __slots__ = (
        "arrived",
        "ended",
        "header",
        "id",
        "kind",
        "prefix",
        "quic",
        "receiving",
        "returned",
        "sender",
        "session",
        "wanted",
    )

    def __init__(self, quic: QuicStream, kind: Kind, *, unidirectional: bool, ours: bool) -> None:
        assert quic.stream_id is not None
        self.id: int = quic.stream_id
        self.quic = quic
        self.kind = kind
        self.session: int | None = None
        self.prefix = b""
        self.header = 0
        """Bytes that say whose stream it is, where it is one of ours: a reset must not take them away."""
        self.arrived = 0
        """Bytes received, in order."""
        self.returned = 0
        """Of these, how many are done with."""
        self.receiving = not (unidirectional and ours)
        """Until the peer ends or resets it."""
        self.wanted = True
        """Until we do not care for the rest."""
        self.sender: QuicStreamSender | None = quic.sender if ours or not unidirectional else None
        """While aioquic may keep something to send."""
        self.ended = False
        """Whether we have sent all that we will."""

    @property
    def unidirectional(self) -> bool:
        return stream_is_unidirectional(self.id)

    @property
    def unacknowledged(self) -> int:
        return unacknowledged(self.sender) if self.sender else 0

    @property
    def over(self) -> bool:
        return self.sender is None and not self.receiving and self.returned == self.arrived


class Streams:
    """All streams that are not over."""

    def __init__(self, quic: Quic, limits: Limits) -> None:
        self._quic = quic
        self._limits = limits
        self._streams: dict[int, Stream] = {}
        self._opened: set[int] = set()
        """Those of ours that aioquic may still keep: it keeps one that was reset until the peer acknowledges that."""
        self._ending: set[int] = set()
        self._unacknowledged: int | None = 0

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams.values()))

    def __len__(self) -> int:
        return len(self._streams)

    def get(self, stream_id: int) -> Stream | None:
        return self._streams.get(stream_id)

    def find(self, stream_id: int) -> Stream | None:
        """A stream that something arrived for, which the peer may have opened with it."""
        stream = self._streams.get(stream_id)
        if stream is None:
            quic = self._quic.stream(stream_id)
            if quic is None or stream_is_client_initiated(stream_id) == self._quic.configuration.is_client:
                return None
            stream = self._add(quic, Kind.UNKNOWN, ours=False)
        return stream

    def adopt(self, stream_id: int) -> Stream:
        """A stream of HTTP/3 that we have opened."""
        quic = self._quic.stream(stream_id)
        assert quic is not None
        return self._add(quic, Kind.HTTP3, ours=True)

    def _add(self, quic: QuicStream, kind: Kind, *, ours: bool) -> Stream:
        assert quic.stream_id is not None
        stream = Stream(quic, kind, unidirectional=stream_is_unidirectional(quic.stream_id), ours=ours)
        self._streams[stream.id] = stream
        return stream

    def clear(self) -> None:
        """The connection is lost: nothing arrives or leaves any more."""
        for stream in self:
            if stream.sender:
                forget(stream.sender)
        self._streams.clear()
        self._opened.clear()
        self._ending.clear()
        self._unacknowledged = 0

    # Outwards.

    def credit(self, bidirectional: bool) -> int:
        self._opened = {number for number in self._opened if self._quic.stream(number) is not None}
        return min(self._quic.stream_credit(bidirectional), max(0, self._limits.opened - len(self._opened)))

    def open(self, session: int, bidirectional: bool) -> int | None:
        if not self.credit(bidirectional):
            return None
        stream_id = self._quic.get_next_available_stream_id(is_unidirectional=not bidirectional)
        prefix = varint.encode(BIDIRECTIONAL if bidirectional else UNIDIRECTIONAL) + varint.encode(session)
        self._quic.send_stream_data(stream_id, prefix)
        self._unacknowledged = None
        stream = self.adopt(stream_id)
        stream.kind = Kind.SESSION
        stream.session = session
        stream.header = len(prefix)
        self._opened.add(stream_id)
        return stream_id

    @property
    def unacknowledged(self) -> int:
        if self._unacknowledged is None:
            self._unacknowledged = self._quic.unacknowledged
        return self._unacknowledged

    def something_arrived(self) -> None:
        """Count again what is not acknowledged, and let go of what is."""
        self._unacknowledged = None
        if self._ending:
            for stream_id in list(self._ending):
                stream = self._streams[stream_id]
                if stream.sender is None or stream.sender.is_finished:
                    self._stop_sending(stream)

    def writable(self, stream: Stream) -> bool:
        sender = stream.sender
        if sender is None or stream.ended:
            return False
        held, limits = unacknowledged(sender), self._limits
        return held < limits.stream_share or (
            held < limits.stream_unacknowledged and self.unacknowledged < limits.unacknowledged
        )

    def send(self, stream: Stream, data: bytes, end: bool) -> bool:
        if stream.sender is None or stream.ended or (data and not self.writable(stream)):
            return False
        self._quic.send_stream_data(stream.id, data, end)
        if self._unacknowledged is not None:
            self._unacknowledged += len(data)
        if end:
            self.finish(stream)
        return True

    def finish(self, stream: Stream) -> None:
        """All of it has been handed over; when it has been acknowledged, this side is done with."""
        stream.ended = True
        self._ending.add(stream.id)

    def reset(self, stream: Stream, code: int) -> bool:
        """Send no more, and have the peer told so."""
        if stream.sender is None:
            return False
        self._quic.reset_reliably(stream.id, code, stream.header)
        self._stop_sending(stream)
        return True

    def stopped(self, stream: Stream) -> None:
        """aioquic has reset the stream, for the peer's STOP_SENDING."""
        if stream.sender is not None:
            forget(stream.sender)
        self._stop_sending(stream)

    def _stop_sending(self, stream: Stream) -> None:
        self._unacknowledged = None
        stream.sender = None
        stream.ended = True
        self._ending.discard(stream.id)
        self._tidy(stream)

    # Inwards.

    def consumed(self, stream: Stream, count: int) -> None:
        count = min(count, stream.arrived - stream.returned)
        if count > 0:
            stream.returned += count
            self._quic.consumed(stream.quic, count, stream.returned)
            self._tidy(stream)

    def ended(self, stream: Stream) -> None:
        """Nothing more will arrive. What a reset leaves out counts against the connection's window all the same."""
        stream.receiving = False
        stream.arrived = stream.quic.receiver.highest_offset
        if not stream.wanted:
            self.consumed(stream, stream.arrived - stream.returned)
        self._tidy(stream)

    def unwanted(self, stream: Stream, code: int = H3Code.NO_ERROR) -> bool:
        """Ask the peer to stop, and take what still comes as consumed."""
        if not stream.wanted or not (stream.receiving or stream.arrived > stream.returned):
            return False
        stream.wanted = False
        stream.prefix = b""
        if stream.receiving and not stream.quic.receiver.is_finished:
            self._quic.stop_stream(stream.id, code)
        self.consumed(stream, stream.arrived - stream.returned)
        return True

    def abandon(self, stream: Stream, code: int) -> None:
        """Both of the above, in both directions."""
        self.reset(stream, code)
        self.unwanted(stream, code)

    def _tidy(self, stream: Stream) -> None:
        if stream.over:
            self._streams.pop(stream.id, None)
