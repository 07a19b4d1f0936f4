"""QUIC packets outside of connections: reading a header, and making Version Negotiation, Retry and Stateless Reset."""

from __future__ import annotations

import os
from dataclasses import dataclass

from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.packet import (
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)

ID_LENGTH = QuicConfiguration().connection_id_length
"""Bytes of the connection IDs that this side issues."""

VERSIONS = tuple(QuicConfiguration().supported_versions)

MIN_INITIAL_SIZE = SMALLEST_MAX_DATAGRAM_SIZE
"""Bytes to which a datagram with a client's Initial packet is padded (RFC 9000 section 14.1). Smaller are dropped."""

MAX_PACKET_SIZE = 2048
"""The largest datagram that is processed, in bytes. Paths carry about 1,500; 64 KiB could take seconds of CPU."""

_RESET_TOKEN_LENGTH = 16


@dataclass(frozen=True, slots=True)
class PacketHeader:
    """The header of a datagram's first packet. With a short header, `source` is empty and `version` None."""

    version: int | None
    is_initial: bool
    destination: bytes
    source: bytes
    token: bytes

    @property
    def is_supported_version(self) -> bool:
        """Whether this version is supported. The reply to another one is `encode_version_negotiation`."""
        return self.version is None or self.version in VERSIONS

    @property
    def is_version_negotiation(self) -> bool:
        """Whether this is a Version Negotiation packet, which must never get a reply."""
        return self.version == 0


def read_header(data: bytes) -> PacketHeader | None:
    """Read the header that routes a datagram. Return None if it is not a QUIC packet."""
    if data and not data[0] & 0x80:
        # Nearly all packets have a short header, with the connection ID at a fixed offset.
        if len(data) <= ID_LENGTH or not data[0] & 0x40:
            return None
        return PacketHeader(None, False, data[1 : 1 + ID_LENGTH], b"", b"")
    try:
        header = pull_quic_header(Buffer(data=data), host_cid_length=ID_LENGTH)
    except ValueError:
        return _unknown_version(data)
    initial = header.packet_type == QuicPacketType.INITIAL and header.version in VERSIONS
    return PacketHeader(header.version, initial, header.destination_cid, header.source_cid, header.token)


def _unknown_version(data: bytes) -> PacketHeader | None:
    """Read the fields that all versions of QUIC share (RFC 8999 section 5.1)."""
    if len(data) < 7:
        return None
    version = int.from_bytes(data[1:5], "big")
    destination_end = 6 + data[5]
    if version in VERSIONS or len(data) <= destination_end:
        return None
    source_end = destination_end + 1 + data[destination_end]
    if len(data) < source_end:
        return None
    return PacketHeader(version, False, data[6:destination_end], data[destination_end + 1 : source_end], b"")


def encode_version_negotiation(header: PacketHeader) -> bytes:
    """Make the reply to a packet of an unsupported version (RFC 9000 section 6.1)."""
    return encode_quic_version_negotiation(
        source_cid=header.destination, destination_cid=header.source, supported_versions=list(VERSIONS)
    )


def encode_retry(header: PacketHeader, connection_id: bytes, token: bytes) -> bytes:
    """Make a Retry packet: the client proves its address by connecting to `connection_id` with `token`.

    RFC 9000 section 8.1.2. Then use `WebTransportConnection.server(..., original_destination=header.destination,
    retry_source=connection_id)`. The caller must verify the token, which has to contain both connection IDs.
    """
    assert header.version is not None
    return encode_quic_retry(
        version=header.version,
        source_cid=connection_id,
        destination_cid=header.source,
        original_destination_cid=header.destination,
        retry_token=token,
    )


def encode_stateless_reset(token: bytes, size: int) -> bytes | None:
    """Make the reply to a packet of `size` bytes for an unknown connection (RFC 9000 section 10.3).

    The reply must be smaller than the packet, so that two endpoints cannot reset each other endlessly. Return None if
    the packet is too small for that.
    """
    length = min(size - 1, 43)
    if length < 21:
        return None
    noise = os.urandom(length - _RESET_TOKEN_LENGTH)
    return bytes([0x40 | noise[0] & 0x3F]) + noise[1:] + token
