"""Tests of every implementation of `Log`. A test class inherits them and defines the fixture `make_log`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
import trio

from catbus.error_codes import ErrorCode
from catbus.log import EPHEMERAL_SIZE, Append, Committed, Entry, Log, Rejected, erased
from tests.log.harness import TEST_TIMEOUT, Publisher, RecordingFollower, read_all, running, wait_read

MakeLog = Callable[..., Log]
"""Makes a log from the optional arguments `recent` (bytes in memory) and `pending` (messages that may wait)."""

ALICE = b"alice-----------"
BOB = b"bob-------------"


class ReadConformance:
    """Tests of pages and of history, for logs and for readers of logs."""

    async def test_page_ends_at_its_number_of_rows(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            for n in range(25):
                publisher.submit("a", b"%d" % n)
            await publisher.wait()
            page = await log.read(3, rows=10)
            assert (page.after, page.last, [entry.seq for entry in page.entries]) == (3, 13, list(range(4, 14)))
            assert len(await read_all(log, rows=7)) == 25

    async def test_page_ends_at_its_number_of_bytes_but_has_at_least_one_message(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            for n in range(5):
                publisher.submit("a", b"%d" % n * 99)
            await publisher.wait()
            assert [e.seq for e in (await log.read(0, size=300)).entries] == [1, 2, 3]
            assert [e.seq for e in (await log.read(0, size=299)).entries] == [1, 2]
            assert [e.seq for e in (await log.read(2, size=10)).entries] == [3]

    async def test_page_at_the_head_is_empty(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            for after in (0, 5):
                page = await log.read(after)
                assert (page.after, page.last, list(page.entries)) == (after, after, [])
            await publisher.publish_seq("a", b"1")
            page = await log.read(1)
            assert (page.after, page.last, list(page.entries)) == (1, 1, [])

    async def test_cancelled_read_has_no_effect(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            await publisher.publish_seq("a", b"1")
            for _ in range(3):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await log.read(0)
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await log.history("a", before=None, limit=1)
            assert (await log.read(0)).last == 1
            await log.history("a", before=None, limit=1)

    async def test_history_has_the_newest_matching_messages_oldest_first(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            for channel in ("a", "a.b", "a.b.c", "a-b", "ab", "b", "a.b"):
                publisher.submit(channel, b"1")
            await publisher.wait()

            async def found(pattern: str, before: int | None = None, limit: int = 10) -> tuple[list[int], bool]:
                entries, more = await log.history(pattern, before=before, limit=limit)
                return [entry.seq for entry in entries], more

            assert await found("*") == ([1, 2, 3, 4, 5, 6, 7], False)
            assert await found("*", limit=3) == ([5, 6, 7], True)
            assert await found("a") == ([1], False)
            assert await found("a.b") == ([2, 7], False)
            assert await found("a.*") == ([2, 3, 7], False)
            assert await found("a.*", limit=2) == ([3, 7], True)
            assert await found("a.*", before=7) == ([2, 3], False)
            assert await found("a.*", before=3, limit=1) == ([2], False)
            assert await found("a.b.*") == ([3], False)
            assert await found("c.*") == ([], False)
            assert await found("*", before=1) == ([], False)
            assert await found("*", before=99, limit=7) == ([1, 2, 3, 4, 5, 6, 7], False)

    async def test_history_of_all_channels_leaves_out_reserved_ones(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            for channel in ("_a.b", "a", "_", "a._b", "_a.c", "-", "_a.b"):
                publisher.submit(channel, b"1")
            await publisher.wait()

            async def found(pattern: str, limit: int = 10) -> tuple[list[int], bool]:
                entries, more = await log.history(pattern, before=None, limit=limit)
                return [entry.seq for entry in entries], more

            assert await found("*") == ([2, 4, 6], False)
            assert await found("*", limit=2) == ([4, 6], True)
            assert await found("_a.*") == ([1, 5, 7], False)
            assert await found("_") == ([3], False)

    async def test_history_treats_no_character_of_a_channel_as_a_wildcard(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            for channel in ("my_project.x", "my-project.x", "myXproject.x", "My_project.x"):
                publisher.submit(channel, b"1")
            await publisher.wait()
            entries, _ = await log.history("my_project.*", before=None, limit=10)
            assert [entry.channel for entry in entries] == ["my_project.x"]

    async def test_erased_message_keeps_its_seq_and_its_time_and_nothing_else(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (follower, publisher):
            for channel, sender in (("e.x", "alice"), ("e.y", "bob"), ("f", "alice"), ("e.z", "alice")):
                await publisher.publish_seq(channel, b"1", sender=sender)
            before = await read_all(log)
            assert await log.erase("e.*", sender="alice") == 2
            await wait_read(log, [erased(before[0]), *before[1:3], erased(before[3])])
            assert erased(before[0]) == Entry(1, before[0].at, "_erased", b"null")
            for pattern, seqs in (("*", [2, 3]), ("e.*", [2]), ("e.x", []), ("f", [3])):
                entries, more = await log.history(pattern, before=None, limit=2)
                assert ([entry.seq for entry in entries], more) == (seqs, False), pattern
            assert await log.erase("e.*", sender="alice") == 0
            assert await log.erase("*", before=before[0].at) == 0
            assert await log.erase("*", before=before[3].at + 1) == 2
            await wait_read(log, [*map(erased, before)])
            # Now the newest messages are erased, and the log goes on.
            assert await publisher.publish_seq("e.x", b"5") == 5
            await follower.wait_for(5)
            assert len(follower.restarts) == 1


class LogConformance(ReadConformance):
    """Tests of a whole log."""

    async def test_messages_get_consecutive_seqs_and_reach_the_follower_in_order(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (follower, publisher):

            async def publish(name: str) -> None:
                seqs = [await publisher.publish_seq(f"a.{name}", b'{"n": %d}' % n) for n in range(20)]
                assert seqs == sorted(seqs)

            async with trio.open_nursery() as nursery:
                for name in "abcdefgh":
                    nursery.start_soon(publish, name)
            await follower.wait_for(160)
            assert [entry.seq for entry in follower.entries] == list(range(1, 161))
            for append, outcome in publisher.outcomes.items():
                assert isinstance(outcome, Committed)
                entry = follower.entries[outcome.seq - 1]
                assert (entry.channel, entry.payload) == (append.channel, append.payload)
                assert not outcome.duplicate
            assert all(a.at <= b.at for a, b in pairwise(follower.entries))
            assert log.applied == 160

    async def test_messages_submitted_together_keep_their_order(self, make_log: MakeLog) -> None:
        async with running(make_log()) as (follower, publisher):
            for n in range(2500):
                publisher.submit("a", b"%d" % n)
            outcomes = await publisher.wait()
            assert [outcome.seq for outcome in outcomes if isinstance(outcome, Committed)] == list(range(1, 2501))
            assert follower.texts == [str(n) for n in range(2500)]

    async def test_message_is_applied_before_it_is_acknowledged(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (follower, publisher):
            for n in range(50):
                seq = await publisher.publish_seq("a", b"%d" % n)
                assert log.applied >= seq
                assert follower.entries[-1].seq >= seq

    async def test_message_is_stored_byte_for_byte(self, make_log: MakeLog) -> None:
        log = make_log()
        payload = '{ "text":"snow ☃ 𝄞 \\u0000 \\n" ,  "n":1.0e+400}'.encode()
        async with running(log) as (follower, publisher):
            await publisher.publish_seq("a.b-c_D.0", payload, sender='o"brien\n☃', origin=ALICE)
            await publisher.publish_seq("a", b"null")
            await follower.wait_for(2)
            (full, bare), read = follower.entries, await read_all(log)
            assert (full.channel, full.payload, full.sender, full.origin) == ("a.b-c_D.0", payload, 'o"brien\n☃', ALICE)
            assert (bare.channel, bare.payload, bare.sender, bare.origin) == ("a", b"null", None, None)
            assert read == follower.entries

    async def test_payload_with_a_line_break_affects_no_other_message(self, make_log: MakeLog) -> None:
        async with running(make_log()) as (follower, publisher):
            for payload in (b"1", b"[1,\n2]", b"3"):
                publisher.submit("a", payload)
            await publisher.wait()
            assert follower.texts == ["1", "[1,\n2]", "3"]

    # Idempotent publishing

    async def test_key_is_in_the_log_once(self, make_log: MakeLog) -> None:
        async with running(make_log()) as (follower, publisher):
            first = await publisher.publish_seq("a", b"1", producer=ALICE, number=7)
            again = await publisher.publish("a", b"1", producer=ALICE, number=7, after=0)
            other = await publisher.publish("a", b"1", producer=BOB, number=7)
            assert again == Committed(first, duplicate=True)
            assert other == Committed(first + 1)
            await follower.wait_for(2)
            assert len(follower.entries) == 2

    async def test_retry_of_an_erased_publish_is_a_duplicate(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (follower, publisher):
            seq = await publisher.publish_seq("a.b", b"1", producer=ALICE, number=1)
            assert await log.erase("a.b") == 1
            await follower.wait_until(lambda self: self.erased == {seq})
            for payload in (b"1", b"2"):
                retry = await publisher.publish("a.b", payload, producer=ALICE, number=1, after=0)
                assert retry == Committed(seq, duplicate=True)
            assert await publisher.publish_seq("a.b", b"1", producer=ALICE, number=2) == seq + 1

    async def test_key_submitted_twice_at_once_is_in_the_log_once(self, make_log: MakeLog) -> None:
        async with running(make_log()) as (follower, publisher):
            for _ in range(3):
                publisher.submit("a", b"1", producer=ALICE, number=1)
                publisher.submit("b", b"2")
            outcomes = await publisher.wait()
            assert outcomes[0] == Committed(1)
            assert outcomes[2] == outcomes[4] == Committed(1, duplicate=True)
            assert follower.texts == ["1", "2", "2", "2"]

    @pytest.mark.parametrize(("channel", "payload"), [("a", b"2"), ("b", b"1")])
    async def test_key_with_another_message_is_rejected(self, make_log: MakeLog, channel: str, payload: bytes) -> None:
        async with running(make_log()) as (follower, publisher):
            await publisher.publish_seq("a", b"1", producer=ALICE, number=1)
            publisher.submit("n", b"1")
            conflict = publisher.submit(channel, payload, producer=ALICE, number=1)
            publisher.submit("n", b"2")
            outcomes = await publisher.wait()
            rejected = publisher.outcomes[conflict]
            assert isinstance(rejected, Rejected)
            assert rejected.code == ErrorCode.BAD_MESSAGE
            assert [type(outcome) for outcome in outcomes].count(Committed) == 3
            assert follower.texts == ["1", "1", "2"]

    async def test_retries_among_new_messages_agree_with_a_model(self, make_log: MakeLog) -> None:
        random = Random(20)
        async with running(make_log()) as (follower, publisher):
            known: dict[tuple[bytes, int], tuple[str, bytes, int]] = {}
            for _ in range(30):
                sent = []
                for _ in range(random.randrange(1, 40)):
                    key = random.choice([ALICE, BOB]), random.randrange(60)
                    message = random.choice(["a", "b"]), b"%d" % random.randrange(2)
                    sent.append((key, message, publisher.submit(*message, producer=key[0], number=key[1], after=0)))
                await publisher.wait()
                for key, message, append in sent:
                    outcome = publisher.outcomes[append]
                    if key not in known:
                        assert isinstance(outcome, Committed)
                        assert not outcome.duplicate
                        assert outcome.seq == len(known) + 1
                        known[key] = (*message, outcome.seq)
                    elif known[key][:2] == message:
                        assert outcome == Committed(known[key][2], duplicate=True)
                    else:
                        assert isinstance(outcome, Rejected)
            await follower.wait_for(len(known))
            assert [(e.channel, e.payload, e.seq) for e in follower.entries] == list(known.values())

    # Ephemeral messages

    async def test_ephemeral_message_is_not_in_the_log(self, make_log: MakeLog) -> None:
        log = make_log()
        big = b'"%b"' % (b"x" * (EPHEMERAL_SIZE - 100))
        log.broadcast(Entry(0, 1, "a", b"0"))
        async with running(log) as (follower, publisher):
            for n in range(1, 6):
                for payload in (b"%d" % n, big):
                    log.broadcast(Entry(0, 1, "a", payload, "alice", ALICE))
                assert await publisher.publish_seq("a", b"%d" % n) == n
            await follower.wait_for(5)
            assert follower.texts == ["1", "2", "3", "4", "5"]
            assert await read_all(log) == follower.entries
            assert follower.messages == [], "the replica that broadcasts delivers the message itself"
            assert log.available
        log.broadcast(Entry(0, 1, "a", b"6"))

    # Epochs

    async def test_cursor_of_this_epoch_resumes_where_it_was(self, make_log: MakeLog) -> None:
        log = make_log()
        assert log.epoch == ""
        async with running(log) as (_, publisher):
            await publisher.publish_seq("a", b"1")
            assert log.epoch
            for epoch in (None, log.epoch):
                resumption = log.resume(1, epoch)
                assert (resumption.cursor, resumption.lost) == (1, None)

    async def test_cursor_of_an_unknown_epoch_may_miss_everything(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            await publisher.publish_seq("a", b"1")
            resumption = log.resume(1, "of-another-log")
            assert (resumption.cursor, resumption.lost) == (0, "epoch")

    # Start, withdrawal and stop

    async def test_message_submitted_before_the_start_is_appended(self, make_log: MakeLog) -> None:
        log = make_log()
        publisher = Publisher(log)
        early = publisher.submit("a", b"1")
        async with running(log) as (follower, _):
            assert await publisher.wait(early) == [Committed(1)]
            await follower.wait_for(1)

    async def test_message_withdrawn_in_time_is_not_appended(self, make_log: MakeLog) -> None:
        log = make_log()
        publisher = Publisher(log)
        mine, other = publisher.submit("a", b"1"), publisher.submit("b", b"2")
        retry = publisher.submit("a", b"3", producer=ALICE, number=1, after=0)
        rejection = Rejected(ErrorCode.UNAUTHORIZED, "not any more")
        log.withdraw(None, lambda append: append.channel == "a", rejection)
        assert publisher.outcomes[mine] == rejection
        # Its first attempt may be in the log.
        unknown = publisher.outcomes[retry]
        assert isinstance(unknown, Rejected)
        assert unknown.code == ErrorCode.UNKNOWN
        async with running(log) as (follower, _):
            assert await publisher.wait(other) == [Committed(1)]
            await follower.wait_for(1)
            assert follower.texts == ["2"]

    async def test_withdrawal_leaves_messages_of_other_clients_alone(self, make_log: MakeLog) -> None:
        log = make_log()
        publisher = Publisher(log)
        mine, other = (publisher.submit("a", b"1", client=client) for client in ("mine", "other"))
        visited: list[Append] = []
        log.withdraw(
            "mine", lambda append: visited.append(append) is None, Rejected(ErrorCode.UNAUTHORIZED, "not any more")
        )
        assert visited == [mine]
        async with running(log):
            assert await publisher.wait(other) == [Committed(1)]

    async def test_stopped_log_rejects_for_good(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            await publisher.publish_seq("a", b"1")
        assert not log.available
        after_stop = publisher.submit("a", b"2")
        rejected = publisher.outcomes[after_stop]
        assert isinstance(rejected, Rejected)
        assert rejected.code == ErrorCode.SHUTTING_DOWN

    async def test_stopped_log_does_not_deny_a_retry(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (_, publisher):
            await publisher.publish_seq("a", b"1", producer=ALICE, number=1)
        retry = publisher.submit("a", b"1", producer=ALICE, number=1, after=0)
        outcome = publisher.outcomes[retry]
        assert isinstance(outcome, Rejected)
        assert outcome.code == ErrorCode.UNKNOWN

    async def test_stop_settles_every_publish(self, make_log: MakeLog) -> None:
        log = make_log()
        recorder, publisher = RecordingFollower(), Publisher(log)
        async with trio.open_nursery() as nursery:
            await nursery.start(log.run, recorder)
            await log.wait_open()
            for n in range(3000):
                publisher.submit("a", b"%d" % n)
            await publisher.wait(publisher.submitted[0])
            nursery.cancel_scope.cancel()
        outcomes = [publisher.outcomes[append] for append in publisher.submitted]
        committed = [outcome for outcome in outcomes if isinstance(outcome, Committed)]
        rejected = [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
        assert outcomes == [*committed, *rejected]
        assert {outcome.code for outcome in rejected} <= {ErrorCode.SHUTTING_DOWN}
        assert len(recorder.entries) == len(committed)

    async def test_full_log_rejects_at_once(self, make_log: MakeLog) -> None:
        log = make_log(pending=20)  # One client may use half of it.
        async with running(log) as (_, publisher):
            for n in range(15):
                publisher.submit("a", b"%d" % n)
            assert len(publisher.outcomes) == 5
            for append in publisher.submitted[10:]:
                rejected = publisher.outcomes[append]
                assert isinstance(rejected, Rejected)
                assert rejected.code == ErrorCode.OVERLOADED
            with trio.fail_after(TEST_TIMEOUT):
                outcomes = await publisher.wait()
            assert [type(outcome) for outcome in outcomes] == [Committed] * 10 + [Rejected] * 5
            await publisher.publish_seq("a", b"again")

    async def test_callback_of_a_publish_may_publish(self, make_log: MakeLog) -> None:
        log = make_log()
        async with running(log) as (follower, publisher):
            settle = publisher._settle

            def settle_and_publish(append: object, outcome: object) -> None:
                settle(append, outcome)  # type: ignore[arg-type]
                if len(publisher.submitted) < 30:
                    publisher.submit("a", b"%d" % len(publisher.submitted))

            publisher._settle = settle_and_publish  # type: ignore[method-assign]
            publisher.submit("a", b"0")
            await follower.wait_for(30)
            assert follower.texts == [str(n) for n in range(30)]
