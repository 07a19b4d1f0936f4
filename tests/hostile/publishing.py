"""Attacks by clients with a token that publish."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from catbus.auth.grants import Grants

from .attacks import SECRET, Target, attack, pace
from .peers import WebSocketPeer, frame, jwt_of, keep, pour, pump, request

RING = 160
"""MiB of the newest part of the log in a process, with Python's overhead for small messages."""


@attack(
    "session",
    "messages of 60 KB",
    "one session publishes them as fast as they are taken",
    token=True,
    log="postgres",
    kept=RING,
    like="bytes",
)
@attack(
    "session",
    "messages of 60 KB, 4 sessions",
    "the same, 4 times",
    token=True,
    log="postgres",
    processes=4,
    kept=RING,
    like="bytes",
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
    like="bytes",
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
    "with one token, from one address, as fast as they are taken",
    token=True,
    log="postgres",
    processes=4,
    kept=RING,
    like="bytes",
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
    like="bytes",
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
    like="bytes",
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
    """Make the shortest token with many grants, signed with the broker's secret (HS256)."""
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
    processes=2,
    kept=RING,
    like="bytes",
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
