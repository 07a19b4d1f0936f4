"""What a worker does next, for all drivers. Pure: no clock, no randomness, no connection.

A transaction is: `receive`, `begin` with the rows, the handler behind a savepoint, `Turn.fail` if it failed, the turn's
statement, commit, `end`. After an empty turn comes `pause`, after a lost connection `lost`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from math import inf
from typing import Any, NamedTuple

from ..client.reconnect_policy import Backoff

RECEIVE = """
SELECT r.seq, r.channel, r.payload, r.at, r.sender, r.attempt, CASE WHEN r.seq IS NULL THEN catbus.far_behind({0}) END
FROM (VALUES (1)) AS always LEFT JOIN catbus.receive({0}, {1}, true) AS r ON true
"""
POSTPONE = "SELECT catbus.postpone({0}, {1} * interval '1 s', {2})"
REJECT = "SELECT catbus.reject({0}, {1}, {2})"
PROBE = "SELECT pg_backend_pid(), now()"
"""Within a transaction, `now()` stays the same."""
NOTIFIED_CHANNEL = "catbus"
"""Replicas notify it after each commit of messages."""

FIRST_PAUSE = 0.02
"""Seconds until the next look after the first one that found nothing."""
COALESCE_PAUSE = 0.01
"""Seconds between a notification and the look, so that a busy log does not make a worker look all the time."""
RECONNECT_BACKOFF = Backoff(0.5, 30.0)
REPORT_INTERVAL = 60.0
"""Seconds between log lines about progress."""
_MAX_REASON = 1000
_MAX_DELAY = 86_400.0


class Statement(NamedTuple):
    """A statement with `{0}`, `{1}` and so on for its arguments."""

    sql: str
    arguments: tuple[object, ...]

    def with_names(self, style: str) -> tuple[str, dict[str, object]]:
        """The statement and its arguments by name. `style` has `{}` for the name of an argument."""
        names = [f"p{number}" for number in range(len(self.arguments))]
        return self.sql.format(*map(style.format, names)), dict(zip(names, self.arguments, strict=True))


@dataclass(frozen=True)
class ConsumerMessage:
    """A message that a consumer has received.

    `raw` is the payload as JSON text. `at` is when it was published. `sender` is the client_id of the publisher, or
    None. `attempt` is 1 for the first transaction that receives it alone, and for those that receive several messages.
    """

    seq: int
    channel: str
    raw: str
    at: datetime
    sender: str | None
    attempt: int = 1

    @cached_property
    def payload(self) -> Any:
        """The payload, decoded on first access."""
        return json.loads(self.raw)


@dataclass
class WorkStatistics:
    """What a worker has done since it began. It changes while the worker runs, and may be read at any time."""

    processed: int = 0
    """Messages whose transactions were committed."""
    transactions: int = 0
    """Transactions that were committed with processed messages."""
    failures: int = 0
    """Transactions whose handler raised an exception."""
    dead_letters: int = 0
    """Messages that were rejected after their last attempt."""
    empty: int = 0
    """Looks that found nothing."""
    reconnects: int = 0
    """Connections that were lost, or could not be opened."""


class Turn:
    """One transaction: the messages, and the statement with which it ends unless the handler processes them."""

    def __init__(self, cycle: WorkCycle, messages: Sequence[ConsumerMessage]) -> None:
        self.messages = messages
        self.statement: Statement | None = None
        self.delay: float | None = None
        """Seconds for which the messages are postponed."""
        self.rejected: str | None = None
        """The reason why the message becomes a dead letter."""
        self._cycle = cycle
        if messages and cycle.attempts is not None and messages[0].attempt > cycle.attempts:
            # Nobody caught an exception: the process or the connection ended, or the commit failed.
            self._reject(f"{cycle.attempts} attempts have not ended with a commit")

    def fail(self, reason: str, chance: float) -> None:
        """The handler has failed. `chance` is a random number from 0 to 1."""
        cycle, first = self._cycle, self.messages[0]
        reason = clean_reason(reason)
        alone = len(self.messages) == 1
        if alone and cycle.attempts is not None and first.attempt >= cycle.attempts:
            self._reject(reason)
            return
        # Of several messages each is tried alone next, at once: most of them are not the reason.
        self.delay = min(cycle.backoff.pause(first.attempt - 1, chance), _MAX_DELAY) if alone else 0.0
        self.statement = Statement(POSTPONE, (cycle.name, self.delay, reason))

    def _reject(self, reason: str) -> None:
        self.rejected = reason
        self.statement = Statement(REJECT, (self._cycle.name, self.messages[0].seq, reason))


class WorkCycle:
    """The state of a worker between its transactions. Times are in seconds, by any one clock."""

    def __init__(
        self,
        name: str,
        statistics: WorkStatistics,
        *,
        batch: int | None,
        attempts: int | None,
        backoff: Backoff,
        poll: float,
    ) -> None:
        if attempts is not None and not 1 <= attempts <= 1000:
            raise ValueError("attempts is a number from 1 to 1000, or None")
        if batch is not None and not 1 <= batch <= 10_000:
            raise ValueError("batch is a number from 1 to 10000, or None")
        if not FIRST_PAUSE <= poll < inf:
            raise ValueError(f"poll is a number of seconds from {FIRST_PAUSE:g} on")
        self.name = name
        self.statistics = statistics
        self.attempts = attempts
        self.backoff = backoff
        self.receive = Statement(RECEIVE, (name, batch or 1))
        self._poll = poll
        self._looks = 0
        """Looks in a row that found nothing."""
        self._losses = 0
        """Connections in a row that were lost before a transaction was committed."""
        self._far = False
        """The last turn has looked at a part of the log only, and there was no message in it."""
        self._retries: list[float] = []
        """When partitions that this worker has postponed may be received again: at most one time for each."""
        self._report_at = -inf
        self._reported = 0

    def begin(self, rows: Sequence[Sequence[Any]]) -> Turn:
        """Begin with the rows of `receive`. Without messages there is one row, which says whether to look on."""
        self._far = bool(rows[0][6])
        return Turn(self, [ConsumerMessage(*row[:6]) for row in rows if row[0] is not None])

    def end(self, turn: Turn, now: float) -> None:
        """The transaction of a turn is committed."""
        statistics = self.statistics
        self._losses = 0
        if not turn.messages:
            statistics.empty += 1
            return
        self._looks = 0
        if turn.rejected is not None:
            statistics.dead_letters += 1
        elif turn.delay is not None:
            self._retries = [*(time for time in self._retries if time > now), now + turn.delay]
        else:
            statistics.processed += len(turn.messages)
            statistics.transactions += 1

    def pause(self, now: float) -> float:
        """How many seconds to wait after a turn without messages, unless a notification comes."""
        if self._far:
            self._looks = 0
            return 0.0
        seconds = min(self._poll, FIRST_PAUSE * 2.0 ** min(self._looks, 30))
        self._looks += 1
        retry_at = min(self._retries, default=inf)
        if retry_at > now + seconds:
            return seconds
        # The clock of the database decides. If it is a little behind, the next pauses are short again.
        self._retries.remove(retry_at)
        self._looks = 0
        return max(retry_at - now, 0.0)

    def lost(self, chance: float) -> float:
        """How many seconds to wait before the next connection."""
        self.statistics.reconnects += 1
        self._losses += 1
        return RECONNECT_BACKOFF.pause(self._losses - 1, chance)

    def report(self, now: float) -> dict[str, int] | None:
        """The statistics, if it is time to log them and something was processed; otherwise None."""
        if now < self._report_at or self.statistics.processed == self._reported:
            return None
        first = self._report_at == -inf
        self._report_at, self._reported = now + REPORT_INTERVAL, self.statistics.processed
        return None if first else asdict(self.statistics)


def clean_reason(reason: str) -> str:
    """A reason that PostgreSQL accepts as text."""
    return reason[:_MAX_REASON].replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
