"""Errors, in three families: mistakes in the configuration, mistakes of the peer, and unavailable services."""

from __future__ import annotations

from .close_codes import CloseCode
from .error_codes import ErrorCode


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


class ConflictError(Refused):
    """A conditional publish was rejected. `seq` is that of the channel's retained message, 0 if there is none."""

    def __init__(self, message: str, seq: int) -> None:
        super().__init__(ErrorCode.CONFLICT, message)
        self.seq = seq


class ConsumerError(CatbusError):
    """A worker cannot go on, and a retry would be of no use. The text says what to do.

    `sqlstate` is the code of PostgreSQL.
    """

    def __init__(self, message: str, sqlstate: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class Unavailable(CatbusError):
    """A service outside this process is unavailable. A retry can help."""


class Disconnected(Unavailable):
    """The connection to a broker was lost, or could not be opened. `code`: the close code, if there was one."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code
