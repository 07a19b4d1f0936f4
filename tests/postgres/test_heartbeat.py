"""Heartbeats: every replica knows all replicas and their reports."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import trio

from catbus.cli.commands.status import SILENCE_SHOWN_AFTER
from catbus.client import connect
from catbus.config import DatabaseSettings
from catbus.log import Committed
from catbus.postgres import PostgresLog
from catbus.postgres.maintenance.heartbeat import Heartbeat
from tests.log.harness import running
from tests.postgres.processes import Replica, open_replicas, token
from tests.postgres.sql import open_sql


async def status(replica: Replica, *options: str) -> str:
    command = [sys.executable, "-m", "catbus", "status", "--url", replica.url, "--token", token("operator"), *options]
    done = await trio.run_process(command, capture_stdout=True)
    return done.stdout.decode()


async def test_status_of_one_replica_lists_all_replicas(database_url: str) -> None:
    with trio.fail_after(60):
        async with open_replicas(database_url, 2) as (one, other):
            async with connect(one.url, token=token("a")) as bus:
                await bus.publish("a", 1)
            async with connect(other.url, token=token("b")):
                report: dict[str, Any] = {}
                while [r.get("clients") for r in report.get("log", {}).get("replicas", ())] != [0, 1]:
                    report = json.loads(await status(one, "--json"))
                text = await status(one)
            assert (report["ready"], report["head"]) == (True, 1)
            mine, theirs = report["log"]["replicas"]
            assert mine["pid"] == report["pid"] != theirs["pid"]
            assert mine["silent"] <= theirs["silent"] < SILENCE_SHOWN_AFTER
            assert {r["state"] for r in (mine, theirs)} == {"ready"}
    assert re.search(rf"^  \S+:{mine['pid']} +ready +0 +[01] ", text, re.MULTILINE)
    assert re.search(rf"^  \S+:{theirs['pid']} +ready +1 +[01] ", text, re.MULTILINE)
    assert "\n  follows    by notifications, lag: 0 messages\n" in text


async def test_replica_without_a_heartbeat_for_a_minute_is_forgotten(database_url: str) -> None:
    log = PostgresLog(DatabaseSettings(url=database_url))
    async with running(log) as (_, publisher), open_sql(database_url) as sql:
        assert await publisher.publish("a", b"1") == Committed(1)
        one, other = Heartbeat(), Heartbeat()
        await one.send(sql, lambda: {"name": "one"})
        await other.send(sql, lambda: {"name": "other"})
        assert {"one", "other"} <= {r.report.get("name") for r in other.replicas}
        assert other.replicas[0].id == other.id
        await sql.execute(
            f"UPDATE catbus.replicas SET last_heartbeat = last_heartbeat - interval '50 seconds' WHERE id = '{one.id}'"
        )
        third = Heartbeat()
        await third.send(sql, dict)
        assert [round(r.age) for r in third.replicas if r.id == one.id] == [50]
        await sql.execute(
            f"UPDATE catbus.replicas SET last_heartbeat = last_heartbeat - interval '11 seconds' WHERE id = '{one.id}'"
        )
        fourth = Heartbeat()
        await fourth.send(sql, dict)
        assert one.id not in {r.id for r in fourth.replicas}
        assert other.id in {r.id for r in fourth.replicas}


async def test_heartbeat_is_sent_once_per_interval(database_url: str) -> None:
    log = PostgresLog(DatabaseSettings(url=database_url))
    described = 0

    def describe() -> dict[str, object]:
        nonlocal described
        described += 1
        return {}

    async with running(log) as (_, publisher), open_sql(database_url) as sql:
        assert await publisher.publish("a", b"1") == Committed(1)
        heartbeat = Heartbeat()
        for _ in range(10):
            await heartbeat.send(sql, describe)
    assert described == 1


async def test_report_of_another_release_does_no_harm(database_url: str) -> None:
    log = PostgresLog(DatabaseSettings(url=database_url))
    async with running(log) as (_, publisher), open_sql(database_url) as sql:
        assert await publisher.publish("a", b"1") == Committed(1)
        for name, report in (("x", "not JSON"), ("y", "[1]"), ("z", '{"clients":"many"}')):
            await sql.execute(f"INSERT INTO catbus.replicas VALUES ('{name}', clock_timestamp(), '{report}')")
        heartbeat = Heartbeat()
        await heartbeat.send(sql, dict)
        found = {r.id: r.report for r in heartbeat.replicas}
        assert (found["x"], found["y"], found["z"]) == ({}, {}, {"clients": "many"})
