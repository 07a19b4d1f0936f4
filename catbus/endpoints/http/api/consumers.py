"""`/api/consumers`: the consumers of the broker, their dead letters, and what administrators can do with them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from ....delivery.page_size import MAX_PAGE_BYTES
from ....error_codes import ErrorCode
from ....errors import PeerError
from ....log.consumers import ConsumerReport, Consumers, DeadLetter, SkippedRange
from ....protocol import wire_messages as wire
from ...replica_interface import ReplicaInterface
from ..http_request import HttpRequest
from ..query import convert_parameters, parse_query, parse_query_as
from .administrator import Limit, for_administrators

S = TypeVar("S", bound=Struct)

_NAME = r"^[A-Za-z0-9_.-]{1,64}$"

ConsumerName = Annotated[str, Meta(pattern=_NAME, description="The name of the consumer.")]
Seq = Annotated[int, Meta(ge=0, le=wire.MAX_NUMBER)]
Time = Annotated[int, Meta(description="In milliseconds since 1970.")]


class ConsumersQuery(Struct):
    """The parameters of `GET /api/consumers`."""

    limit: Limit = 100
    after: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{0,64}$", description="The `next` of the page before.")] = ""


class ConsumerPath(Struct):
    """The consumer that a request is about."""

    name: ConsumerName


class PartitionDetails(Struct):
    """The position of a partition of a consumer."""

    partition: int
    cursor: Annotated[int, Meta(description="It has received all of its messages up to this seq.")]
    lag: Annotated[int, Meta(description="Messages of all channels between the cursor and the head.")]
    lag_seconds: Annotated[float, Meta(description="The age of the oldest of them; 0 if there is none.")]
    moved: Annotated[Time, Meta(description="When the cursor moved last, in milliseconds since 1970.")]
    gap: Annotated[bool, Meta(description="Messages behind the cursor were removed, so that receiving is an error.")]
    dead_letters: int


class ConsumerDetails(Struct):
    """A consumer, with its partitions. Its own figures are the largest ones of a partition, or their sums."""

    consumer: str
    pattern: str
    owner: Annotated[str, Meta(description="The database role that may use it.")]
    hold: Annotated[bool, Meta(description="Retention waits for it, up to the maximum size of the log.")]
    lag: int
    lag_seconds: float
    gap: bool
    dead_letters: int
    partitions: list[PartitionDetails]


class ConsumersPage(Struct):
    """A page of consumers, in the order of their names."""

    consumers: list[ConsumerDetails]
    next: Annotated[str | None, Meta(description="The `after` of the next page; null on the last one.")] = None


class DeadLettersQuery(Struct):
    """The parameters of `GET /api/consumers/{name}/dead`."""

    limit: Limit = 100
    after: Annotated[Seq, Meta(description="The `next` of the page before.")] = 0


class RejectedMessage(Struct):
    """A message that was rejected."""

    seq: int
    at: Annotated[Time, Meta(description="When it was committed, in milliseconds since 1970.")]
    channel: str
    payload: Raw
    sender: str | None
    reason: str | None
    rejected: Annotated[Time, Meta(description="When it was rejected, in milliseconds since 1970.")]


class DeadLettersPage(Struct):
    """A page of dead letters, in the order of their seqs. It has about 1 MiB at most."""

    letters: list[RejectedMessage]
    next: Annotated[int | None, Meta(description="The `after` of the next page; null on the last one.")] = None


class ResetRequest(Struct):
    """The position to which a consumer is moved."""

    start: Annotated[
        str,
        Meta(
            pattern=r"^(head|floor|gap|[0-9]{1,18})$",
            description="`head`: only later messages. `floor`: all that exist. A seq: those after it. `gap`: go on "
            "behind messages that were removed before it received them.",
        ),
    ]


class SkippedMessages(Struct):
    """Messages, from the first to the last, that a partition never receives."""

    partition: int
    first: int
    last: int


class ResetReport(Struct):
    """Where a consumer is now, and with `gap` what it has missed."""

    consumer: ConsumerDetails
    skipped: list[SkippedMessages]


class LettersRequest(Struct):
    """The dead letters that a request is about."""

    seqs: Annotated[list[Seq], Meta(min_length=1, max_length=1000)]


class LettersReport(Struct):
    """The dead letters that there were, and that are deleted now."""

    consumer: str
    seqs: list[int]


class DroppedConsumer(Struct):
    """A consumer that was deleted."""

    consumer: str


def _consumers_of(replica: ReplicaInterface) -> Consumers:
    if replica.consumers is None:
        raise PeerError(
            ErrorCode.NOT_FOUND, "this broker has no consumers: its log is in memory, and they are in a database"
        )
    return replica.consumers


def _name_of(request: HttpRequest) -> str:
    parse_query(request.query, {})
    return convert_parameters(request.parameters, ConsumerPath).name


async def _body_of(request: HttpRequest, kind: type[S]) -> S:
    body = await request.read()
    try:
        return msgspec.json.decode(body, type=kind)
    except wire.UNDECODABLE as error:
        raise wire.decoding_error(error) from None


async def _list(replica: ReplicaInterface, request: HttpRequest) -> ConsumersPage:
    query = parse_query_as(request.query, ConsumersQuery)
    reports = await _consumers_of(replica).reports(after=query.after, most=query.limit + 1)
    page = reports[: query.limit]
    return ConsumersPage([_details(report) for report in page], page[-1].name if len(reports) > query.limit else None)


async def _show(replica: ReplicaInterface, request: HttpRequest) -> ConsumerDetails:
    name = _name_of(request)
    return _details(await _consumers_of(replica).report(name))


async def _reset(replica: ReplicaInterface, request: HttpRequest) -> ResetReport:
    name = _name_of(request)
    consumers, start = _consumers_of(replica), (await _body_of(request, ResetRequest)).start
    skipped: Sequence[SkippedRange] = ()
    if start == "gap":
        skipped = await consumers.skip_gap(name)
    else:
        await consumers.reset(name, start)
    report = await consumers.report(name)
    return ResetReport(_details(report), [SkippedMessages(each.partition, each.first, each.last) for each in skipped])


async def _drop(replica: ReplicaInterface, request: HttpRequest) -> DroppedConsumer:
    name = _name_of(request)
    await _consumers_of(replica).drop(name)
    return DroppedConsumer(name)


async def _list_dead(replica: ReplicaInterface, request: HttpRequest) -> DeadLettersPage:
    name = convert_parameters(request.parameters, ConsumerPath).name
    query = parse_query_as(request.query, DeadLettersQuery)
    consumers, delivery, version = _consumers_of(replica), replica.delivery, -1
    await consumers.report(name)
    # A page that was read before an erasure may contain what was erased.
    while version != delivery.page_version:
        version = delivery.page_version
        letters, more = await consumers.dead_letters(name, after=query.after, rows=query.limit, size=MAX_PAGE_BYTES)
    return DeadLettersPage([_rejected(letter) for letter in letters], letters[-1].seq if more else None)


async def _delete_dead(replica: ReplicaInterface, request: HttpRequest) -> LettersReport:
    name = _name_of(request)
    consumers, seqs = _consumers_of(replica), (await _body_of(request, LettersRequest)).seqs
    await consumers.report(name)
    return LettersReport(name, await consumers.delete_dead_letters(name, seqs))


async def _publish_dead(replica: ReplicaInterface, request: HttpRequest) -> LettersReport:
    name = _name_of(request)
    consumers, seqs = _consumers_of(replica), (await _body_of(request, LettersRequest)).seqs
    await consumers.report(name)
    return LettersReport(name, await consumers.publish_dead_letters(name, seqs))


def _details(report: ConsumerReport) -> ConsumerDetails:
    partitions = [
        PartitionDetails(
            each.partition,
            each.cursor,
            each.lag,
            round(each.lag_seconds, 3),
            _milliseconds(each.moved),
            each.gap,
            each.dead_letters,
        )
        for each in report.partitions
    ]
    return ConsumerDetails(
        report.name,
        report.pattern,
        report.owner,
        report.hold,
        report.lag,
        round(report.lag_seconds, 3),
        report.gap,
        report.dead_letters,
        partitions,
    )


def _rejected(letter: DeadLetter) -> RejectedMessage:
    return RejectedMessage(
        letter.seq,
        _milliseconds(letter.at),
        letter.channel,
        Raw(letter.payload.encode()),
        letter.sender,
        letter.reason,
        _milliseconds(letter.rejected),
    )


def _milliseconds(time: datetime) -> int:
    return round(time.timestamp() * 1000)


list_consumers = for_administrators(_list)
show_consumer = for_administrators(_show)
reset_consumer = for_administrators(_reset)
drop_consumer = for_administrators(_drop)
list_dead_letters = for_administrators(_list_dead, messages=True)
delete_dead_letters = for_administrators(_delete_dead)
publish_dead_letters = for_administrators(_publish_dead)
