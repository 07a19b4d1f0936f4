"""Tests of the retained messages of each implementation of `Log`. A test class inherits them and defines `make_log`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import strategies as st

from catbus.error_codes import ErrorCode
from catbus.log import Append, Committed, Entry, Log, Outcome, Rejected, conflict
from catbus.protocol.channels import matches
from tests.log.conformance import ALICE, MakeLog
from tests.log.harness import Publisher, read_all, running

CHANNELS = ("a", "a.b", "a.b.c", "a-b", "Z", "b")
PATTERNS = ("*", "a", "a.*", "a.b", "b.*")
PAYLOADS = (b"null", b"1", b'"two"')


class Step(NamedTuple):
    """A publish. `expect`: none, 0, the retained seq from before the batch, or another one. `retry`: instead of a new
    message, an earlier one is sent again, if there is one."""

    channel: str
    payload: bytes
    retain: bool
    expect: str
    retry: int | None


class Script(NamedTuple):
    """Batches, of which some are published before the snapshot, and one between each two of its pages."""

    before: Sequence[Sequence[Step]]
    between: Sequence[Sequence[Step]]
    pattern: str


steps = st.builds(
    Step,
    st.sampled_from(CHANNELS),
    st.sampled_from(PAYLOADS),
    st.sampled_from([True, True, True, False]),
    st.sampled_from(["none", "none", "0", "present", "present", "wrong"]),
    st.none() | st.integers(0, 50),
)
batches = st.lists(st.lists(steps, max_size=8), max_size=4)
scripts = st.builds(Script, batches, batches, st.sampled_from(PATTERNS))


def fold(entries: Iterable[Entry], state: dict[str, Entry] | None = None) -> dict[str, Entry]:
    """The retained messages after these entries, as a client makes them of the messages that it receives."""
    held = {} if state is None else dict(state)
    for entry in entries:
        if entry.retain:
            held.pop(entry.channel, None)
            if entry.payload != b"null":
                held[entry.channel] = entry
    return held


def matching(state: dict[str, Entry], pattern: str) -> list[Entry]:
    return [state[channel] for channel in sorted(state) if matches(pattern, channel)]


async def read_retained(log: Log, pattern: str, rows: int = 1000, size: int = 1 << 20) -> list[Entry]:
    """All retained messages that match, up to the position of the log, page by page."""
    until, after, entries = log.applied, None, list[Entry]()
    while True:
        page = await log.retained(pattern, after=after, until=until, rows=rows, size=size)
        entries += page.entries
        if page.complete:
            return entries
        assert page.last is not None
        assert after is None or page.last > after, "a page made no progress"
        after = page.last


@dataclass
class RetainedModel:
    """A dict of the retained messages, and the outcome that each publish must have."""

    next: int
    held: dict[str, int]
    committed: dict[int, int] = field(default_factory=dict)
    sent: list[Append] = field(default_factory=list)
    expected: dict[Append, Outcome] = field(default_factory=dict)

    def submit(self, publisher: Publisher, batch: Sequence[Step]) -> None:
        before = dict(self.held)
        for step in batch:
            if step.retry is not None and self.sent:
                original = self.sent[step.retry % len(self.sent)]
                append = publisher.submit(
                    original.channel,
                    original.payload,
                    producer=original.producer,
                    number=original.number,
                    after=0,
                    retain=original.retain,
                    expect=original.expect,
                )
            else:
                present = before.get(step.channel, 0)
                expect = {"none": None, "0": 0, "present": present, "wrong": present + 1}[step.expect]
                append = publisher.submit(
                    step.channel,
                    step.payload,
                    producer=ALICE,
                    number=self.next * 1000 + len(self.sent),
                    retain=step.retain,
                    expect=expect if step.retain else None,
                )
                self.sent.append(append)
            self.expected[append] = self._decide(append)

    def _decide(self, append: Append) -> Outcome:
        if append.number in self.committed:
            return Committed(self.committed[append.number], duplicate=True)
        held = self.held.get(append.channel, 0)
        if append.expect not in (None, held):
            return conflict(held)
        seq, self.next = self.next, self.next + 1
        if append.retain:
            self.held[append.channel] = 0 if append.payload == b"null" else seq
        self.committed[append.number] = seq
        return Committed(seq)


async def check_script(log: Log, script: Script) -> None:
    """Every outcome is that of the model, and a snapshot with the later messages is the state of all messages."""
    async with running(log) as (_, publisher):
        start = await read_all(log, log.floor - 1)
        model = RetainedModel(log.applied + 1, {c: e.seq for c, e in fold(start).items()})
        for batch in script.before:
            model.submit(publisher, batch)
            await publisher.wait()
        until, after = log.applied, None
        snapshot = list[Entry]()
        between = iter(script.between)
        while True:
            page = await log.retained(script.pattern, after=after, until=until, rows=2)
            assert len(page.entries) <= 2
            assert all(entry.seq <= until for entry in page.entries)
            snapshot += page.entries
            if page.complete:
                break
            after = page.last
            model.submit(publisher, next(between, ()))
            await publisher.wait()
        for batch in between:
            model.submit(publisher, batch)
        await publisher.wait()
        assert publisher.outcomes == model.expected
        entries = await read_all(log, log.floor - 1)
        state = fold(entries)
        assert snapshot == sorted(snapshot, key=lambda entry: entry.channel)
        later = fold([entry for entry in entries if entry.seq > until], {e.channel: e for e in snapshot})
        assert matching(later, script.pattern) == matching(state, script.pattern)
        assert await read_retained(log, script.pattern, rows=2) == matching(state, script.pattern)
        assert await read_retained(log, script.pattern, size=1) == matching(state, script.pattern)
        assert {channel: seq for channel, seq in model.held.items() if seq} == {c: e.seq for c, e in state.items()}


def code(outcome: Outcome) -> ErrorCode | None:
    return outcome.code if isinstance(outcome, Rejected) else None


class RetainedConformance:
    """Tests of the retained messages of a log."""

    async def test_newest_retained_message_of_a_channel_is_read(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (follower, publisher):
            await publisher.publish_seq("a", b"1", retain=True)
            await publisher.publish_seq("a", b"2", retain=True, sender="alice")
            await publisher.publish_seq("a", b"3")
            await publisher.publish_seq("b", b"4", retain=True)
            await publisher.publish_seq("c", b"5", retain=True)
            await publisher.publish_seq("c", b"null", retain=True)
            await publisher.publish_seq("d", b"null", retain=True)
            await follower.wait_for(7)
            assert [entry.retain for entry in follower.entries] == [True, True, False, True, True, True, True]
            assert await read_all(log) == follower.entries
            assert (await log.history("a", before=None, limit=9))[0] == follower.entries[:3]
            expected = [follower.entries[1], follower.entries[3]]
            assert await read_retained(log, "*") == expected
            assert await read_retained(log, "a") == expected[:1]
            assert await read_retained(log, "c") == []

    async def test_page_has_no_retained_message_above_its_position(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            for channel in ("a", "b", "c", "a", "d"):
                await publisher.publish_seq(channel, b"1", retain=True)
            page = await log.retained("*", after=None, until=3, rows=2)
            assert ([e.channel for e in page.entries], page.last, page.complete) == (["b"], "b", False)
            page = await log.retained("*", after="b", until=3, rows=2)
            assert ([e.channel for e in page.entries], page.last, page.complete) == (["c"], "d", True)
            page = await log.retained("*", after="d", until=3, rows=2)
            assert (list(page.entries), page.complete) == ([], True)
            page = await log.retained("*", after=None, until=0, rows=9)
            assert (list(page.entries), page.last, page.complete) == ([], "d", True)

    async def test_page_with_newer_messages_leaves_out_none(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            for channel in ("a", "b", "c", "a", "d"):
                await publisher.publish_seq(channel, b"1", retain=True)
            page = await log.retained("*", after=None, until=3, rows=2, newer=True)
            assert ([(e.channel, e.seq) for e in page.entries], page.complete) == ([("a", 4), ("b", 2)], False)
            page = await log.retained("*", after=page.last, until=3, rows=2, newer=True)
            assert ([(e.channel, e.seq) for e in page.entries], page.complete) == ([("c", 3), ("d", 5)], True)

    async def test_page_ends_after_its_bytes_but_has_at_least_one_message(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            await publisher.publish_seq("a", b"1", retain=True)
            for channel in ("b", "c", "d"):
                await publisher.publish_seq(channel, b'"%b"' % (b"x" * 97), retain=True)
            await publisher.publish_seq("a", b"2", retain=True)
            for size, channels in ((200, ["b", "c"]), (199, ["b"]), (1, ["b"])):
                page = await log.retained("*", after=None, until=4, size=size)
                assert ([e.channel for e in page.entries], page.complete) == (channels, False), size

    async def test_message_is_published_only_over_the_retained_message_that_it_expects(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (follower, publisher):
            assert await publisher.publish("a", b"1", retain=True, expect=7) == conflict(0)
            assert await publisher.publish("a", b"1", retain=True, expect=0) == Committed(1)
            assert await publisher.publish("a", b"2", retain=True, expect=0) == conflict(1)
            await publisher.publish_seq("a", b"3")
            assert await publisher.publish("a", b"4", retain=True, expect=1) == Committed(3)
            assert await publisher.publish("a", b"null", retain=True, expect=1) == conflict(3)
            assert await publisher.publish("a", b"null", retain=True, expect=3) == Committed(4)
            assert await publisher.publish("a", b"5", retain=True, expect=4) == conflict(0)
            assert await publisher.publish("a", b"6", retain=True, expect=0) == Committed(5)
            await follower.wait_for(5)
            assert follower.texts == ["1", "3", "4", "null", "6"]

    async def test_of_two_publishes_with_the_same_condition_one_succeeds(self, make_log: MakeLog) -> None:
        async with running(make_log()) as (_, publisher):
            for n in range(20):
                present = await publisher.publish_seq("a", b"%d" % n, retain=True)
                rivals = [publisher.submit("a", b'"%d"' % i, retain=True, expect=present) for i in range(5)]
                first, *others = await publisher.wait(*rivals)
                assert first == Committed(present + 1)
                assert others == [conflict(present + 1)] * 4

    async def test_retry_of_a_conditional_publish_is_a_duplicate_whatever_it_expects(self, make_log: MakeLog) -> None:
        async with running(make_log()) as (_, publisher):

            async def publish(payload: bytes, number: int, expect: int | None, after: int | None = None) -> Outcome:
                return await publisher.publish(
                    "a", payload, producer=ALICE, number=number, retain=True, expect=expect, after=after
                )

            assert await publish(b"1", 1, 0) == Committed(1)
            assert await publish(b"1", 1, 0, after=0) == Committed(1, duplicate=True)
            assert await publish(b"2", 2, 1) == Committed(2)
            # Its effect is superseded by now.
            assert await publish(b"1", 1, 0, after=0) == Committed(1, duplicate=True)
            assert await publish(b"3", 3, 1) == conflict(2)
            # A conflict leaves nothing behind: a retry is decided anew.
            assert await publish(b"null", 4, 2) == Committed(3)
            assert await publish(b"3", 3, 1, after=0) == conflict(0)
            assert await publish(b"3", 3, 0, after=0) == Committed(4)
            assert code(await publish(b"4", 3, 4, after=0)) is ErrorCode.BAD_MESSAGE

    async def test_erased_channel_has_no_retained_message(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (follower, publisher):
            for n, (channel, sender) in enumerate((("a.x", "alice"), ("a.x", "bob"), ("a.y", "alice"), ("b", "alice"))):
                await publisher.publish_seq(channel, b"%d" % n, sender=sender, retain=True)
            assert await log.erase("a.*", sender="alice") == 2
            # The newest message of a.x is of another sender; the one of a.y is gone.
            assert [(e.channel, e.payload) for e in await read_retained(log, "*")] == [("a.x", b"1"), ("b", b"3")]
            assert await log.erase("a.x") == 1
            assert await read_retained(log, "a.*") == []
            assert await publisher.publish("a.x", b"5", retain=True, expect=0) == Committed(5)
            # After an erasure, the log may have to read a message that it has published.
            await follower.wait_for(5)
            assert [entry.seq for entry in await read_retained(log, "*")] == [5, 4]
