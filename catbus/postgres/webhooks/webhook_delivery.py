"""The task of a replica that delivers the messages of consumers to URLs."""

from __future__ import annotations

import random
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import trio

from ...config import WebhookSettings
from ...observability.histogram import Histogram
from ...observability.loggers import RateLimitedLog, get_logger
from ...webhooks.delivery_schedule import DeliverySchedule, Partition
from ...webhooks.public_addresses import AddressRules
from ...webhooks.verdicts import Action, AttemptResult, Outcome, Verdict, judge
from ..access.asyncpg_bridge import DATABASE_ERRORS, DatabaseConnection
from ..access.query_connection import QueryConnection
from ..access.reconnecting_tasks import ReportProgress
from .batch_leases import BatchLeases, LeasedBatch

if TYPE_CHECKING:
    from ...webhooks.webhook_sender import WebhookSender

logger = get_logger("catbus.webhooks")

POLL_INTERVAL = 1.0
"""Seconds between two polls while nothing is published."""
BUSY_POLL_INTERVAL = 0.1
"""Seconds between two polls while messages are published."""
POLL_TIME_SHARE = 10
"""Polling takes at most one part in so many of the time, unless the pauses would be longer than `LONGEST_PAUSE`."""
LONGEST_PAUSE = 2.0
"""Seconds."""
LEASE_MARGIN = 6.0
"""Seconds for which a lease outlasts a request."""
SETTLE_MARGIN = 3.0
"""Seconds of those that remain for ending the lease. A request ends before."""
SETTLE_PAUSE = 0.5
"""Seconds between two tries to end a lease while the database is unreachable."""
FINISHING_TIME = 0.5
"""Seconds in which requests may still end by themselves while the replica stops."""
LOGGED_DELIVERIES = 5
"""How many failures of a kind are logged per minute."""
DURATION_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds."""


@dataclass(frozen=True, slots=True)
class WebhookStatistics:
    """The deliveries of this replica since its start."""

    attempts: Mapping[str, int]
    """By outcome."""
    messages: int
    """Messages that receivers have accepted."""
    rejected: int
    """Messages that became dead letters."""
    paused: int
    """Consumers that were paused because their receivers are gone."""
    lost_leases: int
    """Leases that could not be ended, so that the batch may be delivered again."""
    durations: Histogram
    """Of the attempts."""
    running: int
    waiting: int
    """Partitions that could be served if more deliveries could run."""
    open_circuits: int


class WebhookDelivery:
    """Delivers batches: leases a partition, sends a request, and ends the lease with what came of it.

    The database says what there is to do. `DeliverySchedule` chooses, and `verdicts.judge` decides. `applied` returns
    the newest seq that this replica knows: when it rises, there may be something to do.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[DatabaseConnection]],
        applied: Callable[[], int],
        settings: WebhookSettings,
    ) -> None:
        self._applied = applied
        self._settings = settings
        self._leases = BatchLeases(QueryConnection(connect), secrets.token_hex(8))
        self._schedule = DeliverySchedule(settings.deliveries)
        self._sender: WebhookSender | None = None
        self._changed = trio.Event()
        self._stale = False
        """Whether there may be something to do that the last poll has not shown."""
        self._requests: set[trio.CancelScope] = set()
        self._finishing = False
        self._idle = trio.Event()
        """While it finishes: whether no delivery runs any more."""
        self._attempts: Counter[str] = Counter({outcome.value: 0 for outcome in Outcome})
        self._messages = self._rejected = self._paused = self._lost_leases = 0
        self._durations = Histogram(DURATION_BOUNDS)
        self._log = RateLimitedLog(logger.warning, burst=LOGGED_DELIVERIES)
        self._mistakes = RateLimitedLog(logger.error)

    def statistics(self) -> WebhookStatistics:
        return WebhookStatistics(
            attempts=dict(self._attempts),
            messages=self._messages,
            rejected=self._rejected,
            paused=self._paused,
            lost_leases=self._lost_leases,
            durations=self._durations,
            running=self._schedule.running,
            waiting=self._schedule.waiting(trio.current_time()),
            open_circuits=self._schedule.open_circuits,
        )

    async def finish(self) -> None:
        """Begin no further delivery, and end those that run, so that another replica may deliver these batches at once.

        A batch whose request is cut off comes again with the same id. May be cancelled: then leases end by themselves.
        """
        self._finishing = True
        if not self._schedule.running:
            return
        with trio.move_on_after(FINISHING_TIME):
            await self._idle.wait()
        for scope in self._requests:
            scope.cancel()
        await self._idle.wait()

    async def close(self) -> None:
        """Close the connections to receivers."""
        if self._sender is not None:
            await self._sender.close()

    async def run(self, deliveries: trio.Nursery, report_progress: ReportProgress) -> None:
        """Deliver until the database is unreachable. The deliveries run in another nursery, and outlast that."""
        await self._leases.connect()
        while True:
            began = trio.current_time()
            applied = self._applied()
            self._stale = False
            partitions, work = await self._leases.work()
            report_progress()
            now = trio.current_time()
            self._schedule.observe(now, work)
            earliest = now + max(BUSY_POLL_INTERVAL, min((POLL_TIME_SHARE - 1) * (now - began), LONGEST_PAUSE))
            while not self._is_poll_due(now, earliest, applied, active=partitions > 0):
                self._changed = trio.Event()
                for partition in () if self._finishing else self._schedule.begin(now):
                    deliveries.start_soon(self._serve, partition)
                latest = now + (BUSY_POLL_INTERVAL if partitions else POLL_INTERVAL)
                with trio.move_on_at(min(latest, self._schedule.next_time(now))):
                    await self._changed.wait()
                now = trio.current_time()

    def _is_poll_due(self, now: float, earliest: float, applied: int, *, active: bool) -> bool:
        if now >= earliest + POLL_INTERVAL:
            return True
        return now >= earliest and active and (self._stale or self._applied() != applied)

    async def _serve(self, partition: Partition) -> None:
        try:
            await self._deliver(partition)
        except DATABASE_ERRORS as error:
            self._stale = True
            text = f"{type(error).__name__}: {error}"
            self._log.log(trio.current_time(), "a batch cannot be leased", kind=text, error=text)
        except Exception as error:  # noqa: BLE001
            self._mistakes.log(trio.current_time(), "a delivery failed", exception=error, consumer=partition[0])
        finally:
            self._schedule.finish(partition)
            self._changed.set()
            if self._finishing and not self._schedule.running:
                self._idle.set()

    async def _deliver(self, partition: Partition) -> None:
        settings = self._settings
        # The lease ends later by the clock of the database: it begins after this moment.
        seconds = settings.timeout + LEASE_MARGIN
        end = trio.current_time() + seconds
        batch = await self._leases.lease(partition, seconds, settings.batch, settings.batch_size)
        if batch is None:
            self._stale = True
            return
        result = AttemptResult(Outcome.UNREACHABLE, "")
        verdict = Verdict(Action.RELEASE)
        fraction = random.random()  # noqa: S311
        # With less time than the setting, because the database was slow, a good receiver might fail.
        if trio.current_time() + settings.timeout <= end - SETTLE_MARGIN and not self._finishing:
            with trio.CancelScope() as scope:
                self._requests.add(scope)
                try:
                    result = await self._attempt(batch)
                finally:
                    self._requests.remove(scope)
                verdict = judge(
                    result, size=batch.size, failures=batch.failures, attempts=settings.attempts, fraction=fraction
                )
        if await self._settle(batch, verdict, result.text, end):
            self._note(batch, verdict, result, fraction)
        else:
            self._lost_leases += 1
            self._stale = True

    async def _attempt(self, batch: LeasedBatch) -> AttemptResult:
        if self._sender is None:
            # The HTTP client takes 0.1 s to import, and most brokers do not need it.
            from ...webhooks.webhook_sender import WebhookSender

            self._sender = WebhookSender(AddressRules(self._settings.allow), self._settings.deliveries)
        began = trio.current_time()
        result = await self._sender.send(batch.request, time.time(), self._settings.timeout)
        self._durations.observe(trio.current_time() - began)
        self._attempts[result.outcome.value] += 1
        return result

    async def _settle(self, batch: LeasedBatch, verdict: Verdict, error: str, end: float) -> bool:
        """End a lease, and return whether that was possible while it was valid."""
        while True:
            try:
                return await self._leases.settle(batch, verdict, error)
            except DATABASE_ERRORS:
                if trio.current_time() + SETTLE_PAUSE > end:
                    return False
                await trio.sleep(SETTLE_PAUSE)

    def _note(self, batch: LeasedBatch, verdict: Verdict, result: AttemptResult, fraction: float) -> None:
        """Tell the schedule, the statistics and the log how a delivery has ended."""
        now = trio.current_time()
        consumer, part = batch.partition
        match verdict.action:
            case Action.DELIVERED:
                self._messages += batch.size
                self._schedule.succeed(now, batch.partition)
                return
            case Action.RELEASE:
                self._stale = True
                return
            case Action.RETRY if not verdict.counted:
                self._schedule.throttle(now, batch.partition, verdict.delay)
                event = "a receiver asks to wait"
            case Action.RETRY:
                self._schedule.fail(now, batch.partition, verdict.delay, fraction)
                event = "a delivery failed"
            case Action.REJECT:
                self._rejected += 1
                self._schedule.fail(now, batch.partition, 0.0, fraction)
                event = "a message became a dead letter"
            case Action.PAUSE:
                self._paused += 1
                self._stale = True
                event = "the deliveries of a consumer are paused, because the receiver is gone"
        self._log.log(
            now,
            event,
            kind=f"{consumer} {result.text}",
            consumer=consumer,
            partition=part,
            messages=batch.size,
            host=urlsplit(batch.request.url).hostname,
            error=result.text,
            failures=batch.failures + verdict.counted,
            delay=round(verdict.delay, 1),
        )
