"""Attacks on the TLS of the WebSocket port."""

from __future__ import annotations

import itertools
import socket
import time
from contextlib import suppress

from .attacks import Ended, Target, attack
from .http import hold, nothing
from .peers import GET, Peer

HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
"""The start of a ClientHello in a record of 512 bytes."""


class Raw(Peer):
    """Connect to the TLS port without TLS."""

    def __init__(self, target: Target) -> None:
        super().__init__(target, tls=False)


def hold_raw(target: Target, count: int, first: bytes, more: bytes) -> None:
    """Open this many connections without TLS, send `first`, and then `more` once per second."""
    peers = []
    for _ in range(count):
        peer = Raw(target)
        peer.send(first)
        peers.append(peer)
    while peers:
        time.sleep(1)
        for peer in tuple(peers):
            try:
                peer.send(more)
                peer.drain()
            except Ended:
                peers.remove(peer)


@attack("tls", "TLS handshakes", "complete, and close, as fast as possible", processes=4, like="connections")
def handshakes(target: Target) -> None:
    while True:
        Peer(target).close()


@attack(
    "tls", "half of a TLS handshake", "a ClientHello's beginning and silence, on 1,000 connections", like="connections"
)
def half_handshakes(target: Target) -> None:
    hold_raw(target, 1000, HELLO, b"")


@attack("tls", "a ClientHello byte by byte", "500 connections, a byte a second", like="connections")
def slow_hellos(target: Target) -> None:
    hold_raw(target, 500, HELLO, b"x")


@attack(
    "tls", "no TLS at all", "HTTP where TLS is expected, connection after connection", processes=2, like="connections"
)
def plain(target: Target) -> None:
    while True:
        peer = Raw(target)
        peer.send(GET % b"/health")
        peer.receive(1)
        peer.close()


@attack("tls", "silence after TLS", "1,000 connections shake hands and say nothing", like="connections")
def silence_after(target: Target) -> None:
    hold(target, 1000, nothing, nothing)


@attack("tls", "records of a byte", "requests of which each byte is a record of its own", processes=2, like="bytes")
def tiny_records(target: Target) -> None:
    peer = Peer(target)
    for byte in itertools.cycle(GET % b"/health"):
        peer.send(bytes((byte,)))
        peer.drain()


@attack("tls", "garbage in records", "records that cannot be decrypted, after a handshake", processes=2, like="bytes")
def garbage(target: Target) -> None:
    while True:
        peer = Peer(target)
        with socket.socket(fileno=peer.socket.detach()) as raw:
            raw.settimeout(1)
            with suppress(OSError):
                raw.sendall(b"\x17\x03\x03\x40\x00" + bytes(0x4000))
                target.tally.sent(0x4000)
                raw.recv(1000)
