"""Writers that change two tables, and readers that read a snapshot and then follow the changes.

One table has a feed. The changes of the other one are published by the transactions that make them. A reader pauses at
any point between its steps, often until more changes are in the log. When the writers have stopped, each reader's state
must be that of the tables.
"""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import trio

import catbus
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, DatabaseConnection
from tests.postgres.sql import open_sql

WRITERS = 3
KEYS = 12
"""Rows of a table, so that every row changes often, and is often missing."""
PATIENCE = 120.0
"""Seconds within which the readers of a round have everything."""
PREPARE = """
CREATE TABLE public.watched (id integer PRIMARY KEY, value integer);
CREATE TABLE public.published (id integer PRIMARY KEY, value integer);
SELECT catbus.watch('public.watched', 'rows.watched.{id}');
"""
PUT = {
    "watched": "INSERT INTO public.watched VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET value = excluded.value",
    "published": """
        WITH changed AS (
            INSERT INTO public.published VALUES ($1, $2)
            ON CONFLICT (id) DO UPDATE SET value = excluded.value RETURNING *
        )
        SELECT catbus.publish('rows.published.' || id,
                              json_build_object('operation', 'update', 'row', row_to_json(changed)))
        FROM changed
    """,
}
DELETE = {
    "watched": "DELETE FROM public.watched WHERE id = $1",
    "published": """
        WITH gone AS (DELETE FROM public.published WHERE id = $1 RETURNING *)
        SELECT catbus.publish('rows.published.' || id,
                              json_build_object('operation', 'delete', 'row', row_to_json(gone)))
        FROM gone
    """,
}
POSITION = "SELECT epoch, head FROM catbus.position()"
ROWS = """
SELECT 'watched', id, value FROM public.watched UNION ALL SELECT 'published', id, value FROM public.published
"""

State = dict[tuple[str, int], int]
Fault = Callable[[], Awaitable[None]]


class Outdated(Exception):
    """The state has to be read again."""


@dataclass
class Report:
    """What happened in all rounds. `wrong` has the states that differ from the tables."""

    times: int = 0
    commits: int = 0
    messages: int = 0
    paused: int = 0
    """Snapshots between whose steps the log got more messages."""
    again: int = 0
    """Snapshots that were read again after a gap, or in another epoch."""
    wrong: list[str] = field(default_factory=list)


