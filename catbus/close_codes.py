"""The codes with which a connection is closed (`protocol/README.md`, closing codes)."""

from __future__ import annotations

from enum import IntEnum


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
    DISCONNECTED = 4505
    UNRESPONSIVE = 4508
    TOKEN_NOT_VALID_YET = 4525
    OVERLOADED = 4529

    @property
    def final(self) -> bool:
        """Whether reconnecting cannot help, whatever the token."""
        return self < 4400
