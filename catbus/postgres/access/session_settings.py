"""The settings of sessions and statements, which override those of roles, databases and the server."""

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

Statements are short: with `geqo`, `jit` or parallel workers, planning or starting one can take longer than running it.
With less memory, reading `pg_settings` takes a temporary file, which a role may not be allowed.
"""
NEWER_SETTINGS = {"transaction_timeout": (17, "0")}
"""Further settings of every statement, each with the major version of PostgreSQL that introduced it."""

STARTUP_SETTINGS = {
    **STATEMENT_SETTINGS,
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "idle_session_timeout": "0",
    "exit_on_error": "off",
}
"""Startup parameters of a session. They take precedence over ALTER ROLE and ALTER DATABASE."""

POOLER_ERROR_CODES = "08P01", "0A000"
"""SQLSTATEs of a pooler that rejects startup parameters."""


def begin_script(version: int, *, read_write: bool = True) -> str:
    """The script that begins a transaction with the settings of statements. On a standby it cannot be read-write."""
    access = ", READ WRITE" if read_write else ""
    settings = _set({**_newer(version), **STATEMENT_SETTINGS}, local=True)
    return f"BEGIN ISOLATION LEVEL READ COMMITTED, NOT DEFERRABLE{access}; {settings}"


def complete_script(version: int, *, started: bool) -> str:
    """The script that ends a transaction and sets what the startup of the session has not set."""
    settings = {**({} if started else STARTUP_SETTINGS), **_newer(version)}
    return f"{_set(settings, local=False)}; COMMIT" if settings else "COMMIT"


def _newer(version: int) -> dict[str, str]:
    return {name: value for name, (since, value) in NEWER_SETTINGS.items() if version >= since}


def _set(settings: dict[str, str], *, local: bool) -> str:
    # With the full name and exact types, this is PostgreSQL's own function, whatever the search path is.
    calls = [f"pg_catalog.set_config('{name}', '{value}', {local})" for name, value in settings.items()]
    return f"SELECT {', '.join(calls)}"
