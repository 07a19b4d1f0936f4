"""Tasks that need the database, and start again after an outage."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from ...errors import ConfigError
from ...observability.loggers import RateLimitedLog, get_logger
from .asyncpg_bridge import DATABASE_ERRORS, leaf_exceptions

logger = get_logger("catbus.postgres")

ReportProgress = Callable[[], None]
Service = Callable[[ReportProgress], Awaitable[None]]

FIRST_DELAY = 0.05
LONGEST_DELAY = 1.0
MAX_FAILURES = 5
FAILURE_PERIOD = 60.0
LOGGED_OUTAGES = 5
"""How many outages of a kind are logged per minute: a service that works for a moment fails again and again."""


class ReconnectingTasks:
    """Runs services, starts them again when they fail, and knows whether all those in `names` work.

    A service gets a function, which it calls after each progress: it is connected and has nothing left to do, or it has
    done something. Until then it counts as down, and the pauses between its attempts grow.
    """

    def __init__(self, *names: str) -> None:
        self.restarts = 0
        """How often a service was started again."""
        self.failures = 0
        """How often because of an unexpected error, which is a bug."""
        self._names = names
        self._down = set(names)
        self._reported: bool | None = None
        self._mistakes = RateLimitedLog(logger.error)
        self._outages = RateLimitedLog(logger.warning, burst=LOGGED_OUTAGES)

    @property
    def available(self) -> bool:
        """Whether all services in `names` work."""
        return self._down.isdisjoint(self._names)

    def stop(self) -> None:
        """All services end: nothing is available any more."""
        self._down.update(self._names)

    async def run(self, name: str, service: Service) -> None:
        """Run a service until it returns.

        After an outage the service starts again. `ConfigError` is raised, and so is any other exception that occurs
        five times within a minute without progress of the service.
        """
        delay = FIRST_DELAY
        failures: deque[float] = deque(maxlen=MAX_FAILURES)

        def report_progress() -> None:
            nonlocal delay
            delay = FIRST_DELAY
            failures.clear()
            self._note_working(name)

        while True:
            try:
                await service(report_progress)
                return
            except Exception as error:
                parts = list(leaf_exceptions(error))
                for leaf in parts:
                    if isinstance(leaf, ConfigError):
                        raise leaf from None
                unexpected = [leaf for leaf in parts if not isinstance(leaf, DATABASE_ERRORS)]
                if unexpected:
                    self.failures += 1
                    now = trio.current_time()
                    failures.append(now)
                    self._mistakes.log(now, "a service failed", kind=name, exception=unexpected[0], service=name)
                    if len(failures) == MAX_FAILURES and now - failures[0] <= FAILURE_PERIOD:
                        raise
                    self._down.add(name)
                else:
                    self._note_outage(name, parts[0])
            except BaseExceptionGroup as group:
                # The service is being cancelled, so an outage at this moment does not matter.
                raise (group.split(DATABASE_ERRORS)[1] or group) from None
            self.restarts += 1
            await trio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
            delay = min(delay * 2, LONGEST_DELAY)

    def _note_working(self, name: str) -> None:
        self._down.discard(name)
        if self.available and self._reported is not True:
            self._reported = True
            logger.info("database connected")

    def _note_outage(self, name: str, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        log = partial(self._outages.log, trio.current_time(), kind=f"{name} {text}", service=name, error=text)
        if name not in self._names:
            if name not in self._down:
                log("service unavailable, trying again")
        elif self._reported is not False and log("database unavailable, trying again"):
            self._reported = False
        self._down.add(name)
