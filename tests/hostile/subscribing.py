"""Attacks by clients with a token that subscribe and send requests, and by database roles."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import time

import asyncpg  # type: ignore[import-untyped]

from catbus.auth.grants import Grants

from .attacks import FEW_BYTES, Ended, Target, attack, pace
from .peers import Peer, WebSocketPeer, frame, keep, pour, request
from .publishing import RING

FAR_AHEAD = 1 << 62


@attack(
    "session",
    "patterns of 31 segments",
    "50 sessions with 1,000 of them each, and then all leave and come again",
    token=True,
    like="bytes",
)
def long_patterns(target: Target) -> None:
    peers = []
    for _ in range(50):
        peer = WebSocketPeer(target, target.token())
        peers.append(peer)
        name = f"{random.getrandbits(32):08x}"
        tail = ".".join(["x"] * 28)
        peer.subscribe_all([f"{name}.n{number}.{tail}.*" for number in range(1000)])
    time.sleep(1)
    for peer in peers:
        peer.close()


@attack(
    "session",
    "since 0 on a silent channel",
    "in a loop, over 300,000 messages: 20 sessions catch up with everything, and get nothing",
    token=True,
    log="postgres",
    filled=300_000,
    kept=RING,
    alone=FEW_BYTES,
)
def since_nothing(target: Target) -> None:
    peers = [WebSocketPeer(target, target.token()) for _ in range(20)]
    lines = request("subscribe", pattern="mallory.nothing", since=0)
    while True:
        for peer in peers:
            peer.send(frame(lines))
        for peer in peers:
            peer.wait_for(b'"live"')


@attack(
    "session",
    "since 0, again before it is live",
    "1,000 subscriptions that begin again and again, over 20,000 messages in memory",
    token=True,
    filled=20_000,
    like="bytes",
)
def since_again(target: Target) -> None:
    peer = WebSocketPeer(target, target.token())
    lines = [request("subscribe", pattern=f"mallory.n{number}", since=0) for number in range(1000)]
    while True:
        for start in range(0, 1000, 50):
            peer.send(frame(b"".join(lines[start : start + 50])))
            peer.drain()


@attack(
    "session",
    "cursors far ahead of the log",
    "50 sessions with 1,000 subscriptions that wait for seq 2^62: each is looked at with every commit",
    token=True,
    like="bytes",
)
def far_ahead(target: Target) -> None:
    peers = [WebSocketPeer(target, target.token()) for _ in range(50)]
    for number, peer in enumerate(peers):
        peer.subscribe_all([f"a{number}.n{each}" for each in range(1000)], since=FAR_AHEAD)
    keep(peers, b"")


@attack(
    "session",
    "wildcards that come and go",
    "each empties what the broker remembers of which channel matches what",
    token=True,
    like="bytes",
    processes=2,
)
def wildcards(target: Target) -> None:
    peer = WebSocketPeer(target, target.token())
    lines = request("subscribe", pattern="mallory.*") + request("unsubscribe", pattern="mallory.*")
    pour(peer, lines * 50)


@attack(
    "session",
    "subscribe and unsubscribe, patterns of 31 segments",
    "as fast as they are taken",
    token=True,
    like="bytes",
    processes=2,
)
def pattern_churn(target: Target) -> None:
    peer = WebSocketPeer(target, target.token())
    tail = ".".join(["x"] * 28)
    lines = [
        request("subscribe", pattern=f"m{number}.{tail}") + request("unsubscribe", pattern=f"m{number}.{tail}")
        for number in range(50)
    ]
    pour(peer, b"".join(lines))


@attack(
    "session",
    "coming and going with 1,000 subscriptions",
    "each time all of them are made and given up",
    token=True,
    processes=2,
    like="bytes",
)
def heavy_visits(target: Target) -> None:
    patterns = [f"mallory.{os.getpid()}.{number}" for number in range(1000)]
    while True:
        peer = WebSocketPeer(target, target.token())
        peer.subscribe_all(patterns)
        peer.close()


@attack(
    "session",
    "scrapes beside 50,000 subscriptions",
    "each /metrics looks at those that are lagging, by a stranger",
    token=True,
    processes=2,
    like="bytes",
)
def heavy_scrapes(target: Target) -> None:
    peers = [WebSocketPeer(target, target.token()) for _ in range(25)]
    for number, peer in enumerate(peers):
        peer.subscribe_all([f"s{os.getpid()}.{number}.{each}" for each in range(1000)], since=FAR_AHEAD)
    scraper = Peer(target)
    while True:
        scraper.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        scraper.wait_for(b"catbus_")
        scraper.drain()


# Requests


@attack(
    "session",
    "pings with 1,000 subscriptions, 4 sessions",
    "each ping looks at all of them",
    token=True,
    like="bytes",
    processes=4,
)
def heavy_pings(target: Target) -> None:
    peer = WebSocketPeer(target, target.token())
    peer.subscribe_all([f"mallory.{number}" for number in range(1000)])
    pour(peer, request("ping", seq=1) * 500)


@attack(
    "session",
    "replies that are not read",
    "300 sessions ask for more than they ever take",
    token=True,
    like="bytes",
)
def unread_replies(target: Target) -> None:
    peers = [WebSocketPeer(target, target.token()) for _ in range(300)]
    data = frame(request("ping", seq=1) * 2000)
    for peer in peers:
        peer.socket.settimeout(0.05)
    while True:
        for peer in peers:
            try:
                peer.send(data)
            except Ended:
                continue
        time.sleep(0.2)


@attack(
    "session",
    "pipelined history of 1,000",
    "8 sessions ask for it without waiting",
    token=True,
    log="postgres",
    filled=20_000,
    processes=2,
    stands=False,
    alone=FEW_BYTES,
)
def history(target: Target) -> None:
    peers = [WebSocketPeer(target, target.token()) for _ in range(4)]
    lines = request("history", pattern="*", limit=1000) * 8
    while True:
        for peer in peers:
            peer.send(frame(lines))
        for peer in peers:
            for _ in range(8):
                peer.wait_for(b'"more"')


@attack(
    "session",
    "history of an empty channel",
    "8 sessions ask for it, over 300,000 messages in PostgreSQL",
    token=True,
    log="postgres",
    filled=300_000,
    processes=2,
    kept=RING,
    alone=FEW_BYTES,
)
@attack(
    "session",
    "history of an empty channel, in memory",
    "8 sessions have all of the log looked through",
    token=True,
    filled=300_000,
    processes=2,
    kept=RING,
    alone=FEW_BYTES,
)
def narrow_history(target: Target) -> None:
    peers = [WebSocketPeer(target, target.token()) for _ in range(4)]
    lines = request("history", pattern="noise.fill1000.*", limit=1000) * 8
    while True:
        for peer in peers:
            peer.send(frame(lines))
        for peer in peers:
            peer.wait_for(b'"more"')


@attack(
    "session",
    "a subscriber that reads nothing",
    "20 sessions are to get 5 MB/s, and take none of it",
    token=True,
    like="bytes",
    kept=RING,
)
def unread(target: Target) -> None:
    peers = [WebSocketPeer(target, target.token()) for _ in range(20)]
    for peer in peers:
        peer.subscribe_all(["noise.*"])
    publisher = WebSocketPeer(target, target.token())
    for number, _ in enumerate(pace(300)):
        publisher.send(frame(request("publish", channel="noise.unread", payload="x" * 16_000, id=number, ack=False)))
        publisher.drain()


@attack(
    "session",
    "messages that cannot be taken back",
    "40 sessions read nothing of what they have asked for, and unsubscribe from it: it stays in memory for them",
    token=True,
    settings='[limits]\nsend_queue_total = "16MiB"\n',
    kept=RING,
    like="bytes",
)
def pinned(target: Target) -> None:
    peers = [WebSocketPeer(target, target.token()) for _ in range(40)]
    publisher = WebSocketPeer(target, target.token())
    for number, peer in enumerate(peers):
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.subscribe_all([f"mallory.p{number}"])
    for number, peer in enumerate(peers):
        line = request("publish", channel=f"mallory.p{number}", payload="x" * 40_000, id=number)
        for _ in range(12):
            publisher.send(frame(line.replace(b'"id"', b'"ack":false,"id"')))
        publisher.ask(line.replace(b'"id": ', b'"id":7'), b'"published"')
        peer.send(frame(request("unsubscribe", pattern=f"mallory.p{number}")))
    while True:
        time.sleep(0.5)
        publisher.drain()


@attack(
    "session",
    "grants given up with messages waiting",
    "1,000 subscriptions with unread messages of which a narrower token covers none, and a wider one all again",
    token=True,
    kept=RING,
    like="bytes",
)
def narrower_and_wider(target: Target) -> None:
    wide, narrow = target.token(), target.token(grants=Grants(("mallory.none",), ("*",)))
    patterns = [f"mallory.g{number}" for number in range(1000)]
    publisher = WebSocketPeer(target, wide)
    messages = b"".join([request("publish", channel=pattern, payload=1, ack=False) for pattern in patterns])
    while True:
        peer = WebSocketPeer(target, wide)
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.subscribe_all(patterns)
        for _ in range(4):
            for start in range(0, len(messages), 50_000):
                publisher.send(frame(messages[start : start + 50_000]))
        publisher.drain()
        peer.send(frame(request("auth", token=narrow, protocol=1)))
        peer.wait_for(b'"auth_ok"')
        peer.socket.close()


# Disconnecting


@attack(
    "session",
    "stopping beside clients that do not leave",
    "sessions that read nothing, slow requests and newcomers, while the broker is told to stop",
    token=True,
    drains=True,
    processes=2,
    alone="the broker is gone when the attack is over",
)
def stopping(target: Target) -> None:
    silent = [WebSocketPeer(target, target.token()) for _ in range(100)]
    for peer in silent:
        peer.socket.settimeout(0.05)
        try:
            peer.send(frame(request("ping", seq=1) * 2000))
        except Ended:
            continue
    slow = [Peer(target) for _ in range(100)]
    for each in slow:
        each.send(b"POST /publish HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
    while True:
        for each in slow:
            each.send(b"x")
        time.sleep(0.1)


# The database


@attack(
    "session",
    "notifications by another role",
    "any role that may connect to the database announces roles and messages that there are not",
    token=True,
    log="postgres",
    alone="it sends to the database, and the broker nothing",
)
def notifications(target: Target) -> None:
    async def notify() -> None:
        connection = await asyncpg.connect(target.database)
        try:
            await connection.execute("DO $$ BEGIN CREATE ROLE mallory LOGIN; EXCEPTION WHEN OTHERS THEN NULL; END $$")
            await connection.execute("SET ROLE mallory")
            notes = [("catbus", "x" * 7000), ("catbus", f"e:1:{FAR_AHEAD}"), ("catbus_roles", "zz")]
            notes += [("catbus_roles", ""), ("catbus_ephemeral", json.dumps(["x"] * 1000)), ("catbus", ":::")]
            while True:
                for channel, text in notes * 20:
                    await connection.execute("SELECT pg_notify($1, $2 || ' ' || random())", channel, text[:7900])
                    await connection.execute("SELECT pg_notify($1, $2)", channel, text[:7900])
                target.tally.sent(0)
        finally:
            await connection.close()

    asyncio.run(notify())
