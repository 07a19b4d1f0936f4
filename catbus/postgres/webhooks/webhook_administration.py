"""Consumers whose messages replicas deliver to a URL, for administrators: the state of the deliveries, and secrets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby

from ...config import DatabaseSettings
from ..access.migrations import check_version, migrate, open_connection
from ..consumers.consumer_administration import ConsumerAdministration, reported_errors

_WEBHOOKS = """
SELECT consumer, url, paused, reason, partition, delivering, failures, due, error, failed, delivered
FROM catbus.webhook_states()
"""
_SECRET = "SELECT catbus.webhook_secret($1)"
_ROTATE = "SELECT catbus.rotate_webhook_secret($1, $2, $3)"
_PAUSE = "SELECT catbus.pause_consumer($1, $2)"
_RESUME = "SELECT catbus.resume_consumer($1)"


@dataclass(frozen=True, slots=True)
class WebhookPartition:
    """The deliveries of a partition.

    `delivering` messages are in the batch that is tried, after `failures` failed attempts. The next attempt is at
    `due`, if that is not now. `failed` is the time of the last error.
    """

    partition: int
    delivering: int
    failures: int
    due: datetime | None
    error: str | None
    failed: datetime | None
    delivered: datetime | None


@dataclass(frozen=True, slots=True)
class WebhookReport:
    """The deliveries of a consumer to its URL. `paused` is since when they are paused, and `reason` is why."""

    name: str
    url: str
    paused: datetime | None
    reason: str | None
    partitions: tuple[WebhookPartition, ...]

    @property
    def failing(self) -> bool:
        """Whether the last attempt of a partition has failed."""
        return any(partition.error is not None for partition in self.partitions)


@asynccontextmanager
async def open_webhooks(settings: DatabaseSettings, *, prepare: bool) -> AsyncIterator[WebhookAdministration]:
    """Connect to the database. With `prepare`, migrate the schema before; otherwise only check its version.

    Raises as `migrations.open_connection` does.
    """
    async with open_connection(settings) as connection:
        await (migrate(connection) if prepare else check_version(connection))
        yield WebhookAdministration(connection)


class WebhookAdministration(ConsumerAdministration):
    """All consumers, and what only those with a URL have: calls the functions of `018_webhooks.sql`."""

    async def webhooks(self) -> list[WebhookReport]:
        """The deliveries of all consumers with a URL, in the order of their names."""
        with reported_errors():
            rows = await self._statements.fetch(_WEBHOOKS)
        return [
            WebhookReport(name, url, paused, reason, tuple(WebhookPartition(*row[4:]) for row in part))
            for (name, url, paused, reason), part in groupby(map(tuple, rows), lambda row: row[:4])
        ]

    async def webhook(self, name: str) -> WebhookReport | None:
        """The deliveries of a consumer; None if it has no URL."""
        return next((webhook for webhook in await self.webhooks() if webhook.name == name), None)

    async def webhook_secret(self, name: str) -> str:
        """The secret that signs the deliveries of a consumer."""
        with reported_errors():
            ((secret,),) = await self._statements.fetch(_SECRET, name)
        return str(secret)

    async def rotate_webhook_secret(self, name: str, secret: str | None, overlap: float) -> str:
        """Sign with another secret, and for `overlap` seconds with the former one, too. Returns the new one."""
        with reported_errors():
            ((fresh,),) = await self._statements.fetch(_ROTATE, name, secret, timedelta(seconds=overlap))
        return str(fresh)

    async def pause(self, name: str, reason: str | None) -> None:
        """Pause the deliveries of a consumer."""
        with reported_errors():
            await self._statements.fetch(_PAUSE, name, reason)

    async def resume(self, name: str) -> None:
        """Resume the deliveries of a consumer, at once."""
        with reported_errors():
            await self._statements.fetch(_RESUME, name)
