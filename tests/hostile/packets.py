"""QUIC packets that are valid except for their frames. No I/O."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from aioquic.buffer import encode_uint_var as varint
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicPacketType, QuicProtocolVersion
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.tls import Epoch

PACKET = 1200
ROOM = 1150
"""Bytes of frames that fit into a packet, with a reserve."""
VERSION = QuicProtocolVersion.VERSION_1


def one_rtt(quic: Any, payload: bytes, size: int = PACKET) -> bytes:
    """Make a packet of an established connection, without its knowledge."""
    builder = QuicPacketBuilder(
        host_cid=quic.host_cid,
        is_client=quic.configuration.is_client,
        max_datagram_size=size,
        packet_number=quic._packet_number,
        peer_cid=quic._peer_cid.cid,
        version=quic._version or 0,
    )
    builder.start_packet(QuicPacketType.ONE_RTT, quic._cryptos[Epoch.ONE_RTT])
    buffer = builder.start_frame(payload[0] & 0x3F, capacity=len(payload) + 8)
    buffer.push_bytes(payload[1:])
    [data], _ = builder.flush()
    quic._packet_number = builder.packet_number
    return data


class Initials:
    """The first packets of one client, with any frames in them."""

    def __init__(self, token: bytes = b"", destination: bytes | None = None) -> None:
        self.destination = os.urandom(8) if destination is None else destination
        self._source = os.urandom(8)
        self._token = token
        self._number = 0
        self._crypto = CryptoPair()
        self._crypto.setup_initial(cid=self.destination, is_client=True, version=VERSION)

    def packet(self, payload: bytes, size: int = PACKET) -> bytes:
        """Return the next packet, with these frames and padded to `size`."""
        builder = QuicPacketBuilder(
            host_cid=self._source,
            is_client=True,
            max_datagram_size=size,
            packet_number=self._number,
            peer_cid=self.destination,
            peer_token=self._token,
            version=VERSION,
        )
        builder.start_packet(QuicPacketType.INITIAL, self._crypto)
        buffer = builder.start_frame(payload[0] & 0x3F, capacity=len(payload) + 8)
        buffer.push_bytes(payload[1:])
        [data], _ = builder.flush()
        self._number = builder.packet_number
        return data


def crypto(offset: int, data: bytes) -> bytes:
    """Make a CRYPTO frame."""
    return b"\x06" + varint(offset) + varint(len(data)) + data


def fill(frames: Iterable[bytes], room: int = ROOM) -> bytes:
    """Return as many of these frames, in order, as fit into a packet."""
    data = b""
    for frame in frames:
        if len(data) + len(frame) > room:
            break
        data += frame
    return data


def junk_initial(size: int = PACKET, destination: bytes | None = None, token: bytes = b"") -> bytes:
    """Make a packet that looks like a client's first one, but cannot be decrypted."""
    head = b"\xc3" + VERSION.to_bytes(4, "big") + b"\x08" + (destination or os.urandom(8)) + b"\x08" + os.urandom(8)
    head += varint(len(token)) + token
    length = size - len(head) - 2
    return head + (0x4000 | length).to_bytes(2, "big") + os.urandom(length)


def unknown_version(size: int = PACKET) -> bytes:
    """Make a packet of an unknown version."""
    head = b"\xc3\x1a\x2a\x3a\x4a\x08" + os.urandom(8) + b"\x08" + os.urandom(8)
    return head + os.urandom(size - len(head))


def unknown_connection(size: int = 64) -> bytes:
    """Make a packet with a short header for a connection that does not exist."""
    return b"\x43" + os.urandom(size - 1)


def ack(largest: int, ranges: int) -> bytes:
    """Make an ACK frame with this many ranges of one packet each, one packet apart."""
    return b"\x02" + varint(largest) + varint(0) + varint(ranges - 1) + varint(0) + b"\0\0" * (ranges - 1)
