"""Attacks on QUIC and WebTransport."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator

from aioquic.buffer import Buffer
from aioquic.quic.packet import pull_quic_header
from aioquic.tls import Epoch

from catbus.webtransport.varint import encode as varint

from .attacks import Ended, Target, attack, pace
from .packets import (
    ROOM,
    Initials,
    ack,
    crypto,
    fill,
    junk_initial,
    one_rtt,
    unknown_connection,
    unknown_version,
)
from .peers import QuicPeer, readable, request, throw, udp

CLIENT_HELLO = b"\x01\xff\xff\xff"
"""The beginning of one that has 16 MB."""
LARGEST = 2048
"""Bytes of the largest datagram that the broker looks at."""


def inject(target: Target, payloads: Iterable[bytes], rate: float) -> None:
    """Complete the handshake, and then send packets with these frames, so many a second, and hear nothing."""
    peer = QuicPeer(target)
    payloads = iter(payloads)
    for number, _ in enumerate(pace(rate)):
        if number % (10 * rate) == 10 * rate - 1:
            # It may have been closed long ago, so begin again.
            peer.socket.close()
            peer = QuicPeer(target)
        peer.inject(next(payloads))
        while number % 20 == 0 and readable(peer.socket, 0):
            peer.socket.recv(LARGEST)


def same(payload: bytes) -> Iterator[bytes]:
    return itertools.repeat(payload)


def full(frame: bytes) -> bytes:
    """As many of one frame as fit."""
    return fill(itertools.repeat(frame, ROOM))


# Before the handshake


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
        # What is lost is sent again: behind a hole nothing would grow.
        peer.turn(0)


@attack("quic", "Initials that cannot be read", "1,000 packets/s, each for another connection", like="packets")
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
    """A connection that has said hello, has come again after a Retry, and then says nothing."""
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
    first = QuicPeer(target, open=False)
    [(hello, _), *_] = first.connection.datagrams_to_send(time.monotonic())
    payload = _crypto_of(hello, first)
    for _ in pace(200):
        throw(sock, target, Initials().packet(crypto(0, payload)))
        while readable(sock, 0):
            sock.recv(LARGEST)


def _crypto_of(hello: bytes, peer: QuicPeer) -> bytes:
    """The ClientHello in a client's first packet."""
    sender = next(iter(peer.quic._crypto_streams.values())).sender
    assert hello
    return bytes(sender._buffer)


@attack("quic", "handshakes without a session", "complete, and then ask for none until they are given up", processes=2)
def no_session(target: Target) -> None:
    peers: list[QuicPeer] = []
    for _ in pace(50):
        peer = QuicPeer(target, open=False)
        peer.connection._demultiplexer._wanted = None
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


@attack("quic", "Retries without number", "hellos beside 300 half-open connections, each answered with a Retry")
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


@attack("quic", "versions that nobody speaks", "2,000 packets/s, each to be answered", like="packets")
def versions(target: Target) -> None:
    sock = udp(target)
    for _ in pace(2000):
        throw(sock, target, unknown_version())


@attack("quic", "packets for nobody", "2,000 packets/s that ask for stateless resets; a reset must not tell of others")
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


@attack("quic", "a peer's reset forged", "the reset of one connection ID, tried on another: both must differ")
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
        # To the broker, a reset of its own making means nothing.
        peer.throw(b"\x40" + os.urandom(30) + (tokens or [bytes(16)])[0])
        peer.turn(0.01)


@attack("quic", "datagrams of any bytes", "5,000/s of all sizes", like="packets")
def noise(target: Target) -> None:
    sock = udp(target)
    for number, _ in enumerate(pace(5000)):
        throw(sock, target, os.urandom(1 + number * 7 % 1400))


@attack("quic", "datagrams of 64 KB", "200/s, of which the broker looks at none")
def large_datagrams(target: Target) -> None:
    sock = udp(target)
    data = b"\x43" + bytes(60_000)
    for _ in pace(200):
        throw(sock, target, data)


# After the handshake: frames


@attack(
    "quic",
    "empty STREAM frames",
    "packets full of them, 1,000/s",
    like="packets",
)
def empty_streams(target: Target) -> None:
    inject(target, same(full(b"\x0a\x04\x00")), 1000)


@attack("quic", "empty STREAM frames, 20 connections", "50 such packets/s on each of them", like="packets")
def many_empty_streams(target: Target) -> None:
    peers = [QuicPeer(target) for _ in range(20)]
    payload = full(b"\x0a\x04\x00")
    for number, _ in enumerate(pace(1000)):
        peer = peers[number % len(peers)]
        peer.inject(payload)
        while readable(peer.socket, 0):
            peer.socket.recv(LARGEST)


@attack("quic", "small packets, 20 connections", "a PING in each, 250/s on each of them", like="packets")
def many_small_packets(target: Target) -> None:
    peers = [QuicPeer(target) for _ in range(20)]
    for number, _ in enumerate(pace(5000)):
        peers[number % len(peers)].inject(b"\x01\x00\x00\x00")
        if number % 100 == 0:
            for peer in peers:
                peer.turn(0)


