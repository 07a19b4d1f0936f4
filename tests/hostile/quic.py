"""Attacks on QUIC and WebTransport."""

from __future__ import annotations

import itertools
import os
import time
from contextlib import suppress

from aioquic.buffer import Buffer
from aioquic.quic.packet import pull_quic_header
from aioquic.tls import Epoch

from catbus.webtransport.varint import encode as varint

from .attacks import Ended, Target, attack, pace
from .packets import (
    ROOM,
    Initials,
    crypto,
    junk_initial,
    unknown_connection,
    unknown_version,
)
from .peers import LARGEST, QuicPeer, readable, throw, udp

CLIENT_HELLO = b"\x01\xff\xff\xff"
"""The start of a ClientHello of 16 MB."""


@attack(
    "quic",
    "ClientHello of 16 MB",
    "Initials whose CRYPTO frames begin one, 900 packets/s",
    like="packets",
)
def endless_hello(target: Target) -> None:
    peer = QuicPeer(target, open=False)
    sender = peer.quic._crypto_streams[Epoch.INITIAL].sender
    sender._buffer[:4] = CLIENT_HELLO
    sender.write(bytes(8 << 20))
    for _ in pace(900):
        # Lost data is sent again, because nothing would grow behind a gap.
        peer.turn(0)


@attack("quic", "undecryptable Initials", "1,000 packets/s, each for another connection", like="packets")
def junk_initials(target: Target) -> None:
    sock = udp(target)
    for _ in pace(1000):
        throw(sock, target, junk_initial())


@attack("quic", "Initials that only ping", "1,000 connections/s begin with a PING and nothing else", like="packets")
def pinging_initials(target: Target) -> None:
    sock = udp(target)
    for _ in pace(1000):
        throw(sock, target, Initials().packet(b"\x01" + bytes(ROOM - 20)))


@attack(
    "quic",
    "packets in packets",
    "datagrams of 2,048 bytes with 40 packets to a connection of ours, none of which can be read, 500/s",
    like="packets",
)
def coalesced(target: Target) -> None:
    peer = QuicPeer(target, open=False)
    peer.transmit()
    quic = peer.quic
    time.sleep(0.1)
    peer.turn(0.1)
    head = b"\xe0" + (1).to_bytes(4, "big") + b"\x08" + quic._peer_cid.cid + b"\x08" + quic.host_cid
    junk = head + varint(20) + bytes(20)
    datagram = (junk * 60)[: LARGEST - LARGEST % len(junk)]
    for number, _ in enumerate(pace(500)):
        peer.throw(datagram)
        if number % 50 == 0:
            peer.turn(0)


def begin(target: Target, *, answer_retry: bool) -> QuicPeer:
    """Connect, follow a Retry, and then send nothing."""
    peer = QuicPeer(target, open=False)
    peer.transmit()
    if answer_retry and readable(peer.socket, 0.02):
        peer.connection.receive_datagram(peer.socket.recv(LARGEST), peer.address, time.monotonic())
        peer.transmit()
    return peer


@attack(
    "quic",
    "half-open connections that answer Retry",
    "as many as there may be, and again when they are given up",
    processes=2,
    like="packets",
)
def half_open(target: Target) -> None:
    peers = []
    for _ in pace(200):
        peers.append(begin(target, answer_retry=True).socket)
        if len(peers) > 2500:
            peers.pop(0).close()


@attack(
    "quic", "half-open connections from one socket", "hellos with another connection ID each, 200/s", like="packets"
)
def hellos(target: Target) -> None:
    sock = udp(target)
    payload = _crypto_of(QuicPeer(target, open=False))
    for _ in pace(200):
        throw(sock, target, Initials().packet(crypto(0, payload)))
        while readable(sock, 0):
            sock.recv(LARGEST)


def _crypto_of(peer: QuicPeer) -> bytes:
    """Return the ClientHello of a client's first packet."""
    assert peer.connection.datagrams_to_send(time.monotonic())
    return bytes(peer.quic._crypto_streams[Epoch.INITIAL].sender._buffer)


@attack(
    "quic",
    "handshakes without a session",
    "complete, and then ask for none until they are given up",
    processes=2,
    like="packets",
)
def no_session(target: Target) -> None:
    peers: list[QuicPeer] = []
    for _ in pace(50):
        peer = QuicPeer(target, open=False)
        peer.connection._demultiplexer._session_request = None
        peer.transmit()
        peers.append(peer)
        for each in peers[-20:]:
            try:
                each.turn(0)
            except Ended:
                continue
        if len(peers) > 1000:
            peers.pop(0).socket.close()


@attack("quic", "a handshake byte by byte", "200 connections send their hello in pieces of a byte", like="packets")
def slow_handshakes(target: Target) -> None:
    sock = udp(target)
    connections = [Initials() for _ in range(200)]
    for offset in itertools.count():
        for initials in connections:
            data = b"\x01\x00\x02\x00"[offset : offset + 1] or b"\x03"
            throw(sock, target, initials.packet(crypto(offset, data) + bytes(1000)))
            time.sleep(0.001)
        time.sleep(0.3)


