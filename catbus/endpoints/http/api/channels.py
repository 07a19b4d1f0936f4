"""`GET /api/channels`: the busiest channels of this replica, and its subscriptions by pattern."""

from __future__ import annotations

from time import perf_counter
from typing import Annotated

import trio
from msgspec import Meta, Struct

from ...replica_interface import ReplicaInterface
from ..http_request import HttpRequest
from ..query import parse_query_as
from .administrator import Limit, ReplicaName, for_administrators, name_of


class ChannelsQuery(Struct):
    """The parameters of `GET /api/channels`."""

    limit: Limit = 100


class ChannelReport(Struct):
    """A channel with many messages."""

    channel: str
    messages: Annotated[int, Meta(ge=0, description="Messages in `seconds`, too low by `missed` at most.")]
    subscriptions: Annotated[int, Meta(ge=0, description="Subscriptions of this replica that match it.")]


class PatternReport(Struct):
    """A pattern with many subscriptions."""

    pattern: str
    subscriptions: Annotated[int, Meta(ge=0, description="Its subscriptions on this replica.")]
    lagging: Annotated[int, Meta(ge=0, description="How many of them lag.")]


class ChannelsReport(Struct):
    """The channels and the patterns of this replica, the busiest first."""

    replica: ReplicaName
    seconds: Annotated[float, Meta(ge=0, description="The time in which messages were counted: about a minute.")]
    messages: Annotated[int, Meta(ge=0, description="Messages in all channels in that time, ephemeral ones included.")]
    missed: Annotated[
        int, Meta(ge=0, description="What a count may be too low by, and what a channel that is not listed may have.")
    ]
    channels: list[ChannelReport]
    patterns: list[PatternReport]


async def _answer(replica: ReplicaInterface, request: HttpRequest) -> ChannelsReport:
    limit = parse_query_as(request.query, ChannelsQuery).limit
    delivery = replica.delivery
    counts = delivery.channel_rates.report(trio.current_time(), limit)
    return ChannelsReport(
        replica=name_of(replica),
        seconds=round(counts.seconds, 3),
        messages=counts.total,
        missed=counts.missed,
        channels=[ChannelReport(name, number, delivery.trees.count_matches(name)) for name, number in counts.channels],
        patterns=await _most_subscribed(replica, limit),
    )


async def _most_subscribed(replica: ReplicaInterface, limit: int) -> list[PatternReport]:
    """Return the patterns with the most subscriptions.

    Keeps twice as many as are wanted, and lets other tasks run when this request has used the CPU for a slice.
    """
    scheduler = replica.cpu_scheduler
    found: dict[str, PatternReport] = {}
    began = perf_counter()
    for pattern, live, lagging in replica.delivery.trees.count_by_pattern():
        if live + lagging:
            found[pattern] = PatternReport(pattern, live + lagging, lagging)
        if len(found) > 2 * limit:
            found = {each.pattern: each for each in _largest(found, limit)}
        if perf_counter() - began > scheduler.slices.peer:
            await scheduler.yield_cpu()
            began = perf_counter()
    return _largest(found, limit)


def _largest(found: dict[str, PatternReport], limit: int) -> list[PatternReport]:
    return sorted(found.values(), key=lambda each: (-each.subscriptions, each.pattern))[:limit]


list_channels = for_administrators(_answer)
