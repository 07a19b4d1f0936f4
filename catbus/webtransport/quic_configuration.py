"""What a connection is made with: certificates, and how much a peer may have of us."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from aioquic.h3.connection import H3_ALPN
from aioquic.quic.configuration import QuicConfiguration
from aioquic.tls import load_pem_private_key, load_pem_x509_certificates

from ..errors import ConfigError
from .packet_loss import ALGORITHM

IDLE_TIMEOUT = 60.0
"""Seconds without a packet from the peer, after which the connection is lost."""

MAX_DATAGRAM_FRAME = 65536
"""The largest DATAGRAM frame that we take (RFC 9221 section 3); no packet is as large."""

Pem = str | bytes | Path
"""PEM as text, or a file that holds it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of us one peer may have. Sizes in bytes, times in seconds."""

    connection_window: int = 512 * 1024
    """What may have come and not been consumed, on all streams together."""
    stream_window: int = 128 * 1024
    """The same, on one stream."""
    early: int = 32 * 1024
    """What is kept of streams that are opened before their session is."""
    bidirectional: int = 16
    """Streams that the peer may have open at a time; one of them carries the session itself."""
    unidirectional: int = 16
    """The same; three of them carry HTTP/3 itself."""
    opened: int = 128
    """Streams that we open at a time, however many the peer allows."""
    stream_unacknowledged: int = 256 * 1024
    """What is taken for one stream before the peer has acknowledged it. Overrun by one `send` at most."""
    unacknowledged: int = 1024 * 1024
    """The same, for all streams together; but some streams that the peer does not read must not silence the others:"""
    stream_share: int = 8 * 1024
    """so much is taken for each stream, however much the others hold."""
    datagrams: int = 64
    """Datagrams that wait to be sent."""
    opening: float = 10.0
    """From the first packet until a session is asked for."""
    silence: float = 6.0
    """For a server: without a packet from a newcomer, which is pinged after half of it. Two packets of a handshake in a
    row may be lost, each of which is repeated after twice as long as the one before. Until `Connection.trust`."""
    closing: float = 2.0
    """For what has been sent to arrive, and again for the closing itself."""


CLIENT_LIMITS = Limits(unidirectional=103)
"""A server opens a stream for each subscription that asks for one: as many as with Chromium, and HTTP/3's three."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """Made by `server_configuration` or `client_configuration`; serves any number of connections."""

    quic: QuicConfiguration
    limits: Limits
    certificate_hash: bytes | None = None


def server_configuration(certificate: Pem, key: Pem, limits: Limits | None = None) -> Configuration:
    """For a server with this certificate, its chain behind it, and its private key.

    Raises ConfigError when they cannot be read or do not belong together.
    """
    limits = limits or Limits()
    quic = _quic(limits, is_client=False)
    quic.congestion_control_algorithm = ALGORITHM
    try:
        quic.certificate, *quic.certificate_chain = load_pem_x509_certificates(_read(certificate))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the certificate cannot be read: {error}") from error
    try:
        quic.private_key = load_pem_private_key(_read(key))
        same = quic.private_key.public_key() == quic.certificate.public_key()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the private key cannot be read: {error}") from error
    if not same:
        raise ConfigError("the private key belongs to another certificate")
    return Configuration(quic, limits)


def client_configuration(
    server_name: str,
    *,
    ca: Pem | None = None,
    certificate_hash: bytes | None = None,
    limits: Limits | None = None,
) -> Configuration:
    """For a client of `server_name`, a name or an IP address.

    The server's certificate must be signed by `ca` (a self-signed one is its own), or by one of the usual authorities.
    With `certificate_hash`, the SHA-256 of its DER form, the hash alone decides, as with a browser's
    `serverCertificateHashes`. Raises ConfigError when `ca` cannot be read or the hash has another length.
    """
    limits = limits or CLIENT_LIMITS
    quic = _quic(limits, is_client=True)
    quic.server_name = server_name
    if certificate_hash is not None:
        if len(certificate_hash) != 32:
            raise ConfigError("a certificate hash is a SHA-256 digest, 32 bytes")
        # The hash is compared when the handshake is complete, before anything is said.
        quic.verify_mode = ssl.CERT_NONE
    elif ca is not None:
        try:
            pem = _read(ca)
            if not load_pem_x509_certificates(pem):
                raise ValueError("there is none")
        except (OSError, ValueError) as error:
            raise ConfigError(f"the CA certificate cannot be read: {error}") from error
        quic.load_verify_locations(cadata=pem)
    return Configuration(quic, limits, certificate_hash)


def _quic(limits: Limits, *, is_client: bool) -> QuicConfiguration:
    return QuicConfiguration(
        alpn_protocols=H3_ALPN,
        idle_timeout=IDLE_TIMEOUT,
        is_client=is_client,
        max_data=limits.connection_window,
        max_datagram_frame_size=MAX_DATAGRAM_FRAME,
        max_stream_data=limits.stream_window,
    )


def _read(pem: Pem) -> bytes:
    if isinstance(pem, Path):
        return pem.read_bytes()
    return pem.encode() if isinstance(pem, str) else pem
