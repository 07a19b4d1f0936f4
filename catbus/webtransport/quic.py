"""QUIC as aioquic speaks it, with what it leaves to us: windows, bounds, reset tokens.

This module and `http3` are the only ones that touch aioquic's private attributes.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic import connection as aioquic_connection
from aioquic.quic.connection import NetworkAddress, QuicConnection, QuicConnectionError, QuicReceiveContext
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import QuicErrorCode, QuicFrameType
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream, QuicStreamSender
from aioquic.tls import Epoch
from cryptography.hazmat.primitives.serialization import Encoding

from .configuration import Configuration

MAX_HOLES = 512
"""In what has arrived of a stream. Packets lost from a full window leave fewer; looking through them costs time."""

MAX_CRYPTO = 16_384
"""Bytes that a client's part of a handshake may have: several times of what browsers send. TLS would take 16 MiB."""

_HOLES = "more holes than loss leaves"
_RESET_TOKEN = 16
_SMALLEST_RESET = 21


def unacknowledged(sender: QuicStreamSender) -> int:
    """Bytes of one stream that were handed over and not acknowledged: what aioquic keeps of them."""
    return sender._buffer_stop - sender._buffer_start


def forget(sender: QuicStreamSender) -> None:
    """Let go of what a stream that has been reset will never send; aioquic keeps it until the peer acknowledges."""
    sender._buffer.clear()
    sender._buffer_start = sender._buffer_stop


