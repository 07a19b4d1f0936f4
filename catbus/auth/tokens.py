"""Tokens: who the bearer is, until when, and what is allowed; and the names under which publishers go on."""

from __future__ import annotations

import binascii
import hmac
import math
import os
import re
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import msgspec
from jwt import PyJWTError

from ..errors import CloseCode, ConfigError, ErrorCode, PeerError
from ..protocol.channels import check_pattern, selectors
from ..protocol.wire_messages import MAX_DEPTH, UNDECODABLE, clip, depth
from .jwt_keys import ALGORITHMS, USABLE_KEYS, JwtKey, from_jwks, from_pem, jws
from .token_errors import LONGEST_WAIT, Reason, TokenRefused, moment

MAX_TOKEN = 8192
"""How many bytes a token may have."""

KNOWN_SIZE = 64 * MAX_TOKEN
"""Bytes of good tokens of which it is remembered what they say."""

ROLE_HANDLE = 12
"""How many hexadecimal digits of a role's key are its handle."""


@dataclass(frozen=True, slots=True)
class Grants:
    """The patterns that may be read, and those that may be written to."""

    ALL: ClassVar[Grants]
    """Everything, as the admin key allows it."""

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    _readable: frozenset[str] = field(init=False, repr=False, compare=False)
    _writable: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_readable", frozenset(self.read))
        object.__setattr__(self, "_writable", frozenset(self.write))

    def __str__(self) -> str:
        """For people: `read and write a.*`, or `read a, b.* and write c`."""
        if self.read == self.write and self.read:
            return f"read and write {', '.join(self.read)}"
        parts = [("read", self.read), ("write", self.write)]
        return " and ".join(f"{verb} {', '.join(patterns)}" for verb, patterns in parts if patterns) or "nothing"

    def may_read(self, pattern: str) -> bool:
        """Whether one grant covers the whole of a valid pattern."""
        return not self._readable.isdisjoint(selectors(pattern))

    def may_write(self, channel: str) -> bool:
        """Whether a valid channel may be published to."""
        return not self._writable.isdisjoint(selectors(channel))


Grants.ALL = Grants(("*",), ("*",))


@dataclass(frozen=True, slots=True)
class Identity:
    """What a token says. `expires` is in seconds since 1970; None: never. `role`: the key of the role it stands for.

    `publish_rate`, in messages, and `publish_bytes` are what its bearer may publish in a second; None: what all may.
    """

    client_id: str | None
    grants: Grants
    expires: float | None
    admin: bool = False
    role: bytes | None = None
    publish_rate: int | None = None
    publish_bytes: int | None = None


def client_of(identity: Identity, token: str, network: str) -> Hashable:
    """Whose share of the log and whose limits the bearer of a token takes: that of its client_id, where it has one.

    Otherwise that of all that come with this token from this network: a page may give all of its visitors one token,
    and a single machine is still one client, however many sessions it opens. The signature, behind the last dot, is
    left out: the same one can be written in several ways.
    """
    if identity.client_id:
        return identity.client_id
    signed = (token.rpartition(".")[0] or token).encode(errors="surrogatepass")
    return blake2b(signed, digest_size=16, person=b"catbus client").digest(), network


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
    """Make a `sub-` token. Times are in seconds since 1970, and never widened by being made whole.

    `publish_rate`, in messages, and `publish_bytes` take the place of the broker's own limits for a second.

    Raises `PeerError` (invalid_pattern) for a grant that is no pattern, and `ConfigError` for an empty secret and for
    more grants than a token can hold.
    """
    if not secret:
        raise ConfigError("the secret is empty")
    given = [_Grant("read", pattern) for pattern in grants.read]
    given += [_Grant("write", pattern) for pattern in grants.write]
    claims = _SubClaims(
        client_id=client_id,
        grants=_GrantList(given),
        exp=None if expires is None else math.floor(expires),
        nbf=None if not_before is None else math.ceil(not_before),
        iat=None if issued_at is None else math.floor(issued_at),
        publish_rate=publish_rate,
        publish_bytes=publish_bytes,
    )
    text = _base64(msgspec.json.encode(claims))
    token = b"sub-%b.%b" % (text, _token_mac(secret.encode(), text))
    if len(token) > MAX_TOKEN:
        raise ConfigError(f"the token would have more than {MAX_TOKEN} bytes: give it fewer grants")
    return token.decode()


