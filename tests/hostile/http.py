"""Attacks on HTTP, by strangers and with a token."""

from __future__ import annotations

import base64
import hmac
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from catbus.auth import Grants, sign

from .attacks import SECRET, Ended, Target, attack
from .peers import PATIENCE, UPGRADE, Peer, pump

POST = b"POST /publish HTTP/1.1\r\nHost: bus.example\r\n"
GET = b"GET %b HTTP/1.1\r\nHost: bus.example\r\n\r\n"
BODY = 1 << 20
BASE64URL = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def hold(target: Target, count: int, begin: Callable[[Peer], None], idle: Callable[[Peer], None]) -> None:
    """Open so many connections, begin something on each of them, and then do `idle` on each, once in a second."""
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
    """Say nothing."""


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
)
def unfinished_bodies(target: Target) -> None:
    head = POST + b"Content-Length: %d\r\n\r\n" % BODY
    hold(target, 1000, lambda peer: peer.send(head + bytes(BODY - 1)), nothing)


@attack("http", "a body byte by byte", "500 connections send a byte of a body each second")
def slow_bodies(target: Target) -> None:
    hold(
        target,
        500,
        lambda peer: peer.send(POST + b"Content-Length: 1000\r\n\r\n"),
        lambda peer: peer.send(b"x"),
    )


@attack("http", "a megabyte of messages that are none", "an array of half a million numbers to /publish", token=True)
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


# Heads and answers


@attack("http", "silence after connecting", "2,000 connections say nothing at all")
def silence(target: Target) -> None:
    hold(target, 2000, nothing, nothing)


@attack("http", "a head byte by byte", "500 connections send a byte of a request each second")
def slow_heads(target: Target) -> None:
    hold(target, 500, lambda peer: peer.send(b"GET / HTTP/1.1\r\nX: "), lambda peer: peer.send(b"x"))


@attack("http", "a WebSocket handshake byte by byte", "500 connections send a byte of an Upgrade each second")
def slow_upgrades(target: Target) -> None:
    hold(target, 500, lambda peer: peer.send(UPGRADE[:100]), lambda peer: peer.send(b"x"))


@attack("http", "heads of 16 KB that do not end", "connection after connection")
def long_heads(target: Target) -> None:
    head = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2600
    while True:
        peer = Peer(target)
        peer.send(head)
        peer.receive(0)


@attack("http", "a head in one piece a line", "2,600 lines of a head, each a packet of its own", like="requests")
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
    "http", "requests without reading answers", "/catbus.js is asked for without end, and nothing read", processes=4
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


@attack("http", "scrapes of /metrics", "again and again, over 4 connections", processes=4)
def scrapes(target: Target) -> None:
    peer = Peer(target)
    while True:
        peer.send(GET % b"/metrics")
        peer.wait_for(b"catbus_")
        peer.drain()


@attack("http", "bytes after the last answer", "a connection that is being closed goes on sending", processes=4)
def after_the_end(target: Target) -> None:
    peer = Peer(target)
    peer.send(b"nonsense\r\n\r\n")
    while True:
        peer.send(bytes(1 << 16))


# Connections


@attack(
    "http",
    "connections up to the limit",
    "one address holds 10,000 connections, and comes back for those that are closed",
    processes=4,
)
def all_connections(target: Target) -> None:
    hold(target, 2600, lambda peer: peer.send(b"GET /"), nothing)


