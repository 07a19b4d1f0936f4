"""The message log: every committed message, numbered without gaps in the order of the commits.

`interface` defines a log, and `in_memory` has the log of one process. `catbus.postgres` has the durable log.
"""

from .in_memory import MemoryLog
from .interface import (
    APPEND_OVERHEAD,
    EPHEMERAL_SIZE,
    KEY_REUSED,
    UNDECIDED,
    Append,
    Committed,
    Entry,
    Follower,
    Log,
    LogPage,
    Outcome,
    Rejected,
    Resumption,
    RetainedPage,
    conflict,
    erased,
    rejection_of,
)
from .recent_messages import RecentMessages
from .retained_messages import RetainedMessages

__all__ = [
    "APPEND_OVERHEAD",
    "EPHEMERAL_SIZE",
    "KEY_REUSED",
    "UNDECIDED",
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
    "RetainedMessages",
    "RetainedPage",
    "conflict",
    "erased",
    "rejection_of",
]
