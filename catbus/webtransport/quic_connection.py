"""A QUIC connection of aioquic with flow control by consumption, bounded buffers, stateless resets and RESET_STREAM_AT.

Only this module and `http3_connection` use private attributes of aioquic.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from aioquic.buffer import UINT_VAR_MAX_SIZE, Buffer  # type: ignore[attr-defined]
from aioquic.quic import connection as aioquic_connection
from aioquic.quic.connection import EPOCHS, NetworkAddress, QuicConnection, QuicConnectionError, QuicReceiveContext
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import QuicErrorCode, QuicFrameType
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import FinalSizeError, QuicStream, QuicStreamSender
from aioquic.tls import Epoch
from cryptography.hazmat.primitives.serialization import Encoding

from . import varint
from .connection_ids import ALL_CONNECTION_IDS, ConnectionIdShare
from .http3_error_codes import Http3ErrorCode
from .quic_configuration import WebTransportConfiguration

MAX_RECEIVED_RANGES = 512
"""Disjoint ranges received of a stream. Packet loss in a full window leaves fewer, and searching them costs CPU."""

MAX_HANDSHAKE_BYTES = 16_384
"""Bytes of a client's handshake messages: several times what browsers send. TLS would accept 16 MiB."""

RESET_STREAM_AT = 0x24
"""The type of the frame of draft-ietf-quic-reliable-stream-reset."""
RESET_STREAM_AT_PARAMETER = 0x1D
"""The transport parameter of the same draft. Its value is empty."""

_NOT_A_VIOLATION = frozenset((QuicErrorCode.NO_ERROR, Http3ErrorCode.NO_ERROR, Http3ErrorCode.INTERNAL_ERROR))
"""Codes of a close for reasons of this side."""
_TOO_MANY_RANGES = "too many disjoint ranges"
_RESET_TOKEN_LENGTH = 16
_MIN_STATELESS_RESET = 21


def unacknowledged_bytes(sender: QuicStreamSender) -> int:
    """Bytes sent on a stream and not acknowledged, which aioquic keeps."""
    return sender._buffer_stop - sender._buffer_start


def discard_send_buffer(sender: QuicStreamSender) -> None:
    """Free the buffer of a stream that was reset. aioquic would keep it until the peer acknowledges the reset."""
    sender._buffer.clear()
    sender._buffer_start = sender._buffer_stop


def truncate_send_buffer(sender: QuicStreamSender, keep: int) -> None:
    """Drop all but the first `keep` bytes of a stream. Repeat it before every packet: a loss queues bytes again."""
    sender._pending.subtract(keep, max(keep, sender._buffer_stop, sender.highest_offset) + 1)
    if sender._buffer_stop > keep:
        del sender._buffer[keep - sender._buffer_start :]
        sender._buffer_stop = keep


class DeferredReset(NamedTuple):
    """A received RESET_STREAM_AT that takes effect when `reliable` bytes of the stream have been delivered."""

    code: int
    final: int
    reliable: int


