"""Errors, in three families: mistakes in the configuration, mistakes of the peer, and unavailable services."""

from __future__ import annotations

from enum import IntEnum, StrEnum


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


class CloseCode(IntEnum):
    """Why a connection is closed. 4000-4399: final; 4400-4499: reconnect with a new token; 4500-4999: reconnect."""

    BAD_MESSAGE = 4000
    UNAUTHENTICATED = 4001
    TOO_LARGE = 4009
    TOKEN_EXPIRED = 4401
    REVOKED = 4403
    INTERNAL = 4500
    AUTH_TIMEOUT = 4502
    UNAVAILABLE = 4503
    SHUTTING_DOWN = 4504
    UNRESPONSIVE = 4508
    TOKEN_NOT_VALID_YET = 4525
    OVERLOADED = 4529

    @property
    def final(self) -> bool:
        """Whether reconnecting cannot help, whatever the token."""
        return self < 4400


class CatbusError(Exception):
    """The base class of all exceptions that this package raises."""


class ConfigError(CatbusError):
    """The configuration is wrong. The text says where, what was expected, and what to do."""


class PeerError(CatbusError):
    """A request of the peer is rejected. `code` and the text are the reply.

    With `close`, the connection is closed with that code after the reply. `retry_after`: seconds until the request
    would be allowed. `id`: the id of the request, if only that could be read of it.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        close: CloseCode | None = None,
        retry_after: float | None = None,
        id: int | None = None,  # noqa: A002
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.close = close
        self.retry_after = retry_after
        self.id = id


class Refused(CatbusError):
    """A broker rejected a request, for the reason in `code`. `retry_after`: seconds until a retry, if known."""

    def __init__(self, code: ErrorCode, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class Unavailable(CatbusError):
    """A service outside this process is unavailable. A retry can help."""


class Disconnected(Unavailable):
    """The connection to a broker was lost, or could not be opened. `code`: the close code, if there was one."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code
