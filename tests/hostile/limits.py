"""Attacks on limits by clients that pretend to be many: through a trusted proxy, and with many tokens."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import time

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign

from .attacks import SECRET, Target, attack
from .broker import ADDRESS_CONNECTIONS
from .peers import PATIENCE, POST, UPGRADE, Peer, WebSocketPeer, frame, jwt_of, pump, request
from .publishing import RING

CLIENT = "198.51.100.7"
"""The attackers' address, which the proxy appends to the header that they sent."""
BODY = json.dumps([{"channel": "noise.limits", "payload": 1, "ephemeral": True}] * 10).encode()


def behind_proxy(head: bytes, header: str) -> bytes:
    """Make a request as a proxy on this machine forwards it."""
    return head.replace(b"\r\n\r\n", f"\r\n{header}\r\n\r\n".encode(), 1)


def crowd(target: Target, header: str) -> None:
    """Open more WebSockets from one address than it may have."""
    peers = []
    for _ in range(4 * ADDRESS_CONNECTIONS):
        peer = Peer(target)
        number = random.getrandbits(32)
        forged = ".".join(str(number >> bits & 255) for bits in (24, 16, 8, 0))
        peer.send(behind_proxy(UPGRADE % base64.b64encode(os.urandom(16)), header.format(forged=forged, client=CLIENT)))
        if b" 101 " in peer.wait_for(b"\r\n\r\n"):
            peers.append(peer)
        else:
            peer.close()
        if len(peers) > ADDRESS_CONNECTIONS:
            target.tally.fault(f"one address has {len(peers)} connections")
            time.sleep(PATIENCE)
    for peer in peers:
        peer.close()


@attack(
    "http",
    "forged addresses before a proxy",
    "a client names another address in X-Forwarded-For each time, to have more WebSockets than an address may have",
    like="connections",
)
def forged_addresses(target: Target) -> None:
    crowd(target, "X-Forwarded-For: {forged}, {client}")


@attack(
    "http",
    "a quote left open before a proxy",
    "the same in Forwarded, where what the proxy adds would be within the quotes",
    like="connections",
)
def open_quote(target: Target) -> None:
    crowd(target, 'Forwarded: for="{forged}, for={client}')


@attack(
    "http",
    "an address beside the proxy's",
    "the same with both headers, of which the proxy adds to one alone",
    like="connections",
)
def other_header(target: Target) -> None:
    crowd(target, "Forwarded: for={forged}\r\nX-Forwarded-For: {client}")


def publish(peer: Peer, token: str, header: str) -> None:
    """Publish in a request, and read the response."""
    head = POST + b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (token.encode(), len(BODY))
    peer.send(behind_proxy(head, header) + BODY)
    peer.wait_for(b'"}]\n')


@attack(
    "http",
    "another client_id for each request",
    "tokens of any number of clients, each of which has limits of its own to be kept in mind",
    token=True,
    like="requests",
)
def rotating_client_ids(target: Target) -> None:
    peer = Peer(target)
    for _ in itertools.count():
        token = sign(SECRET, client_id=f"mallory {random.getrandbits(64)}", grants=Grants.ALL)
        publish(peer, token, f"X-Forwarded-For: {CLIENT}")


@attack(
    "http",
    "another /64 of IPv6 for each request",
    "one token without a client_id, from all networks of a /32, each of which is a client of its own",
    token=True,
    like="requests",
)
def rotating_networks(target: Target) -> None:
    peer = Peer(target)
    token = jwt_of(SECRET, {"catbus": {"read": ["*"], "write": ["*"]}})
    for _ in itertools.count():
        network = f"{random.getrandbits(16):x}:{random.getrandbits(16):x}"
        publish(peer, token, f"X-Forwarded-For: 2001:db8:{network}::1")


@attack(
    "session",
    "200 sessions of one client",
    "with one client_id, as fast as they are taken",
    token=True,
    log="postgres",
    processes=4,
    kept=RING,
    like="bytes",
)
def many_sessions(target: Target) -> None:
    peers = [WebSocketPeer(target, target.token()) for _ in range(50)]
    pump(peers, frame(request("publish", channel="noise.many", payload=1, ack=False) * 100))
