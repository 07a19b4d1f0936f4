"""The codes of replies that reject a request (`protocol/README.md`, error codes)."""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """The `code` of an error reply. A retry can help for those in `RETRYABLE`."""

    BAD_MESSAGE = "bad_message"
    UNAUTHENTICATED = "unauthenticated"
    UNAUTHORIZED = "unauthorized"
    INVALID_CHANNEL = "invalid_channel"
    INVALID_PATTERN = "invalid_pattern"
    TOO_LARGE = "too_large"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"
    AUTH_TIMEOUT = "auth_timeout"
    TOKEN_EXPIRED = "token_expired"
    TOKEN_NOT_VALID_YET = "token_not_valid_yet"
    REVOKED = "revoked"
    LIMIT = "limit"
    CONFLICT = "conflict"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"


RETRYABLE = frozenset(
    {
        ErrorCode.RATE_LIMITED,
        ErrorCode.OVERLOADED,
        ErrorCode.UNAVAILABLE,
        ErrorCode.UNKNOWN,
        ErrorCode.AUTH_TIMEOUT,
        ErrorCode.TOKEN_NOT_VALID_YET,
        ErrorCode.SHUTTING_DOWN,
        ErrorCode.INTERNAL,
    }
)
