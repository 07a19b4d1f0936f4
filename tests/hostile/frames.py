"""Attacks on QUIC and WebTransport after the handshake."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from catbus.webtransport.varint import encode as varint

from .attacks import Ended, Target, attack, pace
from .packets import ROOM, ack, crypto, fill, one_rtt
from .peers import LARGEST, QuicPeer, readable, request, throw, udp
from .quic import CLIENT_HELLO


def inject(target: Target, payloads: Iterable[bytes], rate: float) -> None:
    """Complete the handshake, then send packets with these frames at this rate, and read nothing."""
    peer = QuicPeer(target)
    payloads = iter(payloads)
    for number, _ in enumerate(pace(rate)):
        if number % (10 * rate) == 10 * rate - 1:
            # The broker may have closed it long ago, so connect again.
            peer.socket.close()
            peer = QuicPeer(target)
        peer.inject(next(payloads))
        while number % 20 == 0 and readable(peer.socket, 0):
            peer.socket.recv(LARGEST)


def same(payload: bytes) -> Iterator[bytes]:
    return itertools.repeat(payload)


def full(frame: bytes) -> bytes:
    """Repeat a frame as often as it fits into a packet."""
    return fill(itertools.repeat(frame, ROOM))


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
    flood_streams(target, [QuicPeer(target) for _ in range(20)])


def flood_streams(target: Target, peers: Sequence[QuicPeer]) -> None:
    """Send 1,000 packets per second full of empty STREAM frames of all these streams in turn, and read nothing."""
    payload = full(b"\x0a\x04\x00")
    for number, _ in enumerate(pace(1000)):
        peer = peers[number % len(peers)]
        peer.inject(payload)
        while readable(peer.socket, 0):
            peer.socket.recv(LARGEST)


@attack(
    "quic",
    "empty STREAM frames, 20 sessions",
    "50 such packets/s on each, with one client's token",
    token=True,
    left=20,
    like="packets",
)
def empty_streams_with_token(target: Target) -> None:
    flood_streams(target, [QuicPeer(target, target.token()) for _ in range(20)])


@attack(
    "quic",
    "empty STREAM frames, 20 clients",
    "50 such packets/s on each, with a token of another client on each",
    token=True,
    left=20,
    like="packets",
)
def empty_streams_of_clients(target: Target) -> None:
    flood_streams(target, [QuicPeer(target, target.token(f"mallory {number}")) for number in range(20)])


@attack(
    "quic",
    "broken rules",
    "sessions that send a frame that there is not, one after the other: each could be logged",
    like="packets",
)
def broken_rules(target: Target) -> None:
    while True:
        peer = QuicPeer(target)
        peer.inject(b"\x3f")
        with suppress(Ended):
            peer.turn(0.1)
        peer.socket.close()


@attack(
    "quic",
    "sessions without a token",
    "50/s, which answer every ping and never authenticate",
    processes=2,
    like="packets",
)
def tokenless_sessions(target: Target) -> None:
    peers: list[QuicPeer] = []
    for _ in pace(25):
        peers.append(QuicPeer(target))
        for each in tuple(peers):
            try:
                each.turn(0)
            except Ended:
                peers.remove(each)


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
    session = peer.connection._connect_stream.id
    assert session is not None
    data = b"\x21\x00" * 500
    while True:
        if len(peer.quic._streams[session].sender._buffer) < 60_000:
            peer.quic.send_stream_data(session, b"\x00" + varint(len(data)) + data)
        peer.transmit()
        peer.turn(0.0005)


@attack(
    "quic",
    "QPACK instructions",
    "on the encoder's stream: a table that there must not be, connection after connection",
    like="packets",
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
    http3 = peer.connection._connect_stream.http3
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
            peer.connection._streams.register(stream)
        peer.transmit()
        peer.turn(0.002)


@attack("quic", "datagrams of the session", "as many as fit, of no meaning", like="packets")
def session_datagrams(target: Target) -> None:
    inject(target, same(fill(b"\x31\x03\x00ab" for _ in range(ROOM))), 1000)


@attack(
    "quic", "a CONNECT that is never finished", "half of the request, on 300 connections", processes=2, like="packets"
)
def slow_connects(target: Target) -> None:
    peers: list[QuicPeer] = []
    for _ in pace(30):
        peer = QuicPeer(target, open=False)
        peer.connection._demultiplexer._session_request = None
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
    "a WebTransport client that reads nothing",
    "acknowledges all, and takes nothing of what it asks for",
    token=True,
    processes=2,
    like="packets",
)
def never_reads(target: Target) -> None:
    peer = QuicPeer(target, target.token())
    peer.connection.consumed = lambda *_: None  # type: ignore[method-assign]
    lines = b"".join([request("ping", seq=number) for number in range(100)])
    while True:
        if peer.connection.writable(peer.stream):
            peer.connection.send(peer.stream, lines)
        peer.turn(0.005)


@attack(
    "quic",
    "subscription streams opened and closed",
    "subscribe with `stream`, and unsubscribe",
    token=True,
    like="packets",
)
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
