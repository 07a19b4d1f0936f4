"""Attacks by clients with a token, and by roles of the database."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import socket
import time
from collections.abc import Sequence

import asyncpg  # type: ignore[import-untyped]

from catbus.auth import Grants

from .attacks import SECRET, Ended, Target, attack, pace
from .http import jwt_of
from .peers import Peer, WebSocketPeer, frame, pump, request
from .websocket import keep

FAR_AHEAD = 1 << 62
RING = 160
"""MiB that the newest part of the log may take of a process, with what Python adds to small messages."""


def pour(peer: WebSocketPeer, lines: bytes, units: int = 1) -> None:
    """Send the same frame without end, as fast as it is taken, and drop what comes."""
    data = frame(lines)
    while True:
        peer.send(data, units)
        peer.drain()


# Publishing


@attack(
    "session",
    "messages of 60 KB",
    "one session publishes them as fast as they are taken",
    token=True,
    log="postgres",
    kept=RING,
)
@attack(
    "session",
    "messages of 60 KB, 4 sessions",
    "the same, 4 times",
    token=True,
    log="postgres",
    processes=4,
    kept=RING,
)
def large_publishes(target: Target) -> None:
    peer = WebSocketPeer(target, target.token())
    for number in itertools.count():
        peer.send(frame(request("publish", channel="noise.large", payload="x" * 60_000, id=number, ack=False)))
        peer.drain()


@attack(
    "session",
    "small messages, 25 sessions",
    "25 sessions publish as fast as they are taken",
    token=True,
    log="postgres",
    processes=4,
    kept=RING,
)
def small_publishes(target: Target) -> None:
    peers = [WebSocketPeer(target, target.token(f"mallory {number}")) for number in range(6)]
    for number in itertools.count():
        lines = [
            request("publish", channel="noise.small", payload=1, id=number * 200 + each, ack=False)
            for each in range(200)
        ]
        for peer in peers:
            peer.send(frame(b"".join(lines)))
            peer.drain()


@attack(
    "session",
    "200 sessions without a client_id",
    "each with a share of the log, as nobody can tell that they are one client's",
    token=True,
    log="postgres",
    processes=4,
    kept=RING,
    stands=False,
)
def anonymous(target: Target) -> None:
    token = jwt_of(SECRET, {"catbus": {"read": ["*"], "write": ["*"]}})
    peers = [WebSocketPeer(target, token) for _ in range(50)]
    lines = b"".join([request("publish", channel="noise.many", payload=1, ack=False)] * 100)
    pump(peers, frame(lines))


@attack(
    "session",
    "one id over and over",
    "publishes that repeat their id, of which a commit can take but one; 100 a frame",
    token=True,
    log="postgres",
    like="bytes",
)
def one_id(target: Target) -> None:
    peer = WebSocketPeer(target, target.token())
    pour(peer, request("publish", channel="noise.again", payload=1, id=1, ack=False) * 100)


@attack(
    "session",
    "retries of what never was",
    "each is looked for in the log",
    token=True,
    log="postgres",
    processes=2,
    kept=RING,
)
def retries(target: Target) -> None:
    peer = WebSocketPeer(target)
    answer = peer.ask(request("auth", token=target.token(), protocol=1), b'"auth_ok"')
    epoch = answer.partition(b'"epoch":"')[2].partition(b'"')[0].decode()
    for start in itertools.count(0, 100):
        lines = [
            request("publish", channel="noise.retry", payload=1, id=start + n, retry=True, after=0, epoch=epoch)
            for n in range(100)
        ]
        peer.send(frame(b"".join(lines)))
        peer.drain()


@attack(
    "session",
    "a client_id of 5.9 KB",
    "60,000 messages of a byte by such a client, as another replica keeps them",
    token=True,
    log="postgres",
    replicas=2,
    kept=32,
)
def long_client_id(target: Target) -> None:
    peer = WebSocketPeer(target, target.token("m" * 5900), target.elsewhere)
    line = request("publish", channel="noise.long", payload=1, ack=False)
    for _ in range(600):
        peer.send(frame(line * 100))
        peer.drain()
    keep([peer], b"")


@attack(
    "session",
    "ephemeral messages",
    "as fast as they are taken, to 1,000 subscriptions of one's own that are not read",
    token=True,
    like="bytes",
    processes=2,
)
def ephemeral(target: Target) -> None:
    listener = WebSocketPeer(target, target.token())
    listener.subscribe_all(["honest.e." + ".".join("x" * depth) + ".*" for depth in range(1, 25)])
    peer = WebSocketPeer(target, target.token())
    channel = "honest.e." + ".".join("x" * 26)
    pour(peer, request("publish", channel=channel, payload=1, ephemeral=True, ack=False) * 100)


@attack(
    "session",
    "messages that match 28 patterns",
    "20 sessions hold a pattern for each segment, and get 28 copies of each message, which they read",
    token=True,
    like="bytes",
    kept=RING,
)
def amplified(target: Target) -> None:
    patterns = [".".join(["deep"] * depth) + ".*" for depth in range(1, 29)]
    readers = [WebSocketPeer(target, target.token()) for _ in range(20)]
    for reader in readers:
        reader.subscribe_all(patterns)
    peer = WebSocketPeer(target, target.token())
    line = frame(request("publish", channel=".".join(["deep"] * 30), payload="x" * 100, ack=False) * 10)
    for _ in pace(100):
        peer.send(line)
        for reader in readers:
            reader.drain()


@attack(
    "session",
    "a first-version session with 1,000 patterns",
    "for which all that match is merged, and 20 of which match each message",
    token=True,
    like="bytes",
    kept=RING,
)
def first_version(target: Target) -> None:
    readers = [WebSocketPeer(target, target.token(), protocol=0) for _ in range(10)]
    for reader in readers:
        for start in range(0, 1000, 100):
            patterns = [f"deep.{start + number}" for number in range(80)]
            patterns += [".".join(["deep"] * (2 + number)) + ".*" for number in range(20)]
            reader.send(frame(b"".join([request("subscribe", pattern=pattern) for pattern in patterns])))
            reader.wait_for(b"deep." + b"deep." * 20 + b"*")
    peer = WebSocketPeer(target, target.token())
    line = frame(request("publish", channel=".".join(["deep"] * 30), payload="x" * 100, ack=False) * 10)
    for _ in pace(100):
        peer.send(line)
        for reader in readers:
            reader.drain()


# Grants


def pattern_token(grants: Sequence[str], write: Sequence[str] = ()) -> str:
    """A token with many grants, as short as it can be: HS256, by the broker's own secret."""
    return jwt_of(SECRET, {"sub": "mallory", "catbus": {"read": list(grants), "write": list(write)}})