# Roles


class RoleSource(Protocol):
    """Where the roles are kept that `role-` tokens stand for."""

    async def find(self, keys: Collection[bytes]) -> Mapping[bytes, Identity]:
        """Whom the tokens with these keys belong to, as of now; a key that no role has is left out.

        Raises `Unavailable`, within seconds, where that cannot be found out.
        """

    @property
    def changes(self) -> int:
        """Rises whenever a role may have changed."""

    @property
    def checked(self) -> float:
        """The Trio time up to which all changes are known."""

    async def wait_changes(self) -> Collection[bytes] | None:
        """Wait until roles may have changed since this was called last: those with these keys, or, with None, any."""


def make_role_token() -> str:
    """A `role-` token that nobody has had. It says nothing by itself: its key is kept with what it allows."""
    return (_ROLE + _base64(os.urandom(_ROLE_SIZE))).decode()


def role_key(token: str) -> bytes | None:
    """The key under which the role of a `role-` token is kept, of which the token cannot be found out; None for
    anything that has not exactly the form of one."""
    given = token.encode(errors="surrogatepass")
    if not given.startswith(_ROLE):
        return None
    data = _from_base64(given.removeprefix(_ROLE))
    return sha256(given).digest() if data is not None and len(data) == _ROLE_SIZE else None


def role_handle(key: bytes) -> str:
    """What people call a role."""
    return key.hex()[:ROLE_HANDLE]


def role_digits(name: str) -> str | None:
    """How the key of the role begins that is meant by its token or by its handle, in hexadecimal; None for what is
    neither. A handle may have more digits than it needs."""
    key = role_key(name)
    if key is not None:
        return key.hex()
    return name.lower() if re.fullmatch(rf"[0-9a-fA-F]{{{ROLE_HANDLE},64}}", name) else None


_ROLE = b"role-"
_ROLE_SIZE = 16