@dataclass
class Round:
    """The writers and readers of one round, on the database at `url()`. A `mistake` is made by all readers."""

    url: Callable[[], str]
    report: Report
    number: int
    mistake: str = ""
    stopping: bool = False
    began: int = 0
    """Readers that have read their first snapshot."""
    states: list[State] = field(default_factory=list)
    """The states of the readers that have finished."""

    async def write(self, rng: random.Random) -> None:
        """Change rows in transactions, of which some are rolled back."""
        while not self.stopping:
            with suppress(*DATABASE_ERRORS):
                async with open_sql(self.url()) as sql:
                    while not self.stopping:
                        await sql.execute("BEGIN")
                        for _ in range(rng.randint(1, 3)):
                            table, number = rng.choice([*PUT]), rng.randrange(KEYS)
                            if rng.random() < 0.3:
                                await sql.fetch(DELETE[table], number)
                            else:
                                await sql.fetch(PUT[table], number, rng.randrange(10**6))
                        await sql.execute("ROLLBACK" if rng.random() < 0.1 else "COMMIT")
                        self.report.commits += 1
                        await trio.sleep(rng.uniform(0, 0.02))
            await trio.sleep(0.02)

    async def read(self, address: str, token: str, rng: random.Random) -> None:
        """Read a snapshot, follow the changes until the round has ended, and keep the state."""
        first = True

        async with catbus.connect(address, token=token, persist=True) as bus:
            while True:
                with suppress(Outdated, *DATABASE_ERRORS):
                    if not first:
                        self.report.again += 1
                    epoch, head, state = await self._snapshot(rng)
                    self.began += first
                    first = False
                    await self._follow(bus, epoch, head, state)
                    self.states.append(state)
                    return
                await trio.sleep(0.02)

    async def _follow(self, bus: catbus.Bus, epoch: str, head: int, state: State) -> None:
        def check(event: object) -> None:
            if isinstance(event, catbus.Gap) or messages.epoch != epoch:
                raise Outdated

        on_event = None if self.mistake == "any epoch" else check
        async with bus.subscribe("rows.*", since=head, epoch=epoch, on_event=on_event) as messages:
            async for message in messages:
                _, table, number = message.channel.split(".")
                if table == "end":
                    if message.payload == self.number:
                        return
                    continue
                self.report.messages += 1
                if message.payload["operation"] == "delete":
                    state.pop((table, int(number)), None)
                else:
                    state[table, int(number)] = message.payload["row"]["value"]

    async def _snapshot(self, rng: random.Random) -> tuple[str, int, State]:
        """Read position and tables, at any isolation level. The mistake is not one in REPEATABLE READ."""
        levels = ["READ COMMITTED"] if self.mistake else ["READ COMMITTED", "REPEATABLE READ"]
        async with open_sql(self.url()) as sql, open_sql(self.url()) as other:
            await sql.execute(f"BEGIN ISOLATION LEVEL {rng.choice(levels)}")
            if self.mistake == "tables first":
                rows = await sql.fetch(ROWS)
                await self._pause(other, rng)
                epoch, head = await sql.fetchrow(POSITION)
            else:
                epoch, head = await sql.fetchrow(POSITION)
                await self._pause(other, rng)
                rows = await sql.fetch(ROWS)
            await sql.execute("COMMIT")
            await self._pause(other, rng)
        return epoch, head, {(table, number): value for table, number, value in rows}

    async def _pause(self, sql: DatabaseConnection, rng: random.Random) -> None:
        """Do nothing, or wait until the log has more messages."""
        if rng.random() < 0.4:
            return
        before = await sql.fetchrow(POSITION)
        with trio.move_on_after(3):
            while not self.stopping and await sql.fetchrow(POSITION) == before:
                await trio.sleep(0.005)
            self.report.paused += 1

    async def final_state(self) -> State:
        """The tables, when the writers have stopped."""
        while True:
            with suppress(*DATABASE_ERRORS):
                async with open_sql(self.url()) as sql:
                    return {(table, number): value for table, number, value in await sql.fetch(ROWS)}
            await trio.sleep(0.1)

    async def end(self) -> None:
        """Publish that the round has ended. A reader may miss it between two snapshots, so publish it again."""
        with suppress(*DATABASE_ERRORS):
            async with open_sql(self.url()) as sql:
                await sql.fetch("SELECT catbus.publish('rows.end.0', to_json($1::integer))", self.number)


async def play(
    url: Callable[[], str], addresses: Sequence[str], token: str, report: Report, rng: random.Random,
    *, number: int, readers: int, mistake: str = "", fault: Fault | None = None,
) -> None:  # fmt: skip
    """Play one round with so many readers, and with a fault while they follow. Adds to the report.

    Raises `trio.TooSlowError` if a reader does not get there.
    """
    this = Round(url, report, number, mistake)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as writers:
                for _ in range(WRITERS):
                    writers.start_soon(this.write, random.Random(rng.random()))
                for _ in range(readers):
                    nursery.start_soon(this.read, rng.choice(addresses), token, random.Random(rng.random()))
                while this.began < readers // 2:
                    await trio.sleep(0.01)
                if fault is not None:
                    await fault()
                while this.began < readers:
                    await trio.sleep(0.01)
                this.stopping = True
            final = await this.final_state()
            while len(this.states) < readers:
                await this.end()
                with trio.move_on_after(0.3):
                    while len(this.states) < readers:
                        await trio.sleep(0.01)
    report.times += readers
    report.wrong += [_difference(state, final) for state in this.states if state != final]


def _difference(state: State, final: State) -> str:
    return json.dumps(
        {
            f"{table}.{number}": [state.get((table, number)), final.get((table, number))]
            for table, number in sorted(state.keys() | final.keys())
            if state.get((table, number)) != final.get((table, number))
        }
    )
