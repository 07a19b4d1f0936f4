"""Tokens that are signed: how they are made and verified. Also the producer ids that the broker signs."""

from __future__ import annotations

import hmac
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any

import msgspec
from jwt import PyJWTError

from ..close_codes import CloseCode
from ..error_codes import ErrorCode
from ..errors import ConfigError
from ..protocol.wire_messages import clip
from .base64url import decode_base64url, encode_base64url
from .claims import GrantClaim, GrantListClaim, JwtClaims, SubTokenClaims, decode_claims
from .grants import Grants, Identity
from .jwt_keys import ALGORITHMS, USABLE_KEYS, JwtKey, from_jwks, from_pem, jws
from .role_tokens import role_key
from .token_errors import MAX_RETRY_AFTER, RejectionReason, TokenRejected, UnknownKey, format_time

MAX_TOKEN = 8192
"""Bytes that a token may have."""

CACHE_SIZE = 64 * MAX_TOKEN
"""Bytes of valid tokens whose claims are cached."""


def sign(
    secret: str,
    *,
    client_id: str | None,
    grants: Grants,
    expires: float | None = None,
    not_before: float | None = None,
    issued_at: float | None = None,
    publish_rate: int | None = None,
    publish_bytes: int | None = None,
) -> str:
    """Make a `sub-` token. Times are in seconds since 1970; rounding never makes the token valid for longer.

    `issued_at` has microseconds, as revocations have: a token that is issued after one in the same second is valid.

    `publish_rate` (messages per second) and `publish_bytes` (bytes per second) replace the broker's limits.

    Raises `PeerError` (invalid_pattern) for a grant that is not a pattern, and `ConfigError` for an empty secret or
    more grants than a token can hold.
    """
    if not secret:
        raise ConfigError("the secret is empty")
    given = [GrantClaim("read", pattern) for pattern in grants.read]
    given += [GrantClaim("write", pattern) for pattern in grants.write]
    claims = SubTokenClaims(
        client_id=client_id,
        grants=GrantListClaim(given),
        exp=None if expires is None else math.floor(expires),
        nbf=None if not_before is None else math.ceil(not_before),
        iat=None if issued_at is None else math.floor(issued_at * 1e6) / 1e6,
        publish_rate=publish_rate,
        publish_bytes=publish_bytes,
    )
    text = encode_base64url(msgspec.json.encode(claims))
    token = b"sub-%b.%b" % (text, _token_mac(secret.encode(), text))
    if len(token) > MAX_TOKEN:
        raise ConfigError(f"the token would have more than {MAX_TOKEN} bytes: give it fewer grants")
    return token.decode()


def token_kind(token: str) -> str:
    """Return the kind of a token, valid or not: "sub", "role", "jwt" or "other"."""
    for kind in ("sub", "role"):
        if token.startswith(f"{kind}-"):
            return kind
    return "jwt" if token.count(".") == 2 else "other"


