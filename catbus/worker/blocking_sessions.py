"""The connections on which a blocking worker runs its transactions: psycopg, SQLAlchemy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from .async_sessions import check_transaction
from .database_errors import driver_of
from .work_cycle import NOTIFIED_CHANNEL, PROBE, Statement


class PsycopgSession:
    """A `Connection` of psycopg."""

    def __init__(self, raw: Any) -> None:
        from psycopg.rows import tuple_row  # psycopg is imported already

        self.connection = raw
        self._raw = raw
        self._row_factory = tuple_row

    @property
    def lost(self) -> bool:
        return bool(self._raw.closed)

    @property
    def process_id(self) -> int:
        return int(self._raw.info.backend_pid)

    def fetch(self, statement: Statement) -> Sequence[Sequence[Any]]:
        with self._raw.cursor(row_factory=self._row_factory) as cursor:
            cursor.execute(*statement.with_names("%({})s"))
            rows: Sequence[Sequence[Any]] = cursor.fetchall()
            return rows

    def transaction(self) -> AbstractContextManager[Any]:
        """A transaction; within a transaction a savepoint."""
        context: AbstractContextManager[Any] = self._raw.transaction()
        return context

    def wait_notified(self, seconds: float) -> None:
        """See `AsyncSession.wait_notified`."""
        self._run(f"LISTEN {NOTIFIED_CHANNEL}")
        try:
            for _ in self._raw.notifies(timeout=seconds, stop_after=1):
                pass
        finally:
            with suppress(Exception):
                self._run(f"UNLISTEN {NOTIFIED_CHANNEL}")

    def _run(self, command: str) -> None:
        with self._raw.transaction():
            self._raw.execute(command)


class SQLAlchemySession:
    """A `Connection` of SQLAlchemy. It hears notifications over psycopg, and polls over other drivers."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        raw = connection.connection.driver_connection
        self._driver = PsycopgSession(raw) if driver_of(raw) == "psycopg" else None
        self.process_id = self._driver.process_id if self._driver else 0

    @property
    def lost(self) -> bool:
        return self.connection.closed or self.connection.invalidated or bool(self._driver and self._driver.lost)

    def fetch(self, statement: Statement) -> Sequence[Sequence[Any]]:
        from sqlalchemy import text  # SQLAlchemy is imported already

        sql, arguments = statement.with_names(":{}")
        result = self.connection.execute(text(sql), arguments)
        rows: Sequence[Sequence[Any]] = result.all()
        return rows

    def transaction(self) -> AbstractContextManager[Any]:
        nested = self.connection.in_transaction()
        context: AbstractContextManager[Any] = self.connection.begin_nested() if nested else self.connection.begin()
        return context

    def wait_notified(self, seconds: float) -> None:
        assert self._driver is not None
        self._driver.wait_notified(seconds)


BlockingSession = PsycopgSession | SQLAlchemySession


def make_blocking_session(connection: Any) -> BlockingSession:
    """The session of a connection. Raises `TypeError` for an object that is none."""
    driver = driver_of(connection)
    if driver == "sqlalchemy" and hasattr(connection, "begin_nested") and hasattr(connection, "exec_driver_sql"):
        return SQLAlchemySession(connection)
    if driver == "psycopg" and hasattr(connection, "notifies") and hasattr(connection, "__enter__"):
        return PsycopgSession(connection)
    raise TypeError(f"consume_blocking works on blocking connections of psycopg and SQLAlchemy, not on {connection!r}")


def hears_notifications(session: BlockingSession) -> bool:
    """Whether notifications reach this session. See `listens_directly`."""
    with session.transaction():
        ((pid, began),) = session.fetch(Statement(PROBE, ()))
        ((_, again),) = session.fetch(Statement(PROBE, ()))
    check_transaction(began, again)
    return bool(pid == session.process_id)


def open_blocking(connect: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
    """What `connect` returns, opened: a connection, and how to close it or give it back to its pool."""
    made = connect()
    if driver_of(made) in ("psycopg", "sqlalchemy") and hasattr(made, "close"):
        return made, made.close
    if not hasattr(made, "__enter__"):
        raise TypeError(f"consume_blocking works on blocking connections, not on {made!r}")
    return made.__enter__(), lambda: made.__exit__(None, None, None)