class _DebugLogger(logging.LoggerAdapter[Any]):
    """Logs everything at `debug`. aioquic warns of each invalid packet, and a peer can send any number."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        super().log(logging.DEBUG, msg, *args, **kwargs)


class BoundedQuicConnection(QuicConnection):
    """One QUIC connection whose flow-control windows grow as data is consumed. aioquic's grow as data arrives."""

    def __init__(
        self,
        configuration: WebTransportConfiguration,
        *,
        original_destination: bytes | None = None,
        retry_source: bytes | None = None,
        reset_token: Callable[[bytes], bytes] | None = None,
        share: ConnectionIdShare = ALL_CONNECTION_IDS,
    ) -> None:
        super().__init__(
            configuration=configuration.quic,
            original_destination_connection_id=original_destination,
            retry_source_connection_id=retry_source,
        )
        self._logger: Any = _DebugLogger(self._logger, None)
        self.violation: str | None = None
        """The peer's protocol violation, if any."""
        self._window = configuration.limits.connection_window
        self._stream_window = configuration.limits.stream_window
        self._consumed = 0
        self._reset_token = reset_token
        self._share = share
        self.peer_supports_reset_stream_at = False
        """Whether the peer supports RESET_STREAM_AT."""
        self._deferred_resets: dict[int, DeferredReset] = {}
        self._pending_resets: dict[int, tuple[int, int]] = {}
        """By stream id, the error code and the bytes that the peer must acknowledge before the stream is reset."""
        self._reliable_sizes: WeakKeyDictionary[QuicStream, int] = WeakKeyDictionary()
        """The Reliable Size of streams that were reset: bytes that the peer delivers nevertheless."""
        handlers = self._QuicConnection__frame_handlers  # type: ignore[attr-defined]
        handlers[RESET_STREAM_AT] = (self._handle_reset_stream_at_frame, EPOCHS("01"))
        self._local_max_streams_bidi.value = self._local_max_streams_bidi.sent = (
            configuration.limits.incoming_bidirectional
        )
        self._local_max_streams_uni.value = self._local_max_streams_uni.sent = (
            configuration.limits.incoming_unidirectional
        )
        # aioquic keeps the first ID in three places.
        named = share.name(self._host_cids[0].cid)
        self._host_cids[0].cid = self.host_cid = self._local_initial_source_connection_id = named
        self._set_reset_tokens()

    # State of the connection.

    @property
    def has_path(self) -> bool:
        """Whether anything can be sent. A server must first receive a readable packet."""
        return bool(self._network_paths)

    @property
    def termination(self) -> ConnectionTerminated | None:
        """The reason of the close, as soon as it begins. aioquic reports its event only after draining."""
        return self._close_event

    @property
    def handshake_complete(self) -> bool:
        complete: bool = self._handshake_complete
        return complete

    @property
    def address_validated(self) -> bool:
        """Whether the peer's address has been validated (RFC 9000 section 8)."""
        retried = self._retry_source_connection_id is not None
        return retried or (bool(self._network_paths) and self._network_paths[0].is_validated)

    def stream_credit(self, bidirectional: bool) -> int:
        """The number of streams that the peer allows to open. aioquic accepts any number, and queues the rest."""
        allowed = self._remote_max_streams_bidi if bidirectional else self._remote_max_streams_uni
        return max(0, allowed - self.get_next_available_stream_id(is_unidirectional=not bidirectional) // 4)

    def stream(self, stream_id: int) -> QuicStream | None:
        """Return aioquic's stream, or None if both sides have finished it."""
        return self._streams.get(stream_id)

    @property
    def unacknowledged(self) -> int:
        """Bytes sent and not acknowledged, on all streams including those of HTTP/3."""
        return sum([unacknowledged_bytes(stream.sender) for stream in self._streams.values()])

    @property
    def queued_datagrams(self) -> int:
        return len(self._datagrams_pending)

    @property
    def peer_max_datagram_frame_size(self) -> int:
        """The largest DATAGRAM frame that the peer accepts; 0 if it accepts none (RFC 9221 section 3)."""
        return self._remote_max_datagram_frame_size or 0

    def certificate_hash(self) -> bytes:
        """The SHA-256 hash of the server's certificate."""
        certificate = self.tls._peer_certificate
        return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest() if certificate else b""

    # Closing.

    def close(
        self,
        error_code: int = QuicErrorCode.NO_ERROR,
        frame_type: int | None = None,
        reason_phrase: str = "",
    ) -> None:
        if self._close_event is None and error_code not in _NOT_A_VIOLATION:
            self.violation = reason_phrase or f"code {error_code:#x}"
        super().close(error_code, frame_type, reason_phrase)

    # Sending.

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        """Return the datagrams to send, without asking aioquic if there is nothing to send.

        aioquic starts to build a packet before it finds that there is nothing to put into it. That is half the cost of
        processing an acknowledgement, and most received packets are acknowledgements.
        """
        if self._pending_resets:
            self._send_pending_resets()
        if self._nothing_to_send(now):
            self._pacing_at = None
            return []
        return super().datagrams_to_send(now)

    def _nothing_to_send(self, now: float) -> bool:
        """Whether aioquic would return nothing and change nothing. If in doubt, return False."""
        for stream in reversed(self._streams_queue):  # The stream sent last is at the end.
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

    # Flow control.

    def consumed(self, stream: QuicStream, count: int, total: int) -> None:
        """Record `count` more consumed bytes of a stream, `total` so far, so that the peer may send as many more.

        A window is extended when half of it is free, so that few frames are sent for it.
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
        if len(stream.receiver._ranges) > MAX_RECEIVED_RANGES:
            raise QuicConnectionError(QuicErrorCode.FLOW_CONTROL_ERROR, frame_type, _TOO_MANY_RANGES)
        return stream

    def _handle_crypto_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        if len(self._crypto_streams[context.epoch].receiver._ranges) > MAX_RECEIVED_RANGES:
            raise QuicConnectionError(QuicErrorCode.CRYPTO_BUFFER_EXCEEDED, frame_type, _TOO_MANY_RANGES)
        if not self._is_client:
            begin = buf.tell()
            end = buf.pull_uint_var() + buf.pull_uint_var()
            if end > MAX_HANDSHAKE_BYTES:
                raise QuicConnectionError(
                    QuicErrorCode.CRYPTO_BUFFER_EXCEEDED, frame_type, "the handshake messages are too long"
                )
            buf.seek(begin)
        super()._handle_crypto_frame(context, frame_type, buf)

    # RESET_STREAM_AT (draft-ietf-quic-reliable-stream-reset): a reset that keeps the beginning of the stream reliable.

    def _serialize_transport_parameters(self) -> bytes:
        parameter = varint.encode(RESET_STREAM_AT_PARAMETER) + varint.encode(0)
        return super()._serialize_transport_parameters() + parameter

    def _parse_transport_parameters(self, data: bytes, from_session_ticket: bool = False) -> None:
        super()._parse_transport_parameters(data, from_session_ticket)
        position = 0
        while (parameter := varint.decode(data, position)) and (length := varint.decode(data, parameter[1])):
            if parameter[0] == RESET_STREAM_AT_PARAMETER:
                if length[0]:
                    reason = "reset_stream_at must be empty"
                    raise QuicConnectionError(QuicErrorCode.TRANSPORT_PARAMETER_ERROR, QuicFrameType.CRYPTO, reason)
                self.peer_supports_reset_stream_at = True
            position = length[1] + length[0]

    def receive_datagram(self, data: bytes, addr: NetworkAddress, now: float) -> None:
        super().receive_datagram(data, addr, now)
        if self._deferred_resets:
            self._apply_deferred_resets()
        if self._pending_resets:
            self._send_pending_resets()

    def _handle_reset_stream_at_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        stream_id, code, final, reliable = (buf.pull_uint_var() for _ in range(4))
        if reliable > final:
            raise QuicConnectionError(QuicErrorCode.FRAME_ENCODING_ERROR, frame_type, "Reliable Size over Final Size")
        self._assert_stream_can_receive(frame_type, stream_id)
        stream = self._get_or_create_stream(frame_type, stream_id)
        held = self._deferred_resets.get(stream_id)
        if held is not None:
            if code != held.code:
                raise QuicConnectionError(QuicErrorCode.STREAM_STATE_ERROR, frame_type, "Cannot change error code")
            reliable = min(reliable, held.reliable)
        receiver = stream.receiver
        more = final - receiver.highest_offset
        if more < 0 or (held is not None and final != held.final):
            raise QuicConnectionError(QuicErrorCode.FINAL_SIZE_ERROR, frame_type, "Cannot change final size")
        window = self._local_max_data
        if final > stream.max_stream_data_local or window.used + more > window.value:
            raise QuicConnectionError(QuicErrorCode.FLOW_CONTROL_ERROR, frame_type, "Over data limit")
        window.used += more
        receiver.highest_offset = final
        self._deferred_resets[stream_id] = DeferredReset(code, final, reliable)

    def _apply_deferred_resets(self) -> None:
        """Apply received resets whose reliable bytes have been delivered."""
        for stream_id, held in list(self._deferred_resets.items()):
            stream = self._streams.get(stream_id)
            if stream is not None and not stream.receiver.is_finished:
                if stream.receiver.starting_offset() < held.reliable:
                    continue
                try:
                    event = stream.receiver.handle_reset(final_size=held.final, error_code=held.code)
                except FinalSizeError as error:
                    self.close(QuicErrorCode.FINAL_SIZE_ERROR, RESET_STREAM_AT, str(error))
                    return
                if event is not None:
                    self._events.append(event)
            del self._deferred_resets[stream_id]

    def reset_reliably(self, stream_id: int, code: int, reliable: int) -> None:
        """Reset a stream whose first `reliable` bytes must still be delivered. The bytes behind them are dropped.

        The reset waits until these bytes are acknowledged, because aioquic retransmits nothing of a reset stream.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        arrived = stream.sender._buffer_start >= reliable
        if arrived or not self.peer_supports_reset_stream_at:
            if reliable and self.peer_supports_reset_stream_at:
                self._reliable_sizes[stream] = reliable
            self.reset_stream(stream_id, code)
            discard_send_buffer(stream.sender)
        else:
            self._pending_resets[stream_id] = (code, reliable)
            truncate_send_buffer(stream.sender, reliable)

    def _send_pending_resets(self) -> None:
        for stream_id, (code, reliable) in list(self._pending_resets.items()):
            stream = self._streams.get(stream_id)
            if stream is None or stream.sender._buffer_start >= reliable:
                del self._pending_resets[stream_id]
                self.reset_reliably(stream_id, code, reliable)
            else:
                truncate_send_buffer(stream.sender, reliable)

    def _write_reset_stream_frame(self, builder: QuicPacketBuilder, stream: QuicStream) -> None:
        reliable = self._reliable_sizes.get(stream)
        if reliable is None:
            super()._write_reset_stream_frame(builder, stream)
            return
        capacity = 1 + 4 * UINT_VAR_MAX_SIZE
        buffer = builder.start_frame(RESET_STREAM_AT, capacity=capacity, handler=stream.sender.on_reset_delivery)
        frame = stream.sender.get_reset_frame()
        for value in (frame.stream_id, frame.error_code, frame.final_size, reliable):
            buffer.push_uint_var(value)

    # Connection IDs and stateless resets.

    def _replenish_connection_ids(self) -> None:
        known = len(self._host_cids)
        super()._replenish_connection_ids()
        for one in self._host_cids[known:]:
            one.cid = self._share.name(one.cid)
        self._set_reset_tokens()

    def _set_reset_tokens(self) -> None:
        if self._reset_token is not None:
            for one in self._host_cids:
                one.stateless_reset_token = self._reset_token(one.cid)

    def is_stateless_reset(self, data: bytes) -> bool:
        """Whether the datagram is a stateless reset by a server that lost this connection (RFC 9000 section 10.3.1)."""
        if not self._is_client or len(data) < _MIN_STATELESS_RESET or data[0] & 0x80:
            return False
        tokens = (one.stateless_reset_token for one in (self._peer_cid, *self._peer_cid_available))
        return any(len(token) == _RESET_TOKEN_LENGTH and hmac.compare_digest(data[-16:], token) for token in tokens)