@attack(
    "quic", "a flood of Retries", "hellos beside 300 half-open connections, each answered with a Retry", like="packets"
)
def retries(target: Target) -> None:
    kept = [begin(target, answer_retry=False) for _ in range(300)]
    sock = udp(target)
    for _ in pace(1000):
        throw(sock, target, junk_initial())
    kept.clear()


@attack("quic", "a Retry used again and again", "one token, for another connection each time, 500/s", like="packets")
def retry_replay(target: Target) -> None:
    kept = [begin(target, answer_retry=False) for _ in range(300)]
    sock = udp(target)
    first = Initials()
    throw(sock, target, first.packet(crypto(0, CLIENT_HELLO) + bytes(1000)))
    token, destination = b"", os.urandom(8)
    if readable(sock, 1):
        data = sock.recv(LARGEST)
        header = pull_quic_header(Buffer(data=data), host_cid_length=8)
        token, destination = header.token, header.source_cid
    for number, _ in enumerate(pace(500)):
        if number == 5000:
            return  # It is not good for longer.
        again = Initials(token, destination if number % 2 else None)
        throw(sock, target, again.packet(crypto(0, CLIENT_HELLO) + bytes(900)))
    kept.clear()


@attack(
    "quic",
    "hellos from 250 networks",
    "1,000/s, each a network's first for a while, so that none of them has used anything yet",
    like="packets",
)
def many_networks(target: Target) -> None:
    payload = _crypto_of(QuicPeer(target, open=False))
    sockets = [udp(target, f"127.0.1.{number}") for number in range(1, 251)]
    for number, _ in enumerate(pace(1000)):
        sock = sockets[number % len(sockets)]
        throw(sock, target, Initials().packet(crypto(0, payload)))
        while readable(sock, 0):
            sock.recv(LARGEST)


@attack(
    "quic", "forged Retry tokens", "Initials with tokens that are none, each to be checked, 3,000/s", like="packets"
)
def forged_tokens(target: Target) -> None:
    sock = udp(target)
    for _ in pace(3000):
        throw(sock, target, junk_initial(token=os.urandom(40)))
        while readable(sock, 0):
            sock.recv(LARGEST)


@attack(
    "quic",
    "slow answers, and then silence",
    "handshakes over a link of two seconds, left in the middle",
    like="packets",
)
def slow_answers(target: Target) -> None:
    late: list[tuple[float, QuicPeer]] = []
    for _ in pace(100):
        peer = QuicPeer(target, open=False)
        peer.transmit()
        late.append((time.monotonic() + 2, peer))
        while late[0][0] < time.monotonic():
            _, peer = late.pop(0)
            with suppress(Ended):
                peer.turn(0)
            peer.socket.close()


@attack("quic", "unknown QUIC versions", "2,000 packets/s, each to be answered", like="packets")
def versions(target: Target) -> None:
    sock = udp(target)
    for _ in pace(2000):
        throw(sock, target, unknown_version())


@attack(
    "quic",
    "packets for unknown connections",
    "2,000 packets/s that ask for stateless resets; a reset must not tell of others",
    like="packets",
)
def resets(target: Target) -> None:
    sock = udp(target)
    answered = 0
    began = time.monotonic()
    for _ in pace(2000):
        throw(sock, target, unknown_connection())
        while readable(sock, 0):
            answered += 1
            sock.recv(LARGEST)
        if answered > 150 * (1 + time.monotonic() - began):
            target.tally.fault(f"{answered} stateless resets in {time.monotonic() - began:.1f} s")
            answered = 0


@attack(
    "quic",
    "forged stateless resets",
    "the reset of one connection ID, tried on another: both must differ",
    like="packets",
)
def reset_oracle(target: Target) -> None:
    sock = udp(target)
    tokens = []
    for number in range(2):
        throw(sock, target, b"\x43" + bytes((number,)) * 60)
        if readable(sock, 1):
            tokens.append(sock.recv(LARGEST)[-16:])
    if len(set(tokens)) < len(tokens):
        target.tally.fault("two connection IDs have one reset token")
    peer = QuicPeer(target, target.token())
    while True:
        # The broker ignores its own stateless resets.
        peer.throw(b"\x40" + os.urandom(30) + (tokens or [bytes(16)])[0])
        peer.turn(0.01)


@attack("quic", "datagrams of any bytes", "5,000/s of all sizes", like="packets")
def noise(target: Target) -> None:
    sock = udp(target)
    for number, _ in enumerate(pace(5000)):
        throw(sock, target, os.urandom(1 + number * 7 % 1400))


@attack("quic", "datagrams of 64 KB", "200/s, of which the broker looks at none", like="packets")
def large_datagrams(target: Target) -> None:
    sock = udp(target)
    data = b"\x43" + bytes(60_000)
    for _ in pace(200):
        throw(sock, target, data)
