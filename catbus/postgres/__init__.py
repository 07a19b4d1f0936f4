"""The durable log, in PostgreSQL. `log.py` assembles it from the packages beside it."""

from .log import PostgresLog, PostgresStatistics

__all__ = ["PostgresLog", "PostgresStatistics"]
