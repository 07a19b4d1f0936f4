"""Attacks with forged tokens, and with valid tokens in other encodings."""

from __future__ import annotations

import hmac
import itertools
import json
import os
import time
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign

from .attacks import SECRET, Target, attack
from .peers import PATIENCE, POST, Peer, base64url, jwt_of

BASE64URL = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def request_with(target: Target, peer: Peer, token: bytes) -> bytes:
    """Publish with a token. Returns the first line of the response."""
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
    """Send one invalid token after the other, forever."""
    peer = Peer(target)
    for token in itertools.cycle(tokens):
        if b" 401 " not in (answer := request_with(target, peer, token)):
            target.tally.fault(f"a forged token was answered {answer.decode('latin-1')}")
            time.sleep(PATIENCE)


def jwt(header: dict[str, object], key: bytes | None = None, *, signature: bytes = b"") -> bytes:
    """Make a token with all grants; with `key` it is signed with HS256."""
    claims = {"sub": "mallory", "catbus": {"read": ["*"], "write": ["*"]}}
    text = base64url(json.dumps(header).encode()) + b"." + base64url(json.dumps(claims).encode())
    if key is not None:
        signature = hmac.digest(key, text, "sha256")
    return text + b"." + base64url(signature)


def public_key(bits: int = 2048) -> str:
    """Return the PEM of an RSA key whose private key is unknown; always the same."""
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
    like="requests",
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
    "forged tokens of 8 KB",
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
    "unknown role tokens",
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
    like="requests",
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
    """Return the distance of the means in standard errors, without the slowest tenth, which is noise."""

    def figures(values: list[float]) -> tuple[float, float]:
        kept = sorted(values)[: len(values) * 9 // 10]
        mean = sum(kept) / len(kept)
        return mean, sum((value - mean) ** 2 for value in kept) / (len(kept) - 1) / len(kept)

    (mean, error), (other_mean, other_error) = figures(one), figures(other)
    return float((mean - other_mean) / (error + other_error) ** 0.5)


@attack(
    "http",
    "a share for each spelling of a token",
    "a JWT without a subject, in all 8 spellings of its signature, publishes 1,000 messages in each request",
    token=True,
    log="postgres",
    processes=2,
    kept=160,
    stands=False,
    like="requests",
)
def spellings(target: Target) -> None:
    body = json.dumps([{"channel": "noise.http", "payload": "x" * 50}] * 1000).encode()
    token = jwt_of(SECRET, {"catbus": {"read": ["*"], "write": ["*"]}}).encode()
    # Two bits of the last character have no meaning, and neither has padding.
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