@attack(
    "http",
    "connections from 10,000 addresses",
    "one from each, up to the limit; each one more has somebody give way, who is to be looked for",
    processes=4,
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
    "a share for each spelling of a token",
    "a JWT without a subject, in all 8 spellings of its signature, publishes 1,000 messages in each request",
    token=True,
    log="postgres",
    processes=2,
    kept=160,
    stands=False,
)
def spellings(target: Target) -> None:
    body = json.dumps([{"channel": "noise.http", "payload": "x" * 50}] * 1000).encode()
    token = jwt_of(SECRET, {"catbus": {"read": ["*"], "write": ["*"]}}).encode()
    # Two bits of the last character mean nothing, and neither does a sign that fills up.
    last = BASE64URL.index(token[-1])
    tokens = [token[:-1] + BASE64URL[last ^ bits : (last ^ bits) + 1] + end for bits in range(4) for end in (b"", b"=")]
    peers = [Peer(target) for _ in range(75)]
    heads = [
        POST + b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (each, len(body))
        for each, _ in zip(itertools.cycle(tokens), peers, strict=False)
    ]
    while True:
        for peer, head in zip(peers, heads, strict=True):
            peer.send(head + body)
        for peer in peers:
            if b" 200 " not in peer.wait_for(b"\r\n\r\n"):
                time.sleep(1)  # It is known for what it is.
            peer.drain()


@attack(
    "http",
    "keep-alive up to the limit of files",
    "one address asks for /health on 1,000 connections and keeps them, where the process may have 1,024 files",
    open_files=1024,
)
def keep_alive(target: Target) -> None:
    hold(target, 1000, lambda peer: peer.send(GET % b"/health"), nothing)


@attack("http", "connecting and leaving", "as fast as possible, over 2 processes", processes=2, like="connections")
def come_and_go(target: Target) -> None:
    while True:
        Peer(target).close()


# Tokens


def request_with(target: Target, peer: Peer, token: bytes) -> bytes:
    """Publish with it; the first line of the answer."""
    body = b'{"channel":"honest.forged","payload":1}'
    head = POST + b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (token, len(body))
    peer.send(head + body)
    answer = peer.wait_for(b"\r\n\r\n")
    while not answer.endswith(b"\n"):
        answer += peer.receive()
    time.sleep(0)
    peer.drain()
    return answer.partition(b"\r\n")[0]


def forge(target: Target, tokens: Sequence[bytes]) -> None:
    """Show one after the other, without end. None of them is any good."""
    peer = Peer(target)
    for token in itertools.cycle(tokens):
        if b" 401 " not in (answer := request_with(target, peer, token)):
            target.tally.fault(f"a forged token was answered {answer.decode('latin-1')}")
            time.sleep(PATIENCE)


def base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def jwt(header: dict[str, object], key: bytes | None = None, *, signature: bytes = b"") -> bytes:
    """A token for everything; with `key` it is signed as HS256 has it."""
    claims = {"sub": "mallory", "catbus": {"read": ["*"], "write": ["*"]}}
    text = base64url(json.dumps(header).encode()) + b"." + base64url(json.dumps(claims).encode())
    if key is not None:
        signature = hmac.digest(key, text, "sha256")
    return text + b"." + base64url(signature)


def jwt_of(secret: str, claims: dict[str, object]) -> str:
    """A token that is good: HS256, as the broker's own secret signs it."""
    text = base64url(b'{"alg":"HS256"}') + b"." + base64url(json.dumps(claims, separators=(",", ":")).encode())
    return (text + b"." + base64url(hmac.digest(secret.encode(), text, "sha256"))).decode()


