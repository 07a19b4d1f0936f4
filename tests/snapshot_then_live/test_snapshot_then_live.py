"""A short form of `python -m tests.snapshot_then_live`, without failovers, and the mistake that it must find."""

from __future__ import annotations

import random

import msgspec

from catbus.config import DatabaseSettings
from tests.brokers import CONFIG, TOKEN, running
from tests.postgres.sql import open_sql

from .follow import PREPARE, Report, play


async def play_rounds(url: str, rounds: int, mistake: str = "") -> Report:
    report, rng = Report(), random.Random(24)
    async with open_sql(url) as sql:
        await sql.execute(PREPARE)
    async with running(msgspec.structs.replace(CONFIG, database=DatabaseSettings(url=url))) as (_, address):
        for number in range(1, rounds + 1):
            await play(
                lambda: url, [f"ws://{address}/ws"], TOKEN, report, rng, number=number, readers=6, mistake=mistake
            )
    return report


async def test_state_of_each_reader_is_that_of_the_tables(database_url: str) -> None:
    report = await play_rounds(database_url, 3)
    assert report.wrong == []
    assert report.times == 18
    assert report.paused > 3
    assert report.messages > 20


async def test_reader_that_reads_the_tables_first_is_found(database_url: str) -> None:
    report = await play_rounds(database_url, 1, "tables first")
    assert report.wrong != []
