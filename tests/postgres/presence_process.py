"""A replica of its own process, for a test that kills it: it joins channels, and says when all is written.

python -m tests.postgres.presence_process DATABASE_URL CLIENT_ID...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import trio

from catbus.config import DatabaseSettings
from catbus.postgres import PostgresLog
from tests.log.harness import RecordingFollower


async def join(url: str, client_ids: Sequence[str]) -> None:
    log = PostgresLog(DatabaseSettings(url=url))
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run, RecordingFollower())
        for session, client_id in enumerate(client_ids):
            log.presence.join(session, "room.a", client_id, None)
        await log.presence.flush()
        print("written", flush=True)


trio.run(join, sys.argv[1], sys.argv[2:])
