"""PostgreSQL as the log's home: one connection that appends, one that listens, three that read when they have to."""

from .log import PostgresLog, PostgresStatistics

__all__ = ["PostgresLog", "PostgresStatistics"]
