"""HTTP responses for error codes."""

from __future__ import annotations

from ...error_codes import ErrorCode
from ...errors import PeerError, Unavailable
from ..replica_interface import ReplicaInterface
from .http_response import HttpResponse, http_error

ERROR_STATUSES = {
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.AUTH_TIMEOUT: 408,
    ErrorCode.TOKEN_EXPIRED: 401,
    ErrorCode.TOKEN_NOT_VALID_YET: 503,
    ErrorCode.UNAUTHORIZED: 403,
    ErrorCode.REVOKED: 401,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.LIMIT: 429,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.CONFLICT: 409,
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
    return http_error(status, str(error), code=code, wait=wait or 1.0)
