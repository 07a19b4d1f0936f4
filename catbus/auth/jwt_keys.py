"""JWT keys: the keys that verify JWTs, each with its one algorithm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt import PyJWKSet, PyJWS, PyJWTError
from jwt.algorithms import HMACAlgorithm

from ..errors import ConfigError


class _LenientHmac(HMACAlgorithm):
    """HMAC that accepts a short secret. The operator's secret signs `sub-` tokens too, so its length is given."""

    def check_key_length(self, key: bytes) -> str | None:
        return None


jws = PyJWS(algorithms=["RS256", "ES256"])
jws.register_algorithm("HS256", _LenientHmac(HMACAlgorithm.SHA256))

ALGORITHMS = ("HS256", "RS256", "ES256")

USABLE_KEYS = "RSA of 2048 bits or more or ECDSA on P-256"


@dataclass(frozen=True, slots=True)
class JwtKey:
    """A key and the one algorithm with which it is used."""

    algorithm: Literal["HS256", "RS256", "ES256"]
    key: bytes | RSAPublicKey | EllipticCurvePublicKey = field(repr=False)
    kid: str | None = None


@dataclass(frozen=True, slots=True)
class KeySetStatistics:
    """What became of the fetches of key sets. `age`: seconds since the oldest was fetched, or since the start."""

    fetches: int
    failures: int
    age: float


class KeySetSource(Protocol):
    """The key sets that are fetched by URL."""

    async def finish(self) -> bool:
        """Wait until a fetch that goes on has finished, if there is one. It may have begun too early: returns False."""

    async def refresh(self) -> bool:
        """Wait until all were fetched after this call, for 15 s at most. Return whether every fetch succeeded."""

    def statistics(self) -> KeySetStatistics: ...


def from_pem(text: str) -> Iterator[JwtKey]:
    """The public keys in a PEM file. Raises `ConfigError` for a key that cannot be used."""
    for block in re.finditer(r"-----BEGIN ((?:RSA )?PUBLIC KEY)-----.*?-----END \1-----", text, re.DOTALL):
        try:
            key = _public_key(load_pem_public_key(block[0].encode()), None)
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if key is None:
            raise ConfigError(f"a PEM block is not a usable public key: expected {USABLE_KEYS}")
        yield key


def from_jwks(text: str) -> Iterator[JwtKey]:
    """The usable keys of a JWKS. Other keys of the set are skipped, and so is a text that is not one."""
    try:
        jwks = PyJWKSet.from_json(text).keys
    except (PyJWTError, ValueError, TypeError, AttributeError, RecursionError):
        return
    for jwk in jwks:
        key = _public_key(jwk.key, jwk.key_id)
        if key is not None and key.algorithm == jwk.algorithm_name and jwk.public_key_use != "enc":
            yield key


def _public_key(key: object, kid: str | None) -> JwtKey | None:
    match key:
        case RSAPublicKey() if key.key_size >= 2048:
            return JwtKey("RS256", key, kid)
        case EllipticCurvePublicKey() if isinstance(key.curve, SECP256R1):
            return JwtKey("ES256", key, kid)
        case _:
            return None
