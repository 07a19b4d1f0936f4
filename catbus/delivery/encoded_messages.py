"""Messages of the log as the items of send queues, encoded once for all that get them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..log import Entry
from ..protocol.server_sent_events import encode_message_event
from ..protocol.wire_messages import encode_first_version_message, encode_message

OVERHEAD = 96
"""Approximate size of a `message` line without its channel and payload, in bytes."""

# Memory of objects besides their texts, in bytes, in CPython on a 64-bit machine.
ENTRY_BYTES = 240
"""An entry with its numbers, and the object headers of its texts."""
ENCODED_MESSAGES_BYTES = 256
"""An `EncodedMessages` with its list, its numbers, and the object header of its lines."""


class EncodedMessages:
    """Consecutive entries that match one pattern, encoded once for all subscriptions that get them.

    Merged entries of several patterns have the pattern "". All holders of one object read the same protocol version, so
    only one encoding of it is made. `epoch` is that of the entries.
    """

    __slots__ = (
        "_events",
        "_first_version_lines",
        "_lines",
        "charge",
        "entries",
        "epoch",
        "holders",
        "pattern",
        "pins",
        "size",
    )

    def __init__(self, pattern: str, entries: Sequence[Entry], epoch: str = "") -> None:
        self.pattern = pattern
        self.entries = entries
        self.epoch = epoch
        self.holders = 0
        """Number of send queues that hold it."""
        self.pins = 0
        """Number of send queues in which it is pinned."""
        count, texts = len(entries), sum([entry.size for entry in entries])
        self.size = texts + count * (OVERHEAD + len(pattern))
        """Approximate size of its lines, in bytes."""
        self.charge = self.size + texts + count * ENTRY_BYTES + ENCODED_MESSAGES_BYTES
        """Its memory, once for all send queues that hold it: the entries, and their lines once they are encoded."""
        self._lines: bytes | None = None
        self._events: bytes | None = None
        self._first_version_lines: list[bytes] | None = None

    @property
    def first_seq(self) -> int:
        """The seq of its first message of the log; 0 if it has none, but ephemeral messages."""
        return self.entries[0].seq

    @property
    def in_log(self) -> bool:
        """Whether it can be read from the log again. Ephemeral messages cannot."""
        return self.first_seq > 0

    @property
    def lines(self) -> bytes:
        """All messages, one per line, for `catbus.v1` clients."""
        if self._lines is None:
            pattern = self.pattern
            self._lines = b"".join(
                [
                    encode_message(e.channel, e.payload, pattern, e.seq or None, e.at, e.sender, e.retain)
                    for e in self.entries
                ]
            )
        return self._lines

    @property
    def events(self) -> bytes:
        """All messages, for event streams."""
        if self._events is None:
            epoch = self.epoch.encode()
            self._events = b"".join(
                [
                    encode_message_event(e.channel, e.payload, e.seq, e.at, e.sender, epoch, e.retain)
                    for e in self.entries
                ]
            )
        return self._events

    @property
    def first_version_lines(self) -> list[bytes]:
        """Each message as a line for first-version clients."""
        if self._first_version_lines is None:
            self._first_version_lines = [encode_first_version_message(e.channel, e.payload) for e in self.entries]
        return self._first_version_lines

    def select(self, wanted: Callable[[Entry], bool]) -> EncodedMessages | None:
        """Return the messages that are wanted: this object if all are, None if none is."""
        kept = [entry for entry in self.entries if wanted(entry)]
        if len(kept) == len(self.entries):
            return self
        return EncodedMessages(self.pattern, kept, self.epoch) if kept else None


QueueItem = EncodedMessages | bytes
