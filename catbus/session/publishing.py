"""Publishing: from sessions, HTTP requests and this process into the log, or past it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from functools import partial

import trio

from ..auth.grants import Identity
from ..delivery.fan_out import Delivery
from ..error_codes import ErrorCode
from ..errors import PeerError
from ..limits.cpu_scheduler import CpuScheduler
from ..limits.publish_rate import PublishRateLimits
from ..log import Append, Entry, Log, Outcome, Rejected, rejection_of
from ..protocol.wire_messages import Publish
from .appends import conflict_as_unknown, make_append
from .effects import BroadcastMessage
from .hooks import ClientInfo, Hooks

STOPPING = "the replica is stopping"

CHECKPOINT_EVERY = 100
"""Messages of one request that are submitted before other tasks run."""


class Publisher:
    """Submits messages to the log, and ephemeral messages to the sessions of all replicas."""

    def __init__(
        self,
        log: Log,
        delivery: Delivery,
        publish_rates: PublishRateLimits,
        cpu_scheduler: CpuScheduler,
        hooks: Hooks,
    ) -> None:
        self.published = 0
        """Publishes received so far, whatever their outcome."""
        self._log = log
        self._delivery = delivery
        self._publish_rates = publish_rates
        self._cpu_scheduler = cpu_scheduler
        self._hooks = hooks
        self._closed = False

    def close(self) -> None:
        """Reject all further publishes, because the replica is stopping."""
        self._closed = True

    def submit(self, append: Append, epoch: str | None = None) -> None:
        """Append to the log. A retry from another `epoch` is rejected as `unknown`, as nothing can be known of it."""
        self.published += 1
        if self._closed:
            append.settle(append, rejection_of(append, Rejected(ErrorCode.SHUTTING_DOWN, STOPPING)))
        elif epoch is not None and epoch != self._log.epoch:
            append.settle(append, Rejected(ErrorCode.UNKNOWN, "first sent in another epoch of the log"))
        else:
            self._log.submit(append)

    def broadcast(self, message: BroadcastMessage) -> None:
        """Pass an ephemeral message on to the sessions of this replica and to the other replicas."""
        self.published += 1
        at = time.time_ns() // 1_000_000
        entry = Entry(0, at, message.channel, message.payload, message.sender, message.origin)
        self._delivery.broadcast(entry)
        self._log.broadcast(entry)

    async def publish(
        self,
        identity: Identity,
        requests: Sequence[Publish],
        producer: bytes = b"",
        client: Hashable = None,
        *,
        source: ClientInfo | None = None,
        charged: bool = True,
    ) -> list[Outcome | None]:
        """Publish without a session. Returns the outcomes in the order of the requests, None for ephemeral ones.

        With `producer`, the same requests may be published again: each is recognised by its place. Requests with the
        same `client`, or client_id, share a publish rate and a part of the log, unless they are not `charged`. With
        `source`, the hook `on_publish` is called for one request after the other. Raises `PeerError` when the rate is
        exceeded. Cancelling it leaves open which messages are committed.
        """
        payer = (identity.client_id or client) if charged else None
        if payer is not None:
            self._charge(payer, identity, requests)
        outcomes: dict[int, Outcome | None] = {}
        done = trio.Event()

        def settle(index: int, _: Append, outcome: Outcome) -> None:
            outcomes[index] = outcome
            if len(outcomes) == len(requests):
                done.set()

        for index, request in enumerate(requests):
            if index % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
                await self._cpu_scheduler.yield_cpu()
            request.id, request.retry = index, False
            try:
                append = make_append(request, identity, producer, partial(settle, index), payer)
                if source is not None and await self._hooks.check_publish(request, source):
                    replaced = conflict_as_unknown(partial(settle, index))
                    append = make_append(request, identity, producer, replaced, payer)
            except PeerError as error:
                outcomes[index] = Rejected(error.code, error.message)
                continue
            if request.ephemeral:
                self.broadcast(BroadcastMessage(append.channel, append.payload, append.sender, None))
                outcomes[index] = None
            else:
                self.submit(append)
        if len(outcomes) < len(requests):
            await done.wait()
        return [outcomes[index] for index in range(len(requests))]

    def _charge(self, payer: Hashable, identity: Identity, requests: Sequence[Publish]) -> None:
        """Charge a client's publish rate. Raises `PeerError` when it is exceeded."""
        now = trio.current_time()
        publish_rate = self._publish_rates.get(payer, now, identity.publish_rate, identity.publish_bytes)
        if (wait := publish_rate.spend(0, 0, now)) > 0:
            raise PeerError(
                ErrorCode.RATE_LIMITED, "the client publishes too much (limits.publish_rate)", retry_after=wait
            )
        publish_rate.spend(len(requests), sum(len(bytes(request.payload)) for request in requests), now)
