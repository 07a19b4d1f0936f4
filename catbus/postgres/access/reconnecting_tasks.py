"""Services that are kept going while the database comes and goes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from ...errors import ConfigError
from ...observability.loggers import RateLimitedLog, get_logger
from .asyncpg_bridge import OUTAGE, leaf_exceptions

logger = get_logger("catbus.postgres")

ReportProgress = Callable[[], None]
Service = Callable[[ReportProgress], Awaitable[None]]

FIRST_DELAY = 0.05
LONGEST_DELAY = 1.0
FATAL_FAILURES = 5
FATAL_PERIOD = 60.0
OUTAGES = 5
"""How many of a kind are logged in a minute: a service that works for a moment and fails is down again and again."""


class ReconnectingTasks:
    """Runs services again when they fail, and knows whether those in `names` all work: the others are not needed.

    A service is called with a function that it calls whenever it has got somewhere: connected with nothing left to
    do, or something done. Until then it counts as down, and the pauses between its tries grow.
    """

    def __init__(self, *names: str) -> None:
        self.restarts = 0
        """How often a service was started again."""
        self.failures = 0
        """How often because of an error that is no outage: a mistake of ours."""
        self._names = names
        self._down = set(names)
        self._said: bool | None = None
        self._mistakes = RateLimitedLog(logger.error)
        self._outages = RateLimitedLog(logger.warning, burst=OUTAGES)

    @property
    def available(self) -> bool:
        """Whether all services work that are needed."""
        return self._down.isdisjoint(self._names)

    def stop(self) -> None:
        """Nothing works any more, and on purpose."""
        self._down.update(self._names)

    async def run(self, name: str, service: Service) -> None:
        """Run a service until it returns.

        Outages are waited out. `ConfigError` is passed on, and so is any other exception that came five times within
        a minute without the service getting anywhere.
        """
        delay = FIRST_DELAY
        failures: deque[float] = deque(maxlen=FATAL_FAILURES)

        def working() -> None:
            nonlocal delay
            delay = FIRST_DELAY
            failures.clear()
            self._note_working(name)

        while True:
            try:
                await service(working)
                return
            except Exception as error:
                parts = list(leaf_exceptions(error))
                for leaf in parts:
                    if isinstance(leaf, ConfigError):
                        raise leaf from None
                unexpected = [leaf for leaf in parts if not isinstance(leaf, OUTAGE)]
                if unexpected:
                    self.failures += 1
                    now = trio.current_time()
                    failures.append(now)
                    self._mistakes.log(now, "a service failed", kind=name, exception=unexpected[0], service=name)
                    if len(failures) == FATAL_FAILURES and now - failures[0] <= FATAL_PERIOD:
                        raise
                    self._down.add(name)
                else:
                    self._note_outage(name, parts[0])
            except BaseExceptionGroup as group:
                # It is being stopped, and an outage at that moment is nobody's business any more.
                raise (group.split(OUTAGE)[1] or group) from None
            self.restarts += 1
            await trio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
            delay = min(delay * 2, LONGEST_DELAY)

    def _note_working(self, name: str) -> None:
        self._down.discard(name)
        if self.available and self._said is not True:
            self._said = True
            logger.info("database connected")

    def _note_outage(self, name: str, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        say = partial(self._outages.log, trio.current_time(), kind=f"{name} {text}", service=name, error=text)
        if name not in self._names:
            if name not in self._down:
                say("service unavailable, trying again")
        elif self._said is not False and say("database unavailable, trying again"):
            self._said = False
        self._down.add(name)
