"""What statements rely on, whatever a role, a database or the server's configuration has set."""

from __future__ import annotations

STATEMENT_SETTINGS = {
    "search_path": "pg_catalog, pg_temp",
    "standard_conforming_strings": "on",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "10s",
    "geqo": "off",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
    "work_mem": "16MB",
}
"""Settings of every statement. A client that stops within a transaction must not hold its locks for ever.

Statements are short: `geqo`, `jit` and parallel workers can make planning one, or starting it, take longer than all
else. With less memory, reading `pg_settings` takes a temporary file, of which a role may be allowed none.
"""
NEWER_SETTINGS = {"transaction_timeout": (17, "0")}
"""The same, with the major version of PostgreSQL that was the first to know them."""

STARTUP_SETTINGS = {
    **STATEMENT_SETTINGS,
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "idle_session_timeout": "0",
    "exit_on_error": "off",
}
"""What a session begins with. As parameters of its start they take precedence over ALTER ROLE and ALTER DATABASE."""

POOLER_ERROR_CODES = "08P01", "0A000"
"""The SQLSTATE of a pooler that takes no such parameters."""


def begin_script(version: int, *, read_write: bool = True) -> str:
    """The script that begins a transaction with what statements rely on. On a standby it cannot be read-write."""
    access = ", READ WRITE" if read_write else ""
    settings = _set({**_newer(version), **STATEMENT_SETTINGS}, local=True)
    return f"BEGIN ISOLATION LEVEL READ COMMITTED, NOT DEFERRABLE{access}; {settings}"


def complete_script(version: int, *, started: bool) -> str:
    """The script that sets what a session has not been started with, at the end of a transaction."""
    settings = {**({} if started else STARTUP_SETTINGS), **_newer(version)}
    return f"{_set(settings, local=False)}; COMMIT" if settings else "COMMIT"


def _newer(version: int) -> dict[str, str]:
    return {name: value for name, (since, value) in NEWER_SETTINGS.items() if version >= since}


def _set(settings: dict[str, str], *, local: bool) -> str:
    # By its full name, with the only types it takes: whatever the search path is, this is PostgreSQL's own.
    calls = [f"pg_catalog.set_config('{name}', '{value}', {local})" for name, value in settings.items()]
    return f"SELECT {', '.join(calls)}"
