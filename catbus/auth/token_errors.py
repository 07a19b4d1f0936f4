"""Rejected tokens: the reason that the client receives, and the one that the operator reads."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum

from ..close_codes import CloseCode
from ..error_codes import ErrorCode
from ..errors import PeerError

MAX_RETRY_AFTER = 86_400.0
"""Seconds: the longest `retry_after` of a token that is not valid yet."""


class RejectionReason(StrEnum):
    """The reason why a token was rejected, for the operator. The client receives less."""

    MALFORMED = "malformed"
    ALGORITHM = "algorithm"
    KEY = "key"
    SIGNATURE = "signature"
    CLAIMS = "claims"
    EXPIRED = "expired"
    NOT_VALID_YET = "not_valid_yet"
    ROLE = "role"
    HOOK = "hook"
    REVOKED = "revoked"


class TokenRejected(PeerError):
    """A token was rejected. `code`, `message` and `close` are for the client, `reason` and `detail` for the operator.

    Neither contains anything of a signature. `detail` contains claims, and `subject` the client_id, only if the
    signature of the token is valid.
    """

    def __init__(
        self,
        reason: RejectionReason,
        detail: str,
        *,
        message: str = "the token is not valid",
        code: ErrorCode = ErrorCode.UNAUTHENTICATED,
        close: CloseCode = CloseCode.UNAUTHENTICATED,
        subject: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(code, message, close, retry_after)
        self.reason = reason
        self.detail = detail
        self.subject = subject


class UnknownKey(TokenRejected):
    """No key with the `kid` of a JWT is known. Its issuer may have a new one."""


def format_time(seconds: float) -> str:
    """Format a time in seconds since 1970 for people."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"
