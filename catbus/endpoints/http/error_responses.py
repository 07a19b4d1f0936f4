"""HTTP responses for error codes."""

from __future__ import annotations

import math

from ...error_codes import ErrorCode
from ...errors import PeerError, Unavailable
from ..replica_interface import ReplicaInterface
from .http_request import Headers
from .http_response import HttpResponse, json_response

ERROR_STATUSES = {
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.AUTH_TIMEOUT: 408,
    ErrorCode.TOKEN_EXPIRED: 401,
    ErrorCode.TOKEN_NOT_VALID_YET: 503,
    ErrorCode.UNAUTHORIZED: 403,
    ErrorCode.REVOKED: 403,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.LIMIT: 429,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.UNKNOWN: 504,
    ErrorCode.SHUTTING_DOWN: 503,
    ErrorCode.INTERNAL: 500,
}
"""The HTTP status of each error code; 400 for all others."""


def error_response(replica: ReplicaInterface, error: PeerError | Unavailable) -> HttpResponse:
    code = error.code if isinstance(error, PeerError) else ErrorCode.UNAVAILABLE
    replica.runtime_statistics.count_error(code)
    status = ERROR_STATUSES.get(code, 400)
    wait = error.retry_after if isinstance(error, PeerError) else None
    return json_response({"error": str(error), "code": code}, status, retry_headers(status, wait or 1.0))


def retry_headers(status: int, wait: float = 1.0) -> Headers:
    """Return the headers that a status requires. `wait` is the number of seconds until a retry can succeed."""
    match status:
        case 401:
            return [(b"www-authenticate", b'Bearer realm="catbus"')]
        case 429 | 503:
            return [(b"retry-after", b"%d" % math.ceil(wait))]
        case _:
            return ()
