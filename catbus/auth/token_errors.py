"""Why a token is refused: what the client is told, and what the operator is."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum

from ..errors import CloseCode, ErrorCode, PeerError

LONGEST_WAIT = 86_400.0
"""Seconds: beyond that, a client need not know how long its token is not valid yet."""


class Reason(StrEnum):
    """Why a token is refused, for the operator. The client is told less."""

    MALFORMED = "malformed"
    ALGORITHM = "algorithm"
    KEY = "key"
    SIGNATURE = "signature"
    CLAIMS = "claims"
    EXPIRED = "expired"
    NOT_VALID_YET = "not_valid_yet"
    ROLE = "role"


class TokenRefused(PeerError):
    """A token is refused: `code`, `message` and `close` are for the client, `reason` and `detail` for the operator.

    Neither holds anything of a signature. `detail` holds claims, and `subject` the `client_id`, only of a token whose
    signature is valid.
    """

    def __init__(
        self,
        reason: Reason,
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


def moment(seconds: float) -> str:
    """A time in seconds since 1970, for people."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"
