"""Packets that stand outside any connection: what a router reads and answers before there is one."""

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
"""Of the connection IDs that we issue, in bytes."""

VERSIONS = tuple(QuicConfiguration().supported_versions)

SMALLEST_INITIAL = SMALLEST_MAX_DATAGRAM_SIZE
"""A datagram with a client's first packet is padded to this size (RFC 9000 section 14.1); smaller ones are dropped."""

MAX_PACKET = 2048
"""The largest datagram that is looked at. Paths carry some 1,500; one of 64 KiB can hold frames for seconds of work."""

_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Header:
    """The first packet of a datagram. `source` is empty and `version` None in a packet with a short header."""

    version: int | None
    initial: bool
    destination: bytes
    source: bytes
    token: bytes

    @property
    def supported(self) -> bool:
        """Whether this is a version that we speak; another is answered with `version_negotiation`."""
        return self.version is None or self.version in VERSIONS

    @property
    def negotiation(self) -> bool:
        """Whether this is itself a Version Negotiation packet, which is never answered."""
        return self.version == 0


def read_header(data: bytes) -> Header | None:
    """Who this datagram is for; None when it is no QUIC packet."""
    if data and not data[0] & 0x80:
        # Nearly all packets have a short header: the connection ID stands at its fixed place.
        if len(data) <= ID_LENGTH or not data[0] & 0x40:
            return None
        return Header(None, False, data[1 : 1 + ID_LENGTH], b"", b"")
    try:
        header = pull_quic_header(Buffer(data=data), host_cid_length=ID_LENGTH)
    except ValueError:
        return _unknown_version(data)
    initial = header.packet_type == QuicPacketType.INITIAL and header.version in VERSIONS
    return Header(header.version, initial, header.destination_cid, header.source_cid, header.token)


def _unknown_version(data: bytes) -> Header | None:
    """What is the same in all versions (RFC 8999 section 5.1), for those whose packets look different otherwise."""
    if len(data) < 7:
        return None
    version = int.from_bytes(data[1:5], "big")
    destination_end = 6 + data[5]
    if version in VERSIONS or len(data) <= destination_end:
        return None
    source_end = destination_end + 1 + data[destination_end]
    if len(data) < source_end:
        return None
    return Header(version, False, data[6:destination_end], data[destination_end + 1 : source_end], b"")


def version_negotiation(header: Header) -> bytes:
    """The answer to a packet of a version that we do not speak (RFC 9000 section 6.1)."""
    return encode_quic_version_negotiation(
        source_cid=header.destination, destination_cid=header.source, supported_versions=list(VERSIONS)
    )


def retry(header: Header, connection_id: bytes, token: bytes) -> bytes:
    """Asks the client to prove its address by coming again with `token`, to `connection_id` (RFC 9000 section 8.1.2).

    What comes then is served by `Connection.server(..., original_destination=header.destination,
    retry_source=connection_id)`; that the token says so is for the caller to check.
    """
    assert header.version is not None
    return encode_quic_retry(
        version=header.version,
        source_cid=connection_id,
        destination_cid=header.source,
        original_destination_cid=header.destination,
        retry_token=token,
    )


def stateless_reset(token: bytes, size: int) -> bytes | None:
    """The answer to a packet of `size` bytes for a connection that nobody knows (RFC 9000 section 10.3).

    None when the packet is too small for an answer that is smaller than itself, as it must be lest two ends
    go on resetting each other.
    """
    length = min(size - 1, 43)
    if length < 21:
        return None
    noise = os.urandom(length - _TOKEN)
    return bytes([0x40 | noise[0] & 0x3F]) + noise[1:] + token