class Authenticator:
    """Verifies tokens with any of the secrets, the admin key or the public keys, and signs producer ids.

    Each of `jwt_keys` is the text of a PEM file or of a JWKS. With `issuers`, only their JWTs are accepted, and with
    `audiences`, only JWTs for one of these (RFC 7519, sections 4.1.1 and 4.1.3). `leeway` is the difference, in
    seconds, that is allowed between the issuer's clock and the broker's. Producer ids are signed with the first secret
    and verified with any of them. Without secrets they are valid for this object only. Raises `ConfigError` for a
    secret or key that cannot be used.
    """

    def __init__(
        self,
        secrets: Sequence[str],
        *,
        admin_key: str | None = None,
        jwt_keys: Sequence[str] = (),
        issuers: Sequence[str] = (),
        audiences: Sequence[str] = (),
        leeway: float = 0.0,
    ) -> None:
        if isinstance(secrets, str) or not all(secrets):
            raise ConfigError("expected a list of secrets, none of them empty")
        if admin_key and role_key(admin_key) is not None:
            raise ConfigError("the admin key has the form of a role token: choose another one")
        self._secrets = [secret.encode() for secret in secrets]
        self._admin_key = admin_key.encode() if admin_key else None
        self._jwt_keys = [JwtKey("HS256", secret) for secret in self._secrets]
        for number, text in enumerate(jwt_keys, 1):
            keys = list(from_jwks(text) if text.lstrip().startswith("{") else from_pem(text))
            if not keys:
                raise ConfigError(f"JWT key {number}: expected a public key, {USABLE_KEYS}, as PEM or JWKS")
            self._jwt_keys += keys
        self._fetched_keys: Sequence[JwtKey] = ()
        self._issuers = tuple(issuers)
        self._audiences = tuple(audiences)
        self._leeway = leeway
        self._cache: dict[bytes, tuple[int, SubTokenClaims | JwtClaims, Grants]] = {}
        """Size, claims and grants of valid tokens by digest, the most recently used last."""
        self._cache_size = 0
        # The text has a space, so no token has the same HMAC.
        self._producer_keys = [_hmac(secret, b"catbus producer") for secret in self._secrets] or [os.urandom(32)]

    def replace_fetched_keys(self, keys: Sequence[JwtKey]) -> None:
        """Verify JWTs with these keys, besides those of the constructor, instead of the keys of the last call."""
        if list(keys) != list(self._fetched_keys):
            self._fetched_keys = list(keys)
            # What a key that was removed has signed is not valid any more.
            self._cache.clear()
            self._cache_size = 0

    def is_admin_key(self, token: str) -> bool:
        """Whether a token is the admin key. The time taken does not depend on the contents."""
        given = token.encode(errors="surrogatepass")
        return self._admin_key is not None and hmac.compare_digest(given, self._admin_key)

    def verify(self, token: str, now: float) -> Identity:
        """Verify a token at the time `now`, in seconds since 1970. Role tokens are looked up elsewhere.

        Raises `TokenRejected`, which closes the connection: token_expired or token_not_valid_yet for a token with a
        valid signature, unauthenticated for any other. Its `message` contains nothing of the token. `UnknownKey` is one
        that a fetch of key sets may help.
        """
        given = token.encode(errors="surrogatepass")
        if self.is_admin_key(token):
            return Identity(None, Grants.ADMIN, None, admin=True)
        if len(given) > MAX_TOKEN:
            text = f"the token has more than {MAX_TOKEN} bytes"
            raise TokenRejected(RejectionReason.MALFORMED, text, message=text)
        if role_key(token) is not None:
            text = "role tokens need a database, and this broker has none"
            raise TokenRejected(RejectionReason.ROLE, text, message=text)
        claims, grants = self._decode(given)
        subject = claims.client_id
        issued = claims.iat or 0.0
        begins = max(claims.nbf or 0.0, issued)
        if now < begins - self._leeway:
            raise TokenRejected(
                RejectionReason.NOT_VALID_YET,
                f"not valid until {format_time(begins)}, in {begins - now:.0f} s",
                message="the token is not valid yet",
                code=ErrorCode.TOKEN_NOT_VALID_YET,
                close=CloseCode.TOKEN_NOT_VALID_YET,
                subject=subject,
                retry_after=min(MAX_RETRY_AFTER, begins - self._leeway - now),
            )
        if claims.exp is not None and now >= claims.exp + self._leeway:
            raise TokenRejected(
                RejectionReason.EXPIRED,
                f"expired since {format_time(claims.exp)}, {now - claims.exp:.0f} s ago",
                message="the token has expired",
                code=ErrorCode.TOKEN_EXPIRED,
                close=CloseCode.TOKEN_EXPIRED,
                subject=subject,
            )
        messages, size = claims.rates()
        return Identity(subject, grants, claims.exp, publish_rate=messages, publish_bytes=size, issued=min(issued, now))

    def make_producer_id(self, subject: str | None, now: float) -> str:
        """Make a new producer id, signed for this client_id.

        It begins with the time `now`, in seconds since 1970, as a UUIDv7 does (RFC 9562, section 5.7). The log's index
        of keys then grows at its end, which makes appends of many producers faster by half.
        """
        producer = int(now * 1000).to_bytes(8, "big")[2:] + os.urandom(10)
        return encode_base64url(producer + _producer_mac(self._producer_keys[0], producer, subject)).decode()

    def verify_producer_id(self, text: str, subject: str | None) -> bytes | None:
        """The 16 bytes of a producer id from `make_producer_id` for the same client_id; None for any other text."""
        data = decode_base64url(text.encode(errors="surrogatepass"))
        if data is None:
            return None
        producer, mac = data[:16], data[16:]
        macs = [_producer_mac(key, producer, subject) for key in self._producer_keys]
        return producer if _is_one_of(mac, macs) else None

    def _decode(self, given: bytes) -> tuple[SubTokenClaims | JwtClaims, Grants]:
        """Verify the signature of a token and decode its claims, without a look at the time.

        Decoding a long token takes milliseconds, and a client may send it in a loop. So the claims of recent valid
        tokens are cached by digest. Only the same bytes have the same digest, so no check is left out.
        """
        digest = sha256(given).digest()
        known = self._cache.pop(digest, None)
        if known is None:
            claims: SubTokenClaims | JwtClaims
            if given.startswith(b"sub-"):
                claims = decode_claims(self._verify_sub_token(given[4:]), SubTokenClaims, "client_id")
            else:
                claims = decode_claims(self._verify_jwt(given), JwtClaims, "sub")
                self._check_parties(claims)
            known = len(given), claims, claims.allowed()
            self._cache_size += len(given)
            while self._cache_size > CACHE_SIZE and self._cache:
                size, _, _ = self._cache.pop(next(iter(self._cache)))
                self._cache_size -= size
        self._cache[digest] = known
        return known[1:]

    def _check_parties(self, claims: JwtClaims) -> None:
        audiences = claims.aud if isinstance(claims.aud, list) else [claims.aud]
        if self._issuers and claims.iss not in self._issuers:
            text = f"its issuer, {clip(repr(claims.iss))}, is not in auth.issuer"
        elif self._audiences and not any(audience in self._audiences for audience in audiences):
            text = f"its audience, {clip(repr(claims.aud))}, is not in auth.audience"
        else:
            return
        raise TokenRejected(RejectionReason.CLAIMS, text, subject=claims.client_id)

    def _verify_sub_token(self, given: bytes) -> bytes:
        """Verify a `sub-` token, given without its prefix, with the secrets, and return its JSON."""
        text, _, mac = given.partition(b".")
        macs = [_token_mac(secret, text) for secret in self._secrets]
        if not _is_one_of(mac, macs):
            raise TokenRejected(RejectionReason.SIGNATURE, f"signed with none of the configured secrets ({len(macs)})")
        data = decode_base64url(text)
        if data is None:
            raise TokenRejected(RejectionReason.MALFORMED, "signed, but not base64url")
        return data

    def _verify_jwt(self, given: bytes) -> bytes:
        """Verify a JWT with the keys, each with its own algorithm only, and return its JSON."""
        header: dict[str, Any] = {}
        with suppress(PyJWTError):
            header = jws.get_unverified_header(given)
        if not header:
            raise TokenRejected(RejectionReason.MALFORMED, "not a token")
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in ALGORITHMS:
            raise TokenRejected(RejectionReason.ALGORITHM, f"the algorithm {clip(repr(algorithm))} is not supported")
        keys = [key for key in (*self._jwt_keys, *self._fetched_keys) if key.algorithm == algorithm]
        chosen = [key for key in keys if kid is None or key.kid in (None, kid)]
        for key in chosen:
            try:
                claims: bytes = jws.decode(given, key.key, algorithms=[key.algorithm])
            except PyJWTError:
                continue
            return claims
        named = "" if kid is None else f" with the kid {clip(repr(kid))}"
        if not chosen:
            # Secrets are configured, and never fetched.
            kind = TokenRejected if algorithm == "HS256" else UnknownKey
            raise kind(RejectionReason.KEY, f"none of {len(keys)} configured keys for {algorithm} matches{named}")
        raise TokenRejected(
            RejectionReason.SIGNATURE, f"signed with none of {len(chosen)} configured keys for {algorithm}{named}"
        )


def _hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def _token_mac(secret: bytes, text: bytes) -> bytes:
    return encode_base64url(_hmac(secret, text)[:16])


def _producer_mac(key: bytes, producer: bytes, subject: str | None) -> bytes:
    suffix = b"" if subject is None else b"=" + subject.encode(errors="surrogatepass")
    return _hmac(key, producer + suffix)[:16]


def _is_one_of(given: bytes, expected: Sequence[bytes]) -> bool:
    """Whether `given` is one of `expected`. The time taken does not depend on the contents."""
    return sum(hmac.compare_digest(given, one) for one in expected) > 0
