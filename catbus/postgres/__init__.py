"""PostgreSQL as the log's home: a connection to append, one to listen, others to read and to notify when need be."""

from .log import PostgresLog, PostgresStatistics

__all__ = ["PostgresLog", "PostgresStatistics"]