def public_key(bits: int = 2048) -> str:
    """The PEM of an RSA key of which nobody knows the private one; the same one each time."""
    modulus = int.from_bytes((b"\xc3" + b"catbus" * bits)[: bits // 8], "big") | 1
    numbers = rsa.RSAPublicNumbers(65_537, modulus)
    return numbers.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


KEYS = '[auth]\njwt = ["keys.pem"]\n'


@attack(
    "http",
    "confused keys",
    "JWTs: `alg: none` in all spellings, HS256 with the public key as the secret, keys and addresses in the header",
    settings=KEYS,
    files={"keys.pem": public_key},
)
def confused_keys(target: Target) -> None:
    pem = public_key().encode()
    own = {"kty": "oct", "k": base64url(b"mine").decode()}
    forge(
        target,
        [
            *[jwt({"alg": name, "typ": "JWT"}) for name in ("none", "None", "NONE", "nOnE", "", "HS512", "RS512")],
            jwt({"alg": None}),
            jwt({"typ": "JWT"}),
            *[jwt({"alg": "HS256"}, key) for key in (pem, pem.strip(), b"", b"mine")],
            jwt({"alg": "HS256", "jwk": own}, b"mine"),
            jwt({"alg": "HS256", "kid": "../../../../../dev/null"}, b""),
            jwt({"alg": "HS256", "kid": "' UNION SELECT 'mine"}, b"mine"),
            jwt({"alg": "RS256", "jku": "http://127.0.0.1:1/keys.json"}, signature=bytes(256)),
            jwt({"alg": "RS256", "x5u": "file:///etc/passwd", "x5c": ["x"]}, signature=bytes(256)),
            jwt({"alg": "RS256", "crit": ["exp"], "b64": False}, signature=bytes(256)),
            jwt({"alg": "RS256"}, signature=b"\0" * 255 + b"\1"),
            jwt({"alg": "ES256"}, signature=bytes(64)),
        ],
    )


@attack(
    "http",
    "signatures for an RSA key of 16k",
    "JWTs whose signatures take the most time to be found false, where the operator's key has 16,384 bits",
    settings=KEYS,
    files={"keys.pem": lambda: public_key(16_384)},
    like="requests",
    processes=2,
)
def large_keys(target: Target) -> None:
    forge(target, [jwt({"alg": "RS256"}, signature=b"\x7f" + os.urandom(2047)) for _ in range(8)])


@attack(
    "http",
    "signatures without number",
    "a /status with another forged token each time, over 4 connections",
    processes=4,
    like="requests",
)
def forged_tokens(target: Target) -> None:
    forge(target, [f"sub-{base64url(os.urandom(6000)).decode()}.x".encode() for _ in range(16)])


@attack(
    "http",
    "nested tokens",
    "tokens of 8 KB of brackets",
    processes=2,
    like="requests",
)
def nested_tokens(target: Target) -> None:
    deep = base64url(b'{"grants":' + b"[" * 5900)
    mine = base64url(b"[" * 5000)
    forge(target, [b"sub-" + deep + b"." + bytes(22).replace(b"\0", b"A"), mine + b"." + mine[:100] + b".x"])


@attack(
    "http",
    "role tokens that nobody has",
    "each is looked for in the database, through the one connection that all who come with a role wait for",
    log="postgres",
    processes=4,
    like="requests",
)
def unknown_roles(target: Target) -> None:
    peers = [Peer(target) for _ in range(50)]
    while True:
        for peer in peers:
            token = b"role-" + base64url(os.urandom(16))
            peer.send(b"GET /status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token + b"\r\n\r\n")
        for peer in peers:
            peer.wait_for(b"}\n")


@attack(
    "http",
    "timing of tokens",
    "whether the time of an answer tells how much of a signature is right: many of each, compared by Welch's t",
)
def timing(target: Target) -> None:
    good = sign(SECRET, client_id="alice", grants=Grants.ALL).encode()
    text, _, mac = good.rpartition(b".")
    early = text + b"." + bytes([mac[0] ^ 3]) + mac[1:]
    late = text + b"." + mac[:-1] + bytes([mac[-1] ^ 3])
    peer = Peer(target)
    times: dict[bytes, list[float]] = {early: [], late: []}
    for _ in range(int(100 * target.seconds)):
        for token, found in times.items():
            began = time.perf_counter()
            if b" 401 " not in request_with(target, peer, token):
                target.tally.fault("a forged token was taken")
            found.append(time.perf_counter() - began)
    if abs(t := welch(times[early], times[late])) > 5:
        target.tally.fault(f"the time of an answer tells how much of a token is right (t = {t:.1f})")


def welch(one: list[float], other: list[float]) -> float:
    """How far the means are apart, in their errors. The slowest tenth is the machine's, and left out."""

    def figures(values: list[float]) -> tuple[float, float]:
        kept = sorted(values)[: len(values) * 9 // 10]
        mean = sum(kept) / len(kept)
        return mean, sum((value - mean) ** 2 for value in kept) / (len(kept) - 1) / len(kept)

    (mean, error), (other_mean, other_error) = figures(one), figures(other)
    return float((mean - other_mean) / (error + other_error) ** 0.5)
