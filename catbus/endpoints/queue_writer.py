"""What writes a send queue to a connection over TCP: the same for WebSocket and for event streams."""

from __future__ import annotations

from ..delivery.encoded_messages import QueueItem
from ..delivery.send_queue import SendQueue, size_of_replies
from .connection_registry import ConnectionRegistry
from .item_encoder import ItemEncoder
from .socket_writer import SocketWriter

WRITE_SIZE = 65_536
"""Bytes taken from the send queue at a time, approximately, and only after the kernel took those before: messages in
send queues are shared, counted, and can be read from the log again. Of the unsent bytes, replies are counted, because
one may have a megabyte. Messages are not, because many connections hold the same bytes."""
STALL_TIMEOUT = 60.0
"""Seconds without progress of a write after which the connection is closed."""


class QueueWriter:
    """Writes the send queue of one session, as far as the kernel takes it."""

    __slots__ = ("_encoder", "_registry", "_send_queue", "_writer")

    _writer: SocketWriter

    def __init__(self, registry: ConnectionRegistry, encoder: ItemEncoder) -> None:
        self._registry = registry
        self._encoder = encoder
        self._send_queue: SendQueue | None = None

    def release(self) -> None:
        """Break the connection and its reference cycles, so that its memory is freed without the garbage collector."""
        self._writer.abort()
        self._send_queue = None

    def flush(self) -> None:
        """Write the send queue, as far as the kernel takes it. While bytes are unsent, the writing task does so."""
        writer, send_queue = self._writer, self._send_queue
        if send_queue is not None and not writer.writing:
            items = send_queue.take(WRITE_SIZE)
            while items:
                writer.write(self._encode(items, send_queue))
                if writer.writing:
                    send_queue.count_unsent(size_of_replies(items))
                items = send_queue.take(WRITE_SIZE) if send_queue.size and not writer.writing else []

    def take_more(self) -> bytes:
        """Return what the writing task sends next."""
        send_queue = self._send_queue
        if send_queue is None:
            return b""
        items = send_queue.take(WRITE_SIZE)
        send_queue.count_unsent(size_of_replies(items))
        return self._encode(items, send_queue)

    def _encode(self, items: list[QueueItem], send_queue: SendQueue) -> bytes:
        try:
            return self._encoder.encode_items(items, send_queue.protocol)
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._registry.log_internal_error("a flush failed", error)
            self._writer.abort()
            return b""

    def abort_if_stalled(self, now: float) -> None:
        """Break the connection if the peer takes nothing. A Close frame or the end of a stream would wait, too."""
        if self._writer.writing and now - self._writer.last_progress >= STALL_TIMEOUT:
            self._registry.log_peer_event("a client does not read", seconds=STALL_TIMEOUT)
            self._writer.abort()