MANY = [f"g{number}" for number in range(859)]


@attack(
    "session",
    "auth again and again",
    "with 860 grants and 1,000 subscriptions, of which the last grant covers all",
    token=True,
    like="bytes",
)
def auth_again(target: Target) -> None:
    token = pattern_token([*MANY, "z.*"])
    peer = WebSocketPeer(target, token)
    peer.subscribe_all([f"z.{number}" for number in range(1000)])
    pour(peer, request("auth", token=token, protocol=1))


@attack(
    "session",
    "grants back and forth",
    "two tokens that may write different channels by turns, with publishes on their way, beside 4 that flood",
    token=True,
    log="postgres",
    like="bytes",
    processes=2,
    kept=RING,
)
def grants_back_and_forth(target: Target) -> None:
    tokens = [target.token(grants=Grants(("*",), ("noise.*", f"other{number}.*"))) for number in range(2)]
    floods = [WebSocketPeer(target, target.token()) for _ in range(4)]
    peer = WebSocketPeer(target, tokens[0])
    publishes = request("publish", channel="noise.x", payload="x" * 100, ack=False) * 200
    while True:
        for flood in floods:
            flood.send(frame(publishes))
            flood.drain()
        for token in tokens * 5:
            peer.send(frame(request("publish", channel="noise.y", payload=1, ack=False)))
            peer.send(frame(request("auth", token=token, protocol=1)))
        peer.drain()


@attack(
    "session",
    "publishes checked against 1,000 grants",
    "messages to a channel that the last grant covers",
    token=True,
    like="bytes",
    processes=4,
    kept=RING,
)
def many_grants(target: Target) -> None:
    peer = WebSocketPeer(target, pattern_token([], [*MANY, "z.*"]))
    pour(peer, request("publish", channel="z.x", payload=1, ack=False) * 100)


# Subscribing


@attack(
    "session",
    "patterns of 31 segments",
    "50 sessions with 1,000 of them each, and then all leave and come again",
    token=True,
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
    "each /metrics looks at those that are late, by a stranger",
    token=True,
    processes=2,
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


# Asking


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
    "pongs that nobody reads",
    "300 sessions ask for more than they ever take",
    token=True,
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
    "history of what nobody publishes",
    "8 sessions ask for it, over 300,000 messages in PostgreSQL",
    token=True,
    log="postgres",
    filled=300_000,
    processes=2,
    kept=RING,
)
@attack(
    "session",
    "history of what nobody publishes, in memory",
    "8 sessions have all of the log looked through",
    token=True,
    filled=300_000,
    processes=2,
    kept=RING,
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
    settings='[limits]\nmailbox_total = "16MiB"\n',
    kept=RING,
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


# Leaving


@attack(
    "session",
    "stopping beside those who do not leave",
    "sessions that read nothing, slow requests and newcomers, while the broker is told to stop",
    token=True,
    drains=True,
    processes=2,
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