class Quic(QuicConnection):
    """One QUIC connection whose windows follow what has been consumed, where aioquic's follow what has arrived."""

    def __init__(
        self,
        configuration: Configuration,
        *,
        original_destination: bytes | None = None,
        retry_source: bytes | None = None,
        reset_token: Callable[[bytes], bytes] | None = None,
    ) -> None:
        super().__init__(
            configuration=configuration.quic,
            original_destination_connection_id=original_destination,
            retry_source_connection_id=retry_source,
        )
        self._window = configuration.limits.connection_window
        self._stream_window = configuration.limits.stream_window
        self._consumed = 0
        self._reset_token = reset_token
        self._local_max_streams_bidi.value = self._local_max_streams_bidi.sent = configuration.limits.bidirectional
        self._local_max_streams_uni.value = self._local_max_streams_uni.sent = configuration.limits.unidirectional
        self._set_reset_tokens()

    # What the connection is doing.

    @property
    def has_path(self) -> bool:
        """Whether anything can be sent: a server has first to receive a packet that can be read."""
        return bool(self._network_paths)

    @property
    def ending(self) -> ConnectionTerminated | None:
        """Why the connection ends, from the moment that it does. aioquic's event comes when the draining is over."""
        return self._close_event

    def stream_credit(self, bidirectional: bool) -> int:
        """How many more streams the peer lets us open. aioquic takes any number, and keeps what it cannot send."""
        allowed = self._remote_max_streams_bidi if bidirectional else self._remote_max_streams_uni
        return max(0, allowed - self.get_next_available_stream_id(is_unidirectional=not bidirectional) // 4)

    def stream(self, stream_id: int) -> QuicStream | None:
        """The stream as aioquic keeps it, unless both sides are done with it."""
        return self._streams.get(stream_id)

    @property
    def unacknowledged(self) -> int:
        """Bytes handed over and not acknowledged, on all streams, HTTP/3's own included."""
        return sum([unacknowledged(stream.sender) for stream in self._streams.values()])

    @property
    def waiting_datagrams(self) -> int:
        return len(self._datagrams_pending)

    @property
    def max_datagram_frame(self) -> int:
        """The largest DATAGRAM frame that the peer takes; 0 when it takes none (RFC 9221 section 3)."""
        return self._remote_max_datagram_frame_size or 0

    def certificate_hash(self) -> bytes:
        """The SHA-256 of the server's certificate."""
        certificate = self.tls._peer_certificate
        return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest() if certificate else b""

    # Sending.

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        """As aioquic has it, which begins a packet to find out that there is nothing to put into it.

        That is half of what an acknowledgement costs, and an acknowledgement is what mostly arrives.
        """
        if self._nothing_to_send(now):
            self._pacing_at = None
            return []
        return super().datagrams_to_send(now)

    def _nothing_to_send(self, now: float) -> bool:
        """Whether aioquic would return nothing and change nothing. When in doubt it is asked."""
        for stream in reversed(self._streams_queue):  # What was sent last stands there.
            sender, receiver = stream.sender, stream.receiver
            if not sender.buffer_is_empty or sender.reset_pending or receiver.stop_pending:
                return False
            if sender.is_finished and receiver.is_finished:
                return False
        space = self._spaces[Epoch.ONE_RTT]
        path = self._network_paths[0]
        if (
            (space.ack_at is not None and space.ack_at <= now)
            or not self._handshake_confirmed
            or self._close_pending
            or self._ping_pending
            or self._probe_pending
            or self._datagrams_pending
            or self._retire_connection_ids
            or self._streams_blocked_pending
            or self._handshake_done_pending
            or not self._crypto_streams[Epoch.ONE_RTT].sender.buffer_is_empty
            or len(self._network_paths) > 1
            or not path.is_validated
            or path.remote_challenges
            or self._remote_preferred_address is not None
        ):
            return False
        for limit in (self._local_max_data, self._local_max_streams_bidi, self._local_max_streams_uni):
            if limit.value != limit.sent:
                return False
        for stream in self._streams.values():
            if stream.max_stream_data_local != stream.max_stream_data_local_sent:
                return False
        return all(one.was_sent for one in self._host_cids)

    # Windows.

    def consumed(self, stream: QuicStream, count: int, total: int) -> None:
        """Of this stream, `count` more bytes are done with, `total` now: the peer may send as many more.

        A window moves when half of it is free, so that a frame about it is rare.
        """
        self._consumed += count
        limit = self._local_max_data
        if self._consumed + self._window - limit.value >= self._window // 2:
            limit.value = self._consumed + self._window
        if total + self._stream_window - stream.max_stream_data_local >= self._stream_window // 2:
            stream.max_stream_data_local = total + self._stream_window

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        for limit in (self._local_max_data, self._local_max_streams_bidi, self._local_max_streams_uni):
            if limit.value != limit.sent:
                buffer = builder.start_frame(
                    limit.frame_type,
                    capacity=aioquic_connection.CONNECTION_LIMIT_FRAME_CAPACITY,
                    handler=self._on_connection_limit_delivery,
                    handler_args=(limit,),
                )
                buffer.push_uint_var(limit.value)
                limit.sent = limit.value

    def _write_stream_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream) -> None:
        if stream.max_stream_data_local_sent == stream.max_stream_data_local or stream.receiver.is_finished:
            return
        buffer = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=aioquic_connection.MAX_STREAM_DATA_FRAME_CAPACITY,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        assert stream.stream_id is not None
        buffer.push_uint_var(stream.stream_id)
        buffer.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local

    # Bounds.

    def _get_or_create_stream(self, frame_type: int, stream_id: int) -> QuicStream:
        stream = super()._get_or_create_stream(frame_type, stream_id)
        if len(stream.receiver._ranges) > MAX_HOLES:
            raise QuicConnectionError(QuicErrorCode.FLOW_CONTROL_ERROR, frame_type, _HOLES)
        return stream

    def _handle_crypto_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        if len(self._crypto_streams[context.epoch].receiver._ranges) > MAX_HOLES:
            raise QuicConnectionError(QuicErrorCode.CRYPTO_BUFFER_EXCEEDED, frame_type, _HOLES)
        if not self._is_client:
            begin = buf.tell()
            end = buf.pull_uint_var() + buf.pull_uint_var()
            if end > MAX_CRYPTO:
                raise QuicConnectionError(QuicErrorCode.CRYPTO_BUFFER_EXCEEDED, frame_type, "the handshake is too long")
            buf.seek(begin)
        super()._handle_crypto_frame(context, frame_type, buf)

    # Stateless resets.

    def _replenish_connection_ids(self) -> None:
        super()._replenish_connection_ids()
        self._set_reset_tokens()

    def _set_reset_tokens(self) -> None:
        if self._reset_token is not None:
            for one in self._host_cids:
                one.stateless_reset_token = self._reset_token(one.cid)

    def is_stateless_reset(self, data: bytes) -> bool:
        """Whether this is a server's word that it knows nothing of this connection (RFC 9000 section 10.3.1)."""
        if not self._is_client or len(data) < _SMALLEST_RESET or data[0] & 0x80:
            return False
        tokens = (one.stateless_reset_token for one in (self._peer_cid, *self._peer_cid_available))
        return any(len(token) == _RESET_TOKEN and hmac.compare_digest(data[-16:], token) for token in tokens)
