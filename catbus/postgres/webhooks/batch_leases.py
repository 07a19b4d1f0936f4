"""Leases of the batches of webhooks: calls of the functions in `018_webhooks.sql`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...webhooks.delivery_schedule import Partition
from ...webhooks.signed_request import DeliveredMessage, SignedRequest, encode_messages
from ...webhooks.verdicts import Verdict
from ..access.query_connection import QueryConnection

_WORK = "SELECT partitions, consumers, parts, waits FROM catbus.webhook_work()"
_LEASE = """
SELECT turn, id, made, failures, url, secrets, seqs, channels, payloads, times, senders
FROM catbus.lease_batch($1, $2::integer::smallint, $3, $4, $5, $6)
"""
_SETTLE = "SELECT catbus.settle_batch($1, $2::integer::smallint, $3, $4, $5, $6, $7, $8)"


@dataclass(frozen=True, slots=True)
class LeasedBatch:
    """A batch that this replica may deliver until the lease ends. `failures`: earlier attempts that failed."""

    partition: Partition
    lease: int
    size: int
    failures: int
    request: SignedRequest


class BatchLeases:
    """Leases batches to the replica `lessee`. All methods raise one of `DATABASE_ERRORS`."""

    def __init__(self, connection: QueryConnection, lessee: str) -> None:
        self._connection = connection
        self._lessee = lessee

    async def connect(self) -> None:
        """Connect to the database, unless there is a connection."""
        await self._connection.connect()

    async def work(self) -> tuple[int, Mapping[Partition, float]]:
        """The number of all partitions, and those with something to do, with the seconds until each may be leased."""
        ((number, consumers, parts, waits),) = await self._connection.fetch(_WORK)
        return number, dict(zip(zip(consumers, parts, strict=True), waits, strict=True))

    async def lease(
        self, partition: Partition, seconds: float, max_messages: int, max_bytes: int
    ) -> LeasedBatch | None:
        """Lease a partition, and return its batch. None if there is no batch, or if another replica has the lease."""
        consumer, part = partition
        ((turn, name, made, failures, url, secrets, *columns),) = await self._connection.fetch(
            _LEASE, consumer, part, self._lessee, seconds, max_messages, max_bytes
        )
        if turn is None:
            return None
        seqs, channels, payloads, times, senders = columns
        messages = [*map(DeliveredMessage, seqs, channels, payloads, times, senders)]
        body = encode_messages(consumer, part, made, messages)
        return LeasedBatch(partition, turn, len(messages), failures, SignedRequest(name, url, body, secrets))

    async def settle(self, batch: LeasedBatch, verdict: Verdict, error: str) -> bool:
        """End a lease. Returns False if it was not valid any more: then nothing has changed."""
        consumer, part = batch.partition
        ((valid,),) = await self._connection.fetch(
            _SETTLE, consumer, part, batch.lease, verdict.action.value, verdict.delay, verdict.take, verdict.counted,
            error,
        )  # fmt: skip
        return bool(valid)
