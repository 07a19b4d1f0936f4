"""The figures of one replica's delivery."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeliveryStatistics:
    """`live` and `lagging`: subscriptions. `patterns`: distinct patterns of all of them.

    `lag`: the largest lag, in messages. `lags`: times that a live subscription began to lag. `sweeps`: pages read for
    lagging subscriptions. `held`: bytes in all send queues. `withdrawals`: times that a send queue dropped messages to
    stay within the budget. `delivered`: messages taken from send queues to be sent, once for each subscription.
    """

    position: int
    live: int
    lagging: int
    patterns: int
    lag: int
    lags: int
    sweeps: int
    held: int
    withdrawals: int
    delivered: int