class Authenticator:
    """Verifies tokens with any of the secrets, the admin key or the public keys.

    Each of `jwt_keys` is the text of a PEM file or of a JWKS. `leeway` is by how many seconds the clock of whoever
    makes tokens may differ from the broker's. Producers are named with the first secret and known by all; without
    secrets they are known to this object only. Raises `ConfigError` for a secret or key of no use.
    """

    def __init__(
        self,
        secrets: Sequence[str],
        *,
        admin_key: str | None = None,
        jwt_keys: Sequence[str] = (),
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
        self._leeway = leeway
        self._known: dict[bytes, tuple[int, _SubClaims | _JwtClaims, Grants]] = {}
        """What good tokens say, by their digests, the one that was shown last at the end; and how long they are."""
        self._known_size = 0
        # No token is an HMAC over a text with a space in it.
        self._producer_keys = [_hmac(secret, b"catbus producer") for secret in self._secrets] or [os.urandom(32)]

    def verify(self, token: str, now: float) -> Identity:
        """What the token says at `now`, in seconds since 1970. A role token says nothing: it has to be looked up.

        Raises `TokenRefused`, which closes: token_expired for a good token whose time is over, token_not_valid_yet for
        one whose time has not come, unauthenticated for anything else. Its `message` holds nothing of the token.
        """
        given = token.encode(errors="surrogatepass")
        if self._admin_key is not None and hmac.compare_digest(given, self._admin_key):
            return Identity(None, Grants.ALL, None, admin=True)
        if len(given) > MAX_TOKEN:
            text = f"the token has more than {MAX_TOKEN} bytes"
            raise TokenRefused(Reason.MALFORMED, text, message=text)
        if role_key(token) is not None:
            text = "role tokens are kept in a database, and this broker has none"
            raise TokenRefused(Reason.ROLE, text, message=text)
        claims, grants = self._read(given)
        subject = claims.client_id
        if claims.nbf is not None and now < claims.nbf - self._leeway:
            raise TokenRefused(
                Reason.NOT_VALID_YET,
                f"not valid until {moment(claims.nbf)}, in {claims.nbf - now:.0f} s",
                message="the token is not valid yet",
                code=ErrorCode.TOKEN_NOT_VALID_YET,
                close=CloseCode.TOKEN_NOT_VALID_YET,
                subject=subject,
                retry_after=min(LONGEST_WAIT, claims.nbf - self._leeway - now),
            )
        if claims.exp is not None and now >= claims.exp + self._leeway:
            raise TokenRefused(
                Reason.EXPIRED,
                f"expired since {moment(claims.exp)}, {now - claims.exp:.0f} s ago",
                message="the token has expired",
                code=ErrorCode.TOKEN_EXPIRED,
                close=CloseCode.TOKEN_EXPIRED,
                subject=subject,
            )
        messages, size = claims.rates()
        return Identity(subject, grants, claims.exp, publish_rate=messages, publish_bytes=size)

    def new_producer(self, subject: str | None, now: float) -> str:
        """A name that no publisher has had, for the bearers of tokens with this client_id.

        It begins with the time `now`, in seconds since 1970, as a UUIDv7 does (RFC 9562, section 5.7): the log's index
        of keys is then written to at its end, which makes appends of many producers faster by half.
        """
        name = int(now * 1000).to_bytes(8, "big")[2:] + os.urandom(10)
        return _base64(name + _producer_mac(self._producer_keys[0], name, subject)).decode()

    def check_producer(self, text: str, subject: str | None) -> bytes | None:
        """The 16 bytes of a name from `new_producer` for the same subject; None for anything else."""
        data = _from_base64(text.encode(errors="surrogatepass"))
        if data is None:
            return None
        name, mac = data[:16], data[16:]
        macs = [_producer_mac(key, name, subject) for key in self._producer_keys]
        return name if _is_any_of(mac, macs) else None

    def _read(self, given: bytes) -> tuple[_SubClaims | _JwtClaims, Grants]:
        """What a token says that is signed, whatever the time is.

        To read a long one takes milliseconds, and its bearer may show it in a loop. So the last that were good are
        remembered, by their digests alone. Only the same bytes have the same digest, so that no check is left out.
        """
        digest = sha256(given).digest()
        known = self._known.pop(digest, None)
        if known is None:
            claims: _SubClaims | _JwtClaims
            if given.startswith(b"sub-"):
                claims = _decode(self._signed_text(given[4:]), _SubClaims, "client_id")
            else:
                claims = _decode(self._signed_claims(given), _JwtClaims, "sub")
            known = len(given), claims, claims.allowed()
            self._known_size += len(given)
            while self._known_size > KNOWN_SIZE and self._known:
                size, _, _ = self._known.pop(next(iter(self._known)))
                self._known_size -= size
        self._known[digest] = known
        return known[1:]

    def _signed_text(self, given: bytes) -> bytes:
        """The JSON of a `sub-` token without its prefix, which one of the secrets has signed."""
        text, _, mac = given.partition(b".")
        macs = [_token_mac(secret, text) for secret in self._secrets]
        if not _is_any_of(mac, macs):
            raise TokenRefused(Reason.SIGNATURE, f"signed with none of the configured secrets ({len(macs)})")
        data = _from_base64(text)
        if data is None:
            raise TokenRefused(Reason.MALFORMED, "signed, and not base64url")
        return data

    def _signed_claims(self, given: bytes) -> bytes:
        """The JSON of a JWT, which one of the keys has signed. A key is used with its own algorithm only."""
        header: dict[str, Any] = {}
        with suppress(PyJWTError):
            header = jws.get_unverified_header(given)
        if not header:
            raise TokenRefused(Reason.MALFORMED, "not of the form of any token")
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in ALGORITHMS:
            raise TokenRefused(Reason.ALGORITHM, f"the algorithm {clip(repr(algorithm))} is not supported")
        keys = [key for key in self._jwt_keys if key.algorithm == algorithm]
        chosen = [key for key in keys if kid is None or key.kid in (None, kid)]
        for key in chosen:
            try:
                claims: bytes = jws.decode(given, key.key, algorithms=[key.algorithm])
            except PyJWTError:
                continue
            return claims
        named = "" if kid is None else f" with the kid {clip(repr(kid))}"
        if not chosen:
            raise TokenRefused(Reason.KEY, f"none of {len(keys)} configured keys for {algorithm} is one{named}")
        raise TokenRefused(
            Reason.SIGNATURE, f"signed with none of {len(chosen)} configured keys for {algorithm}{named}"
        )


# What tokens hold


_Rate = Annotated[int, msgspec.Meta(gt=0, le=2**53)]


class _Claims(msgspec.Struct, kw_only=True, omit_defaults=True):
    client_id: str | None = None
    exp: float | None = None
    nbf: float | None = None
    iat: float | None = None


class _Grant(msgspec.Struct):
    grant_type: Literal["read", "write", "create", "all"]
    pattern: str

    def __post_init__(self) -> None:
        check_pattern(self.pattern)


class _GrantList(msgspec.Struct):
    grants: list[_Grant]


class _SubClaims(_Claims, kw_only=True):
    grants: _GrantList
    publish_rate: _Rate | None = None
    publish_bytes: _Rate | None = None

    def rates(self) -> tuple[int | None, int | None]:
        return self.publish_rate, self.publish_bytes

    def allowed(self) -> Grants:
        grants = self.grants.grants
        return Grants(
            tuple(grant.pattern for grant in grants if grant.grant_type in ("read", "all")),
            tuple(grant.pattern for grant in grants if grant.grant_type in ("write", "all")),
        )


class _Access(msgspec.Struct):
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    publish_rate: _Rate | None = None
    publish_bytes: _Rate | None = None

    def __post_init__(self) -> None:
        for pattern in self.read + self.write:
            check_pattern(pattern)


class _JwtClaims(_Claims, kw_only=True):
    client_id: str | None = msgspec.field(default=None, name="sub")
    catbus: _Access

    def allowed(self) -> Grants:
        return Grants(self.catbus.read, self.catbus.write)

    def rates(self) -> tuple[int | None, int | None]:
        return self.catbus.publish_rate, self.catbus.publish_bytes


C = TypeVar("C", bound=_Claims)


def _decode(data: bytes, claims: type[C], name: str) -> C:
    """The claims in signed JSON, of which `name` is the `client_id`."""
    # How deep msgspec itself goes depends on the interpreter.
    if depth(data) > MAX_DEPTH:
        raise TokenRefused(Reason.CLAIMS, f"nested deeper than {MAX_DEPTH}")
    try:
        try:
            found = msgspec.json.decode(data, type=claims)
        except (msgspec.ValidationError, PeerError):
            # Of two claims with one name the last counts, whatever the first is (RFC 7519, section 4).
            found = msgspec.convert(msgspec.json.decode(data), claims)
    except (*UNDECODABLE, PeerError) as error:
        found, text = None, clip(str(error))
    if found is None:
        raise TokenRefused(Reason.CLAIMS, text, subject=_subject(data, name))
    if "\0" in (found.client_id or ""):
        raise TokenRefused(Reason.CLAIMS, f"U+0000 in `{name}`")
    return found


def _subject(data: bytes, name: str) -> str | None:
    """Whose token it is, as far as that can be read."""
    try:
        found = msgspec.json.decode(data, type=dict[str, Any]).get(name)
    except UNDECODABLE:
        return None
    return found if isinstance(found, str) else None


# Bytes


def _hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def _token_mac(secret: bytes, text: bytes) -> bytes:
    return _base64(_hmac(secret, text)[:16])


def _producer_mac(key: bytes, name: bytes, subject: str | None) -> bytes:
    who = b"" if subject is None else b"=" + subject.encode(errors="surrogatepass")
    return _hmac(key, name + who)[:16]


def _is_any_of(given: bytes, expected: Sequence[bytes]) -> bool:
    """Whether one of them is what was given, in a time that does not tell which or how much of it."""
    return sum(hmac.compare_digest(given, one) for one in expected) > 0


def _base64(data: bytes) -> bytes:
    return urlsafe_b64encode(data).rstrip(b"=")


def _from_base64(text: bytes) -> bytes | None:
    """The data of which `_base64` makes exactly this text."""
    try:
        data = b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        return None
    return data if _base64(data) == text else None
