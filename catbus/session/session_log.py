"""One log line when a session opens, closes or is refused. Their logger is `catbus.sessions`.

A client can open and close sessions as fast as it likes, and writing both lines takes about a tenth of the CPU time of
the session. So the lines are limited, of each client and in all. Lines that were left out are counted in a later one.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

from ..limits.token_bucket import TokenBucket
from ..observability.loggers import get_logger
from ..protocol.wire_messages import clip

logger = get_logger("catbus.sessions")

CLIENT_LINES = 30
"""Lines about one client at one address in `CLIENT_INTERVAL` seconds."""
CLIENT_INTERVAL = 60.0
MAX_CLIENTS = 10_000
"""Clients whose lines are counted at a time. Beyond that, no other client gets a line in the interval."""
LINES_PER_SECOND, LINES_BURST = 50, 500
"""Lines about authenticated sessions."""
REFUSALS_PER_SECOND, REFUSALS_BURST = 5, 50
"""Lines about refused sessions. Peers without a valid token cannot take the place of other lines."""


class LineLimit:
    """Permits a number of lines of each client, and of all together. No clock: times are arguments, in seconds."""

    def __init__(self, rate: float, burst: float) -> None:
        self.left_out = 0
        """Lines that were not permitted, and that no line has named yet."""
        self._bucket = TokenBucket(rate, burst, 0.0)
        self._lines: dict[Hashable, int] = {}
        self._interval_end = 0.0

    def permits(self, client: Hashable, now: float) -> bool:
        """Count a line of a client, and return whether to write it."""
        if now >= self._interval_end:
            self._interval_end = now + CLIENT_INTERVAL
            self._lines.clear()
        number = self._lines.get(client, 0)
        known = number > 0 or len(self._lines) < MAX_CLIENTS
        if known and number < CLIENT_LINES and self._bucket.take(1, now):
            self._lines[client] = number + 1
            return True
        self.left_out += 1
        return False


class SessionLog:
    """Writes the lines about the sessions of one replica. Times are in seconds, by any one clock."""

    def __init__(self) -> None:
        self._lines = LineLimit(LINES_PER_SECOND, LINES_BURST)
        self._refusals = LineLimit(REFUSALS_PER_SECOND, REFUSALS_BURST)

    def opened(self, now: float, client_id: str | None, address: str, **fields: object) -> None:
        """Log that a session was authenticated."""
        self._write(self._lines, now, "session opened", client_id, address, fields)

    def closed(self, now: float, client_id: str | None, address: str, **fields: object) -> None:
        """Log that an authenticated session has ended."""
        self._write(self._lines, now, "session closed", client_id, address, fields)

    def refused(self, now: float, address: str, **fields: object) -> None:
        """Log that the broker has closed a session that was never authenticated."""
        self._write(self._refusals, now, "session refused", None, address, fields)

    def _write(
        self, limit: LineLimit, now: float, event: str, client_id: str | None, address: str, fields: dict[str, object]
    ) -> None:
        if not logger.isEnabledFor(logging.INFO) or not limit.permits((client_id, address), now):
            return
        if limit.left_out:
            fields["left_out"], limit.left_out = limit.left_out, 0
        logger.info(event, client_id=None if client_id is None else clip(client_id), address=address, **fields)
