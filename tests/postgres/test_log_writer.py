"""Batches that the log writer builds, without a database."""

from __future__ import annotations

import trio

from catbus.log import Append, RecentMessages
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.postgres.append.log_writer import LogWriter
from catbus.postgres.follow.log_tail import LogTail
from tests.log.harness import RecordingFollower


async def never() -> DatabaseConnection:
    await trio.sleep_forever()
    raise AssertionError


async def test_batch_keeps_the_position_known_when_its_messages_came() -> None:
    tail = LogTail(RecentMessages(0))
    tail.follow(RecordingFollower())
    tail.restart("e", 3, 1)
    writer = LogWriter(never, tail, lambda: None)
    writer.submit(Append("a", b"1", lambda _, __: None))
    # These entries may include a retry of it by another replica.
    tail.announce(9)
    writer.submit(Append("a", b"2", lambda _, __: None))
    batch = writer._take_queued()
    assert batch is not None
    assert batch.after == 3


async def test_publish_before_the_log_is_open_gets_its_first_position() -> None:
    tail = LogTail(RecentMessages(0))
    tail.follow(RecordingFollower())
    writer = LogWriter(never, tail, lambda: None)
    writer.submit(Append("a", b"1", lambda _, __: None))
    tail.restart("e", 9, 8)
    batch = writer._take_queued()
    assert batch is not None
    assert batch.after == 9
