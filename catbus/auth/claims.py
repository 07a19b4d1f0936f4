"""The claims of tokens: the signed JSON of `sub-` tokens and of JWTs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ..errors import PeerError
from ..protocol.channels import check_pattern
from ..protocol.wire_messages import MAX_DEPTH, UNDECODABLE, clip, depth
from .grants import Grants
from .token_errors import RejectionReason, TokenRejected

Rate = Annotated[int, msgspec.Meta(gt=0, le=2**53)]


class TokenClaims(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The claims that both kinds of tokens have. Times are in seconds since 1970."""

    client_id: str | None = None
    exp: float | None = None
    nbf: float | None = None
    iat: float | None = None


class GrantClaim(msgspec.Struct):
    """One grant of a `sub-` token."""

    grant_type: Literal["read", "write", "create", "all"]
    pattern: str

    def __post_init__(self) -> None:
        check_pattern(self.pattern)


class GrantListClaim(msgspec.Struct):
    """The grants of a `sub-` token."""

    grants: list[GrantClaim]


class SubTokenClaims(TokenClaims, kw_only=True):
    """The claims of a `sub-` token."""

    grants: GrantListClaim
    publish_rate: Rate | None = None
    publish_bytes: Rate | None = None

    def rates(self) -> tuple[int | None, int | None]:
        """Messages and bytes that the client may publish per second."""
        return self.publish_rate, self.publish_bytes

    def allowed(self) -> Grants:
        """The grants in these claims."""
        grants = self.grants.grants
        return Grants(
            tuple(grant.pattern for grant in grants if grant.grant_type in ("read", "all")),
            tuple(grant.pattern for grant in grants if grant.grant_type in ("write", "all")),
        )


class CatbusClaim(msgspec.Struct):
    """The `catbus` claim of a JWT."""

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    publish_rate: Rate | None = None
    publish_bytes: Rate | None = None

    def __post_init__(self) -> None:
        for pattern in self.read + self.write:
            check_pattern(pattern)


class JwtClaims(TokenClaims, kw_only=True):
    """The claims of a JWT."""

    client_id: str | None = msgspec.field(default=None, name="sub")
    iss: Any = None
    aud: Any = None
    catbus: CatbusClaim

    def allowed(self) -> Grants:
        """The grants in these claims."""
        return Grants(self.catbus.read, self.catbus.write)

    def rates(self) -> tuple[int | None, int | None]:
        """Messages and bytes that the client may publish per second."""
        return self.catbus.publish_rate, self.catbus.publish_bytes


C = TypeVar("C", bound=TokenClaims)


def decode_claims(data: bytes, claims: type[C], name: str) -> C:
    """Decode the claims in signed JSON. `name` is the claim with the client_id. Raises `TokenRejected` (claims)."""
    # How deep msgspec itself goes depends on the interpreter.
    if depth(data) > MAX_DEPTH:
        raise TokenRejected(RejectionReason.CLAIMS, f"nested deeper than {MAX_DEPTH}")
    try:
        try:
            found = msgspec.json.decode(data, type=claims)
        except (msgspec.ValidationError, PeerError):
            # Of two claims with one name the last counts, whatever the first is (RFC 7519, section 4).
            found = msgspec.convert(msgspec.json.decode(data), claims)
    except (*UNDECODABLE, PeerError) as error:
        found, text = None, clip(str(error))
    if found is None:
        raise TokenRejected(RejectionReason.CLAIMS, text, subject=_find_subject(data, name))
    if "\0" in (found.client_id or ""):
        raise TokenRejected(RejectionReason.CLAIMS, f"U+0000 in `{name}`")
    return found


def _find_subject(data: bytes, name: str) -> str | None:
    """The client_id in claims that do not decode, if it can be read."""
    try:
        found = msgspec.json.decode(data, type=dict[str, Any]).get(name)
    except UNDECODABLE:
        return None
    return found if isinstance(found, str) else None
