"""The lag of consumers as replicas measure it for metrics."""

from __future__ import annotations

from pathlib import Path

from catbus.postgres.maintenance.consumer_lags import MAX_NAMED, OTHERS, ConsumerLag, ConsumerLags, collect
from tests.postgres.consumers import create, fill, publish, receive, retain
from tests.postgres.sql import open_sql, wait_until
from tests.test_metrics import Found, scrape, serving

_READS = """
SELECT sum(seq_scan)::bigint, sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint
FROM pg_stat_xact_user_tables WHERE schemaname = 'catbus' AND relname LIKE 'entries%'
"""


async def test_lag_gaps_and_dead_letters_are_measured(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        for name in ("a", "b"):
            await create(sql, name, "a.*", partitions=3)
        await create(sql, "c")
        await publish(sql, "a.x", "b.x", "a.y")
        await sql.execute("BEGIN")
        assert await receive(sql) == [1, 3]
        await sql.fetch("SELECT catbus.reject('c', 3)")
        await sql.execute("COMMIT")
        lags = ConsumerLags()
        await lags.measure_if_due(sql)
        assert lags.consumers["c"] == ConsumerLag(messages=0, seconds=0.0, gaps=0, dead_letters=1)
        behind = lags.consumers["a"]
        assert (behind.messages, behind.gaps, behind.dead_letters) == (3, 0, 0)
        assert 0 < behind.seconds < 3600
        await sql.fetch("SELECT catbus.skip_gap('a')")
        await retain(sql)
        await retain(sql)
        await lags.measure_if_due(sql)
        assert lags.consumers["a"].gaps == 0, "it is measured only when it is due"
        later = ConsumerLags()
        await later.measure_if_due(sql)
        assert (later.consumers["a"].gaps, later.consumers["c"].gaps) == (3, 0)


async def test_measuring_does_not_scan_the_log(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await fill(sql, 5000)
        for name, start in (("a", "floor"), ("b", "2500"), ("c", "head")):
            await create(sql, name, start=start, partitions=2)
        await sql.execute("BEGIN")
        lags = ConsumerLags()
        await lags.measure_if_due(sql)
        scans, rows = await sql.fetchrow(_READS)
        await sql.execute("ROLLBACK")
        assert [lag.messages for lag in lags.consumers.values()] == [5000, 2500, 0]
        assert scans == 0
        assert rows < 100


def test_consumers_beyond_the_limit_are_measured_together() -> None:
    measured = [(f"c{number:04}", ConsumerLag(number, number / 2, 1, 2)) for number in range(MAX_NAMED + 3)]
    found = collect(reversed(measured))
    assert list(found) == [name for name, _ in measured[:MAX_NAMED]] + [OTHERS]
    assert found[OTHERS] == ConsumerLag(MAX_NAMED + 2, (MAX_NAMED + 2) / 2, 3, 6)
    assert collect(measured[:MAX_NAMED]) == dict(measured[:MAX_NAMED])


async def test_metrics_name_consumers_and_say_that_one_holds_retention(database_url: str, tmp_path: Path) -> None:
    samples: Found = {}
    async with open_sql(database_url) as sql:
        await create(sql, hold=True)
        await fill(sql, 10)
        await sql.execute("UPDATE catbus.head SET slot = 1")
        async with serving(tmp_path, database_url) as (_, address, _, _):

            async def measured() -> bool:
                samples.update((await scrape(address))[0])
                return "catbus_consumer_lag_messages" in samples and samples["catbus_retention_held"] == {(): 1}

            await wait_until(measured)
            assert samples["catbus_consumer_lag_messages"] == {("c",): 10}
            assert samples["catbus_consumer_lag_seconds"][("c",)] > 1_000_000
            assert samples["catbus_consumer_gaps"] == samples["catbus_consumer_dead_letters"] == {("c",): 0}
            await receive(sql)

            async def released() -> bool:
                samples.update((await scrape(address))[0])
                return samples["catbus_retention_held"] == {(): 0}

            await wait_until(released)
