"""Error codes of HTTP/3 and WebTransport, and the mapping of application error codes into those of HTTP/3."""

from __future__ import annotations

from enum import IntEnum

MAX_APPLICATION_CODE = 0xFFFFFFFF

_FIRST = 0x52E4A40FA8DB
_LAST = 0x52E5AC983162


class Http3ErrorCode(IntEnum):
    """RFC 9114 section 8.1, and draft-ietf-webtrans-http3 section 9.5."""

    NO_ERROR = 0x100
    INTERNAL_ERROR = 0x102
    STREAM_CREATION_ERROR = 0x103
    FRAME_ERROR = 0x106
    EXCESSIVE_LOAD = 0x107
    ID_ERROR = 0x108
    SETTINGS_ERROR = 0x109
    REQUEST_REJECTED = 0x10B
    REQUEST_CANCELLED = 0x10C
    MESSAGE_ERROR = 0x10E
    VERSION_FALLBACK = 0x110
    BUFFERED_STREAM_REJECTED = 0x3994BD84
    SESSION_GONE = 0x170D7B68
    REQUIREMENTS_NOT_MET = 0x212C0D48


def to_http3_error_code(code: int) -> int:
    """Map a 32-bit application error code to HTTP/3 (draft-ietf-webtrans-http3 section 4.4)."""
    if not 0 <= code <= MAX_APPLICATION_CODE:
        raise ValueError(f"an application error code has 32 bits: {code:#x}")
    return _FIRST + code + code // 0x1E


def from_http3_error_code(code: int) -> int | None:
    """Map an HTTP/3 error code back to the application error code. Return None for a code of HTTP/3 itself.

    Every 31st value is reserved (RFC 9114 section 8.1) and maps to None.
    """
    if not _FIRST <= code <= _LAST or (code - 0x21) % 0x1F == 0:
        return None
    shifted = code - _FIRST
    return shifted - shifted // 0x1F
