"""The replies to packets that belong to no connection: Retry, Version Negotiation and stateless reset."""

from __future__ import annotations

import os
import time

from ...limits.token_bucket import TokenBucket
from ...webtransport.connection_ids import ConnectionIdShare
from ...webtransport.connectionless_packets import (
    ID_LENGTH,
    MIN_INITIAL_SIZE,
    PacketHeader,
    encode_retry,
    encode_stateless_reset,
    encode_version_negotiation,
)
from .retry_and_reset_tokens import StatelessTokens
from .udp_socket import PeerAddress

REPLIES_PER_SECOND = 100
"""Version Negotiation packets and stateless resets per second."""


class ConnectionlessReplies:
    """Sends these replies, with the tokens in them. The connection IDs in Retry packets are in `share`."""

    def __init__(self, tokens: StatelessTokens, share: ConnectionIdShare, now: float) -> None:
        self._tokens = tokens
        self._share = share
        self._rate = TokenBucket(REPLIES_PER_SECOND, REPLIES_PER_SECOND, now)

    def reply(self, header: PacketHeader, size: int, peer_address: PeerAddress, now: float) -> None:
        """Reply to a packet of `size` bytes that is not the first one of a connection, at a limited rate."""
        data: bytes | None = None
        if header.version is None:
            data = encode_stateless_reset(self._tokens.reset_token(header.destination), size)
        elif not header.is_supported_version and not header.is_version_negotiation and size >= MIN_INITIAL_SIZE:
            data = encode_version_negotiation(header)
        if data is not None and self._rate.take(1, now):
            peer_address.socket.send((data,), peer_address)

    def send_retry(self, header: PacketHeader, peer_address: PeerAddress) -> None:
        """Ask a client to connect again with a token that proves its address."""
        retry_source = self._share.name(os.urandom(ID_LENGTH))
        token = self._tokens.retry_token(peer_address.address, header.destination, retry_source, time.time())
        peer_address.socket.send((encode_retry(header, retry_source, token),), peer_address)
