"""The message log: every committed message, numbered without gaps in the order of their commits.

`base` says what a log is, `memory` is the one that lives in this process; `catbus.postgres` holds the durable one.
"""

from .in_memory import MemoryLog
from .interface import (
    EPHEMERAL_SIZE,
    OVERHEAD,
    Append,
    Committed,
    Entry,
    Follower,
    Log,
    LogPage,
    Outcome,
    Rejected,
    Resumption,
    not_taken,
)
from .recent_messages import RecentMessages

__all__ = [
    "EPHEMERAL_SIZE",
    "OVERHEAD",
    "Append",
    "Committed",
    "Entry",
    "Follower",
    "Log",
    "LogPage",
    "MemoryLog",
    "Outcome",
    "RecentMessages",
    "Rejected",
    "Resumption",
    "not_taken",
]
