"""Random cases on a real PostgreSQL.

CATBUS_SECONDS   for how long
CATBUS_SEED      to play the cases of a run again
"""

from __future__ import annotations

import os
from random import Random
from typing import Any

import pytest
import trio

from catbus.postgres import outbox_relay
from catbus.postgres.access import reconnecting_tasks

from .case_runner import PromiseBroken, random_case
from .postgres_runner import connected, play
from .simulated_runner import silence_loggers

SECONDS = float(os.environ.get("CATBUS_SECONDS", "6"))


async def test_random_cases_keep_every_promise(
    database_url: str, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    silence_loggers(monkeypatch)
    monkeypatch.setattr(reconnecting_tasks, "LONGEST_DELAY", 0.1)
    monkeypatch.setattr(outbox_relay, "POLL_INTERVAL", 0.05)
    seed = int(os.environ.get("CATBUS_SEED") or Random().randrange(1 << 32))
    source, number, episodes = Random(seed), 0, 0
    async with connected(database_url) as (sql, locking, proxies):
        end = trio.current_time() + SECONDS
        while trio.current_time() < end:
            case = random_case(source)
            number += 1
            try:
                episodes += await play(case, sql, locking, proxies)
            except PromiseBroken as broken:
                pytest.fail(f"CATBUS_SEED={seed}, case {number}: {case}\n{broken}")
    record_property("episodes", episodes)
    print(f"{number} cases of {episodes} episodes")