@attack("quic", "PING frames", "packets of 1,150 of them, 1,000/s", like="packets")
def ping_frames(target: Target) -> None:
    inject(target, same(full(b"\x01")), 1000)


@attack("quic", "frames that change nothing", "packets full of MAX_DATA 0, 1,000/s", like="packets")
def useless_frames(target: Target) -> None:
    inject(target, same(full(b"\x10\x00")), 1000)


@attack("quic", "RESET_STREAM storm", "packets full of resets of streams that there may be, 1,000/s", like="packets")
def reset_storm(target: Target) -> None:
    frames = [b"\x04" + varint(4 * number) + b"\x00\x00" for number in range(1, 16)]
    inject(target, same(fill(itertools.islice(itertools.cycle(frames), 400))), 1000)


@attack(
    "quic", "streams opened and reset", "as many as the credit allows, and again when they are gone", like="packets"
)
def rapid_reset(target: Target) -> None:
    peer = QuicPeer(target, target.token())
    while True:
        for bidirectional in (True, False):
            while (stream := peer.connection.open_stream(bidirectional=bidirectional)) is not None:
                peer.connection.send(stream, b"x")
                peer.connection.reset(stream, 0)
        peer.transmit()
        peer.turn(0.002)


@attack(
    "quic", "STOP_SENDING storm", "packets full of STOP_SENDING for streams that there may be, 1,000/s", like="packets"
)
def stop_storm(target: Target) -> None:
    frames = [b"\x05" + varint(4 * number) + b"\x00" for number in range(1, 16)]
    inject(target, same(fill(itertools.islice(itertools.cycle(frames), 400))), 1000)


@attack("quic", "key updates", "another key for each packet, 1,000/s", like="packets")
def key_updates(target: Target) -> None:
    peer = QuicPeer(target)
    for number, _ in enumerate(pace(1000)):
        if number % 2 == 0:
            peer.quic.request_key_update()
        peer.inject(b"\x01" + bytes(20))
        if number % 20 == 0:
            peer.turn(0)


@attack("quic", "false key updates", "packets with the other key phase that cannot be read, 1,000/s", like="packets")
def false_key_updates(target: Target) -> None:
    peer = QuicPeer(target)
    for number, _ in enumerate(pace(1000)):
        peer.throw(b"\x47" + peer.quic._peer_cid.cid + os.urandom(1000))
        if number % 50 == 0:
            peer.turn(0)


@attack(
    "quic", "moves and path challenges", "each packet from another port, full of PATH_CHALLENGE, 500/s", like="packets"
)
def migration(target: Target) -> None:
    peer = QuicPeer(target)
    others = [udp(target) for _ in range(200)]
    for number, _ in enumerate(pace(500)):
        frames = fill(b"\x1a" + os.urandom(8) for _ in range(ROOM))
        throw(others[number % len(others)], target, one_rtt(peer.quic, frames))
        if number % 50 == 0:
            peer.turn(0)


@attack("quic", "ACKs with many ranges", "500 ranges of packets that were never sent, 1,000/s", like="packets")
def many_ranges(target: Target) -> None:
    inject(target, same(ack(4, 1) + ack(2000, 500)), 1000)


