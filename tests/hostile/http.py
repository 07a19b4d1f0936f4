"""Attacks on HTTP, by unauthenticated peers and with a token."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from .attacks import FEW_BYTES, SECRET, Ended, Target, attack
from .peers import GET, POST, UPGRADE, Peer, jwt_of, pump

BODY = 1 << 20


def hold(target: Target, count: int, begin: Callable[[Peer], None], idle: Callable[[Peer], None]) -> None:
    """Open this many connections, start something on each, then do `idle` on each once per second."""
    peers: list[Peer] = []
    try:
        for _ in range(count):
            peer = Peer(target)
            peers.append(peer)
            begin(peer)
        while peers:
            time.sleep(1)
            for peer in tuple(peers):
                try:
                    idle(peer)
                    peer.drain()
                except Ended:
                    peers.remove(peer)
    finally:
        for peer in peers:
            peer.close()


def nothing(peer: Peer) -> None:
    """Send nothing."""


# Bodies


@attack(
    "http",
    "chunks of one byte",
    "a body of which each byte is a chunk",
    like="requests",
)
@attack(
    "http",
    "chunks of one byte, 4 connections",
    "the same, 4 times",
    like="requests",
    processes=4,
)
def tiny_chunks(target: Target) -> None:
    peer = Peer(target)
    peer.send(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    burst = b"1\r\nx\r\n" * 10_000
    while True:
        peer.send(burst)


@attack("http", "chunks of one byte, 100 connections", "each of them a little at a time", like="requests", processes=2)
def many_tiny_chunks(target: Target) -> None:
    peers = [Peer(target) for _ in range(50)]
    for peer in peers:
        peer.send(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    pump(peers, b"1\r\nx\r\n" * 10_000)


@attack(
    "http",
    "chunks with long extensions",
    "a body of chunks of one byte, each with an extension of 15 KB that means nothing",
    like="requests",
)
def chunk_extensions(target: Target) -> None:
    peer = Peer(target)
    peer.send(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"1;" + b"x" * 15_000 + b"\r\ny\r\n"
    while True:
        peer.send(chunk)


@attack(
    "http",
    "unfinished bodies",
    "1,000 connections send a megabyte to /publish but for its last byte, and no token",
    like="requests",
)
def unfinished_bodies(target: Target) -> None:
    head = POST + b"Content-Length: %d\r\n\r\n" % BODY
    hold(target, 1000, lambda peer: peer.send(head + bytes(BODY - 1)), nothing)


@attack("http", "a body byte by byte", "500 connections send a byte of a body each second", like="connections")
def slow_bodies(target: Target) -> None:
    hold(
        target,
        500,
        lambda peer: peer.send(POST + b"Content-Length: 1000\r\n\r\n"),
        lambda peer: peer.send(b"x"),
    )


@attack(
    "http",
    "an array of half a million numbers",
    "an array of half a million numbers to /publish",
    token=True,
    like="requests",
)
def numbers(target: Target) -> None:
    body = b"[" + b"1," * (BODY // 2 - 2) + b"1]"
    head = POST + b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (target.token().encode(), len(body))
    peer = Peer(target)
    while True:
        peer.send(head + body)
        peer.wait_for(b"}\n")


@attack(
    "http",
    "a thousand ephemeral messages in a request",
    "each of which is looked for in 800 grants before others have their turn",
    token=True,
    processes=4,
    like="requests",
)
def many_ephemeral(target: Target) -> None:
    token = jwt_of(SECRET, {"sub": "mallory", "catbus": {"write": [*(f"g{number}" for number in range(800)), "z"]}})
    message = {"channel": "z", "payload": 1, "ephemeral": True}
    body = json.dumps([message] * 1000).encode()
    head = POST + b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n"
    head %= (token.encode(), len(body))
    peer = Peer(target)
    while True:
        peer.send(head + body)
        peer.wait_for(b"]\n")


@attack(
    "http",
    "publishes over 150 connections",
    "each publishes 1,000 messages in a request, again and again",
    token=True,
    log="postgres",
    processes=2,
    kept=160,
    stands=False,
    like="requests",
)
def many_publishes(target: Target) -> None:
    body = json.dumps([{"channel": "noise.http", "payload": "x" * 50}] * 1000).encode()
    head = POST + b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (target.token().encode(), len(body))
    peers = [Peer(target) for _ in range(75)]
    while True:
        for peer in peers:
            peer.send(head + body)
        for peer in peers:
            peer.wait_for(b"]\n")


# Heads and responses


@attack("http", "silence after connecting", "2,000 connections say nothing at all", like="connections")
def silence(target: Target) -> None:
    hold(target, 2000, nothing, nothing)


@attack("http", "a head byte by byte", "500 connections send a byte of a request each second", like="connections")
def slow_heads(target: Target) -> None:
    hold(target, 500, lambda peer: peer.send(b"GET / HTTP/1.1\r\nX: "), lambda peer: peer.send(b"x"))


@attack(
    "http",
    "a WebSocket handshake byte by byte",
    "500 connections send a byte of an Upgrade each second",
    like="connections",
)
def slow_upgrades(target: Target) -> None:
    hold(target, 500, lambda peer: peer.send(UPGRADE[:100]), lambda peer: peer.send(b"x"))


@attack("http", "heads of 16 KB that do not end", "connection after connection", like="connections")
def long_heads(target: Target) -> None:
    head = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2600
    while True:
        peer = Peer(target)
        peer.send(head)
        peer.receive(0)


@attack("http", "a head line by line", "2,600 lines of a head, each a packet of its own", like="requests")
def heads_in_lines(target: Target) -> None:
    while True:
        peer = Peer(target)
        peer.send(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        for _ in range(2600):
            peer.send(b"a: b\r\n")
        peer.send(b"\r\n")
        peer.wait_for(b"\r\n\r\n")
        peer.close()


@attack(
    "http",
    "requests without reading answers",
    "/catbus.js is asked for without end, and nothing read",
    processes=4,
    like="requests",
)
def unread_answers(target: Target) -> None:
    peer = Peer(target)
    burst = GET % b"/catbus.js" * 100
    while True:
        peer.send(burst)


@attack("http", "pipelined requests", "as many as fit, the answers are read", like="requests")
def pipelined(target: Target) -> None:
    peer = Peer(target)
    burst = GET % b"/health" * 100
    while True:
        peer.send(burst)
        peer.drain()


@attack("http", "scrapes of /metrics", "again and again, over 4 connections", processes=4, like="requests")
def scrapes(target: Target) -> None:
    peer = Peer(target)
    while True:
        peer.send(GET % b"/metrics")
        peer.wait_for(b"catbus_")
        peer.drain()


@attack(
    "http",
    "bytes after the last answer",
    "a connection that is being closed goes on sending",
    processes=4,
    like="requests",
)
def after_the_end(target: Target) -> None:
    peer = Peer(target)
    peer.send(b"nonsense\r\n\r\n")
    while True:
        peer.send(bytes(1 << 16))


# Pages of messages


def request_page(target: Target, query: str) -> bytes:
    head = f"GET /messages?{query} HTTP/1.1\r\nHost: bus.example\r\nAuthorization: Bearer {target.token()}\r\n\r\n"
    return head.encode()


@attack(
    "http",
    "pages of a silent channel",
    "20 connections search 300,000 messages in the database from the first, again and again, and get nothing",
    token=True,
    log="postgres",
    filled=300_000,
    kept=160,
    alone=FEW_BYTES,
)
def silent_pages(target: Target) -> None:
    peers = [Peer(target) for _ in range(20)]
    request = request_page(target, "pattern=mallory.nothing&since=0")
    while True:
        for peer in peers:
            peer.send(request)
        for peer in peers:
            peer.wait_for(b'"more"')


@attack(
    "http",
    "pages that are not read",
    "400 connections ask for a page of a megabyte each, and read nothing",
    token=True,
    kept=64,
    alone=FEW_BYTES,
)
def unread_pages(target: Target) -> None:
    body = json.dumps([{"channel": "mallory.large", "payload": "x" * 60_000}] * 15).encode()
    head = POST + b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (target.token().encode(), len(body))
    publisher = Peer(target)
    publisher.send(head + body)
    publisher.wait_for(b"]\n")
    request = request_page(target, "pattern=mallory.large&limit=1000")
    peers = [Peer(target) for _ in range(400)]
    for peer in peers:
        peer.send(request)
    while True:
        time.sleep(1)


@attack(
    "http",
    "requests that wait",
    "500 connections wait for a message that the client then publishes, again and again",
    token=True,
    kept=64,
    alone=FEW_BYTES,
)
def waiting_requests(target: Target) -> None:
    body = b'{"channel":"mallory.now","payload":1}'
    publisher, peers = Peer(target), [Peer(target) for _ in range(500)]
    post = POST + b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (target.token().encode(), len(body))
    request = request_page(target, "pattern=mallory.now&wait=5")
    while True:
        for peer in peers:
            peer.send(request)
        publisher.send(post + body)
        publisher.wait_for(b"}\n")
        for peer in peers:
            peer.wait_for(b'"more"')


# Connections


@attack(
    "http",
    "connections up to the limit",
    "one address holds 10,000 connections, and comes back for those that are closed",
    processes=4,
    like="connections",
)
def all_connections(target: Target) -> None:
    hold(target, 2600, lambda peer: peer.send(b"GET /"), nothing)


@attack(
    "http",
    "connections from 10,000 addresses",
    "one from each, up to the limit; for each further one the broker looks for one to end",
    processes=4,
    like="connections",
)
def many_addresses(target: Target) -> None:
    peers = []
    number = os.getpid() * 4096
    while True:
        number += 1
        address = f"127.{1 + (number >> 16 & 0x7F)}.{number >> 8 & 0xFF}.{number & 0xFF}"
        peers.append(Peer(target, address=address))
        if len(peers) > 3000:
            peers.pop(0).close()


@attack("http", "requests over 200 connections", "each asks for /health again and again", like="requests", processes=2)
def many_requests(target: Target) -> None:
    pump([Peer(target) for _ in range(100)], GET % b"/health" * 20)


@attack(
    "http",
    "keep-alive up to the limit of files",
    "one address asks for /health on 1,000 connections and keeps them, where the process may have 1,024 files",
    open_files=1024,
    like="connections",
)
def keep_alive(target: Target) -> None:
    hold(target, 1000, lambda peer: peer.send(GET % b"/health"), nothing)


@attack("http", "connecting and leaving", "as fast as possible, over 2 processes", processes=2, like="connections")
def come_and_go(target: Target) -> None:
    while True:
        Peer(target).close()
