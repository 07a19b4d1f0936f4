"""`consume` and `consume_blocking`: a worker that processes each message of a consumer exactly once.

| Module | |
|---|---|
| `work_cycle` | what to do next: receive, process, postpone, reject, pause, reconnect. Pure |
| `database_errors` | which errors end a worker, and which ones a new connection may cure. Pure |
| `async_sessions`, `trio_session`, `blocking_sessions` | the connections of asyncpg, psycopg and SQLAlchemy |
| `async_worker`, `blocking_worker` | the loops |

No module imports a driver before it is used. A worker needs the database, and no broker.
"""

from .async_worker import consume
from .blocking_worker import consume_blocking
from .work_cycle import ConsumerMessage, WorkStatistics

__all__ = ["ConsumerMessage", "WorkStatistics", "consume", "consume_blocking"]