@attack("quic", "ACKs of what was sent, with many ranges", "of the packets that there are, 1,000/s", like="packets")
def plausible_ranges(target: Target) -> None:
    peer = QuicPeer(target, target.token())
    for number, _ in enumerate(pace(1000)):
        if number % 4 == 0:
            peer.say(request("ping", seq=number))
        largest = max(peer.quic._spaces[list(peer.quic._spaces)[-1]].largest_received_packet, 2)
        peer.inject(ack(largest, max(1, min(500, largest // 2))))
        if number % 20 == 0:
            peer.turn(0)


@attack(
    "quic", "new connection IDs", "each retires the one before, and is to be answered, 1,000 packets/s", like="packets"
)
def new_ids(target: Target) -> None:
    def frames() -> Iterator[bytes]:
        sequence = 10
        while True:
            payload = b""
            for _ in range(30):
                sequence += 1
                payload += b"\x18" + varint(sequence) + varint(sequence) + b"\x08" + os.urandom(24)
            yield payload

    inject(target, frames(), 1000)


@attack("quic", "connection IDs retired", "each is to be replaced by the broker, 500 packets/s", like="packets")
def retired_ids(target: Target) -> None:
    peer = QuicPeer(target)
    for number, _ in enumerate(pace(500)):
        for each in peer.quic._peer_cid_available[:]:
            peer.quic._retire_peer_cid(each)
            peer.quic._peer_cid_available.remove(each)
        peer.transmit()
        if number % 2 == 0:
            peer.turn(0)


@attack("quic", "a TLS message of 16 MB after the handshake", "in CRYPTO frames, 900 packets/s", like="packets")
def late_crypto(target: Target) -> None:
    def frames() -> Iterator[bytes]:
        sent = 0
        while True:
            data = (CLIENT_HELLO if sent == 0 else b"") + bytes(ROOM - 10)
            yield crypto(sent, data)
            sent += len(data)

    inject(target, frames(), 900)


@attack("quic", "bytes with holes", "every other byte of a stream, 500 packets/s", like="packets")
def holes(target: Target) -> None:
    def frames() -> Iterator[bytes]:
        for start in itertools.count():
            offsets = (2 * (start * 100 + number) % 100_000 for number in range(200))
            yield fill(b"\x0e\x04" + varint(offset) + b"\x01x" for offset in offsets)

    inject(target, frames(), 500)


@attack("quic", "small packets", "a PING in each, 5,000/s", like="packets")
def small_packets(target: Target) -> None:
    inject(target, same(b"\x01\x00\x00\x00"), 5000)


# After the handshake: HTTP/3


@attack(
    "quic",
    "capsules",
    "of no bytes and no meaning on the session's stream, as many as the windows allow",
    like="packets",
)
def capsules(target: Target) -> None:
    peer = QuicPeer(target)
    session = peer.connection._session.id
    assert session is not None
    data = b"\x21\x00" * 500
    while True:
        if len(peer.quic._streams[session].sender._buffer) < 60_000:
            peer.quic.send_stream_data(session, b"\x00" + varint(len(data)) + data)
        peer.transmit()
        peer.turn(0.0005)


@attack(
    "quic", "QPACK instructions", "on the encoder's stream: a table that there must not be, connection after connection"
)
def qpack(target: Target) -> None:
    peer = QuicPeer(target)
    for number in itertools.count():
        peer.quic.send_stream_data(6, b"\x3f\xe1\x1f" if number % 2 else b"\x20" * 1000)
        peer.transmit()
        peer.turn(0.002)


@attack("quic", "requests with large headers", "GETs of 10 KB of headers, each answered with 404", like="packets")
def large_headers(target: Target) -> None:
    peer = QuicPeer(target)
    http3 = peer.connection._session.http3
    assert http3 is not None
    fields = [(b"x%d" % number, b"y" * 20) for number in range(300)]
    while True:
        if peer.quic.stream_credit(True) > 0:
            stream = peer.quic.get_next_available_stream_id()
            http3.send_headers(
                stream,
                [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"x"), (b":path", b"/"), *fields],
                end_stream=True,
            )
            peer.connection._streams.adopt(stream)
        peer.transmit()
        peer.turn(0.002)


@attack("quic", "datagrams of the session", "as many as fit, of no meaning", like="packets")
def session_datagrams(target: Target) -> None:
    inject(target, same(fill(b"\x31\x03\x00ab" for _ in range(ROOM))), 1000)


@attack("quic", "a CONNECT that is never finished", "half of the request, on 300 connections", processes=2)
def slow_connects(target: Target) -> None:
    peers: list[QuicPeer] = []
    for _ in pace(30):
        peer = QuicPeer(target, open=False)
        peer.connection._demultiplexer._wanted = None
        peer.transmit()
        peers.append(peer)
        for each in peers[-30:]:
            try:
                each.turn(0)
            except Ended:
                continue
            if each.quic._handshake_complete and not each.opened:
                each.opened = True
                each.quic.send_stream_data(0, b"\x01\x40\xff\x00")
                each.transmit()
        if len(peers) > 300:
            peers.pop(0).socket.close()


# With a token, after `auth`


@attack(
    "quic",
    "a peer that reads nothing",
    "acknowledges all, and takes nothing of what it asks for",
    token=True,
    processes=2,
)
def never_reads(target: Target) -> None:
    peer = QuicPeer(target, target.token())
    peer.connection.consumed = lambda *_: None  # type: ignore[method-assign]
    lines = b"".join([request("ping", seq=number) for number in range(100)])
    while True:
        if peer.connection.writable(peer.stream):
            peer.connection.send(peer.stream, lines)
        peer.turn(0.005)


@attack("quic", "streams for subscriptions, again and again", "subscribe with `stream`, and unsubscribe", token=True)
def stream_churn(target: Target) -> None:
    peer = QuicPeer(target, target.token())
    lines = b"".join(
        [
            request("subscribe", pattern=name, stream=True) + request("unsubscribe", pattern=name)
            for name in (f"honest.s{number}" for number in range(40))
        ]
    )
    while True:
        if peer.connection.writable(peer.stream):
            peer.connection.send(peer.stream, lines)
        peer.turn(0.002)


@attack(
    "quic",
    "pings with 1,000 subscriptions",
    "of which each is looked at, over WebTransport",
    token=True,
    like="packets",
)
def pings_with_subscriptions(target: Target) -> None:
    peer = QuicPeer(target, target.token())
    for number in range(1000):
        while not peer.connection.writable(peer.stream):
            peer.turn(0.01)
        peer.connection.send(peer.stream, request("subscribe", pattern=f"honest.p{number}"))
    lines = b"".join([request("ping", seq=number) for number in range(100)])
    while True:
        if peer.connection.writable(peer.stream):
            peer.connection.send(peer.stream, lines)
        peer.turn(0.002)
