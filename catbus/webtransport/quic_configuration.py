"""The configuration of QUIC connections: certificates, and the limits on what one peer may use."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from aioquic.h3.connection import H3_ALPN
from aioquic.quic.configuration import QuicConfiguration
from aioquic.tls import load_pem_private_key, load_pem_x509_certificates

from ..errors import ConfigError
from .packet_loss import CONGESTION_CONTROL

IDLE_TIMEOUT = 60.0
"""Seconds without a packet from the peer until the connection is lost."""

MAX_DATAGRAM_FRAME_SIZE = 65536
"""The largest DATAGRAM frame that is accepted, in bytes (RFC 9221 section 3). No packet is as large."""

Pem = str | bytes | Path
"""PEM text, or the path of a PEM file."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits on what one peer may use. Sizes are in bytes, times in seconds."""

    connection_window: int = 512 * 1024
    """Bytes received and not yet consumed, on all streams together."""
    stream_window: int = 128 * 1024
    """Bytes received and not yet consumed, on one stream."""
    early_stream_data: int = 32 * 1024
    """Bytes buffered for streams that are opened before their session."""
    incoming_bidirectional: int = 16
    """Bidirectional streams that the peer may have open at once. One of them is the CONNECT stream."""
    incoming_unidirectional: int = 16
    """Unidirectional streams that the peer may have open at once. HTTP/3 itself needs three of them."""
    outgoing_streams: int = 128
    """Streams that this side has open at once, even if the peer allows more."""
    stream_unacknowledged: int = 256 * 1024
    """Bytes accepted for one stream and not yet acknowledged. One `send` may exceed it."""
    unacknowledged: int = 1024 * 1024
    """Bytes accepted for all streams together and not yet acknowledged."""
    stream_minimum: int = 8 * 1024
    """Bytes accepted for each stream even above `unacknowledged`, so that unread streams cannot block the others."""
    queued_datagrams: int = 64
    """Datagrams waiting to be sent."""
    session_timeout: float = 10.0
    """Time from the first packet until a session must be requested."""
    silence_timeout: float = 6.0
    """Time without a packet from an unauthenticated client, which a server pings after half of it.

    It applies until `WebTransportConnection.trust`. It covers two lost handshake packets in a row: each is
    retransmitted after twice the time of the one before."""
    close_timeout: float = 2.0
    """Time for sent data to be acknowledged, and again for the close itself."""


CLIENT_LIMITS = ConnectionLimits(incoming_unidirectional=103)
"""Limits of a client. A server opens one stream for each subscription that requests one: allow as many as Chromium
does (100), and the three of HTTP/3."""


@dataclass(frozen=True, slots=True)
class WebTransportConfiguration:
    """The configuration of any number of connections. Use `server_configuration` or `client_configuration`."""

    quic: QuicConfiguration
    limits: ConnectionLimits
    certificate_hash: bytes | None = None


def server_configuration(
    certificate: Pem, key: Pem, limits: ConnectionLimits | None = None
) -> WebTransportConfiguration:
    """Make the configuration of a server from its certificate, followed by the chain, and its private key.

    Raises ConfigError if they cannot be read or do not match.
    """
    limits = limits or ConnectionLimits()
    quic = _quic(limits, is_client=False)
    quic.congestion_control_algorithm = CONGESTION_CONTROL
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
        raise ConfigError("the private key does not match the certificate")
    return WebTransportConfiguration(quic, limits)


def client_configuration(
    server_name: str,
    *,
    ca: Pem | None = None,
    certificate_hash: bytes | None = None,
    limits: ConnectionLimits | None = None,
) -> WebTransportConfiguration:
    """Make the configuration of a client of `server_name`, a host name or an IP address.

    The server's certificate must be signed by `ca` (a self-signed certificate is its own CA), or by a CA of the system.
    With `certificate_hash`, the SHA-256 of the certificate's DER form, only the hash is compared, as with a browser's
    `serverCertificateHashes`. Raises ConfigError if `ca` cannot be read or the hash does not have 32 bytes.
    """
    limits = limits or CLIENT_LIMITS
    quic = _quic(limits, is_client=True)
    quic.server_name = server_name
    if certificate_hash is not None:
        if len(certificate_hash) != 32:
            raise ConfigError("a certificate hash is a SHA-256 digest, 32 bytes")
        # The hash is compared when the handshake is complete, before any data is sent.
        quic.verify_mode = ssl.CERT_NONE
    elif ca is not None:
        try:
            pem = _read(ca)
            if not load_pem_x509_certificates(pem):
                raise ValueError("it contains no certificate")
        except (OSError, ValueError) as error:
            raise ConfigError(f"the CA certificate cannot be read: {error}") from error
        quic.load_verify_locations(cadata=pem)
    return WebTransportConfiguration(quic, limits, certificate_hash)


def _quic(limits: ConnectionLimits, *, is_client: bool) -> QuicConfiguration:
    return QuicConfiguration(
        alpn_protocols=H3_ALPN,
        idle_timeout=IDLE_TIMEOUT,
        is_client=is_client,
        max_data=limits.connection_window,
        max_datagram_frame_size=MAX_DATAGRAM_FRAME_SIZE,
        max_stream_data=limits.stream_window,
    )


def _read(pem: Pem) -> bytes:
    if isinstance(pem, Path):
        return pem.read_bytes()
    return pem.encode() if isinstance(pem, str) else pem
