"""Log lines about administration: the calls of administrators, and changed permissions. Their logger is `catbus.audit`.

Requests that only read have the level `debug`, because the console sends some every few seconds.

Only administrators cause these lines, so their number is not limited.
"""

from __future__ import annotations

from .loggers import get_logger

logger = get_logger("catbus.audit")


def log_admin_call(
    method: str, path: str, status: int, *, client_id: str | None, address: str, **fields: object
) -> None:
    """Log an HTTP request of an administrator, after its response was made.

    `client_id` is the administrator's; None for the admin key. `path` is without a query, which may contain a token.
    """
    common = {"method": method, "path": path, "status": status, "client_id": client_id, "address": address}
    log = logger.debug if method in ("GET", "HEAD") else logger.info
    log("an administrator's call", **common, **fields)


def log_role_change(role: str, client_id: str | None, permissions: str, *, sessions: int) -> None:
    """Log that `sessions` open sessions have got the changed permissions of a role. `role` is its handle."""
    logger.info("a role has changed", role=role, client_id=client_id, permissions=permissions, sessions=sessions)
