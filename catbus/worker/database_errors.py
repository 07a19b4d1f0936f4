"""What the errors of the drivers mean for a worker, without an import of any driver. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import ConsumerError

DRIVERS = frozenset({"asyncpg", "psycopg", "psycopg_pool", "sqlalchemy"})

# A wrong isolation level, lost messages, a wrong number, no such consumer, no such function, password or database.
_FINAL = ("25001", "CB002", "22023", "28", "3D", "3F", "42")


def driver_of(thing: object) -> str | None:
    """The driver that a connection or an error belongs to."""
    roots = [kind.__module__.partition(".")[0] for kind in type(thing).__mro__]
    return next((root for root in roots if root in DRIVERS), None)


def is_database_error(error: BaseException) -> bool:
    """Whether another connection may be without this error."""
    return isinstance(error, OSError) or driver_of(error) is not None


def final_error(error: BaseException) -> ConsumerError | None:
    """The error with which a worker ends, if a retry of the statement would be of no use."""
    for cause in _causes(error):
        state = getattr(cause, "sqlstate", None) or ""
        if state.startswith(_FINAL):
            details: Any = getattr(cause, "diag", None)
            text = details.message_primary if details else str(cause).partition("\n")[0]
            hint = details.message_hint if details else getattr(cause, "hint", None)
            return ConsumerError(f"{text}. {hint}" if hint else text, state)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error of the driver comes before that of SQLAlchemy, which contains it, because it has the hint."""
    for inner in (getattr(error, "orig", None), error.__cause__):
        if isinstance(inner, BaseException) and driver_of(inner) is not None:
            yield from _causes(inner)
    yield error
