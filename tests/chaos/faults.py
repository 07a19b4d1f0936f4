"""The faults of a chaos run, drawn from a seed: a table with what each fault does and how it is undone."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

import trio

from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS
from tests.postgres.sql import open_sql

from .database_pair import DatabasePair, is_root
from .history import FaultBegan, FaultEnded, History, RoleChanged, now
from .replica_slots import ReplicaSlot

DATABASE_RESOURCE = "the database"
"""What a fault of the database affects. A fault of a replica affects that replica's name."""


@dataclass
class FaultContext:
    """What faults act on."""

    history: History
    slots: list[ReplicaSlot]
    database: DatabasePair
    rng: random.Random
    in_flight: Callable[[], int]
    role_change_lock: trio.Lock
    """Held while a role changes, and during a failover, which must not lose the change."""


FaultAction = Callable[[FaultContext, ReplicaSlot, float], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """A fault: `do` injects it, waits, and undoes it. `reach` says what it affects."""

    do: FaultAction
    reach: str = "replica"
    """"replica", "database", or "all"."""
    longest: float = 3.0
    database_only: bool = False
    """Whether no client may lose its connection because of it."""


async def kill_replica(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    slot.kill()
    await slot.wait_down()
    await trio.sleep(seconds)
    slot.start()
    await slot.wait_ready()


async def stop_replica(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    if slot.replica is not None:
        slot.replica.pause()
        await trio.sleep(seconds)
        slot.replica.resume()


async def restart_replica(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    slot.terminate()
    await slot.wait_down()
    slot.start()
    await slot.wait_ready()


async def rolling_restart(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    for each in context.slots:
        await restart_replica(context, each, seconds)


async def kill_database(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    await context.database.kill()
    await trio.sleep(seconds)
    await context.database.serve()


async def kill_backend(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    """Kill one backend. PostgreSQL then ends all others and recovers."""
    with suppress(*DATABASE_ERRORS):
        for (pid,) in (await backends(context))[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    await context.database.serve()


async def end_backends(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    with suppress(*DATABASE_ERRORS):
        pids = [pid for (pid,) in await backends(context)]
        await context.database.fetch("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", pids[:3])


async def backends(context: FaultContext) -> list[tuple[int]]:
    found = await context.database.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND query LIKE '%catbus.%' ORDER BY pid"
    )
    pids = [(int(pid),) for (pid,) in found]
    context.rng.shuffle(pids)
    return pids


async def restart_database(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    await context.database.stop()
    await context.database.serve()


async def stop_database(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    context.database.primary.pause()
    await trio.sleep(seconds)
    context.database.primary.resume()


async def end_listener(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    slot.database_proxies[-1].cut()


async def block_listener_replies(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    slot.database_proxies[-1].block_answers()
    await trio.sleep(seconds)
    slot.database_proxies[-1].unblock()


async def lose_answers(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    """Statements are executed, and their replies are lost."""
    slot.database.block_answers()
    await trio.sleep(seconds)
    slot.database.cut()
    slot.database.unblock()


async def cut_database(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    for path in slot.database_proxies:
        path.block()
    await trio.sleep(seconds)
    for path in slot.database_proxies:
        path.unblock()


async def cut_clients(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    slot.cut_clients()
    await trio.sleep(seconds)
    slot.unblock_clients()


async def block_replica_replies(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    """Messages are published, and their replies are lost."""
    slot.block_replies()
    await trio.sleep(seconds)
    slot.websocket.cut()
    slot.unblock_clients()


async def lose_datagrams(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    slot.webtransport.loss = context.rng.uniform(0.05, 0.3)
    await trio.sleep(seconds)
    slot.webtransport.loss = 0.0


async def reset_clients(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    slot.websocket.cut()
    slot.webtransport.forget()


async def fill_disk(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    await trio.to_thread.run_sync(context.database.fill)
    await trio.sleep(seconds)
    context.database.clear()
    await context.database.serve()


async def fail_over(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    async with context.role_change_lock:
        await context.database.fail_over(min(seconds, 1.0))


async def kill_pooler(context: FaultContext, slot: ReplicaSlot, seconds: float) -> None:
    bouncer = context.slots[-1].bouncer
    assert bouncer is not None
    bouncer.kill()
    await trio.sleep(seconds)
    await bouncer.restart()


FAULTS: Mapping[str, Fault] = {
    "replica killed": Fault(kill_replica),
    "replica stopped": Fault(stop_replica, longest=5.0),
    "replica restarted": Fault(restart_replica),
    "rolling restart": Fault(rolling_restart, reach="all"),
    "network cut": Fault(cut_clients, longest=5.0),
    "answers to clients lost": Fault(block_replica_replies, longest=4.0),
    "network lossy": Fault(lose_datagrams, longest=5.0),
    "connections reset": Fault(reset_clients),
    "database killed": Fault(kill_database, reach="database", database_only=True),
    "database backend killed": Fault(kill_backend, reach="database", database_only=True),
    "database connections ended": Fault(end_backends, reach="database", database_only=True),
    "database restarted": Fault(restart_database, reach="database", database_only=True),
    "database stopped": Fault(stop_database, reach="database", longest=6.0, database_only=True),
    "database failed over": Fault(fail_over, reach="database", database_only=True),
    "database cut off": Fault(cut_database, longest=6.0, database_only=True),
    "answers of the database lost": Fault(lose_answers, longest=5.0, database_only=True),
    "listener cut": Fault(end_listener, database_only=True),
    "listener silent": Fault(block_listener_replies, longest=6.0, database_only=True),
    "pooler killed": Fault(kill_pooler, reach="database", database_only=True),
    "disk full": Fault(fill_disk, reach="database", database_only=True),
}


NO_FAULTS = "nothing"
"""A value for `only`: no faults, only changes of roles."""


class FaultSchedule:
    """Injects faults one after the other in parallel tracks, with pauses without any fault."""

    def __init__(self, context: FaultContext, seed: int, only: str | None = None) -> None:
        """With `only`, injects faults of that kind, one at a time; with NO_FAULTS, none."""
        self.done = 0
        self._context = context
        self._seed = seed
        self._fault_names = [kind for kind in FAULTS if kind != "disk full" or is_root()] if only is None else [only]
        self._tracks = 2 if only is None else int(only != NO_FAULTS)
        self._numbers = count(1)
        self._affected: set[str] = set()

    async def run(self, ended: trio.Event) -> None:
        """Run until `ended` is set and everything injected by then is undone."""
        sources = [random.Random(f"{self._seed}-{track}") for track in range(self._tracks)]
        while not ended.is_set():
            async with trio.open_nursery() as nursery:
                for source in sources:
                    nursery.start_soon(self._inject_faults, source, ended)
            with trio.move_on_after(14 if self._tracks > 1 else 4):
                await ended.wait()

    async def _inject_faults(self, source: random.Random, ended: trio.Event) -> None:
        for _ in range(4 if self._tracks > 1 else 1):
            kind, slot, seconds = self._draw(source)
            number = next(self._numbers)
            history = self._context.history
            replica = slot.name if FAULTS[kind].reach == "replica" else ""
            affected = self._affected_resources(kind, slot)
            self._affected |= affected
            history.add(
                FaultBegan(at=now(), number=number, kind=kind, replica=replica, in_flight=self._context.in_flight())
            )
            await FAULTS[kind].do(self._context, slot, seconds)
            history.add(FaultEnded(at=now(), number=number))
            self._affected -= affected
            self.done += 1
            with trio.move_on_after(source.uniform(0.5, 2.5)):
                await ended.wait()
            if ended.is_set():
                return

    def _draw(self, source: random.Random) -> tuple[str, ReplicaSlot, float]:
        """Draw the next fault that affects nothing that another track affects."""
        while True:
            kind, slot = source.choice(self._fault_names), source.choice(self._context.slots)
            seconds = source.uniform(0.2, FAULTS[kind].longest)
            if not self._affected_resources(kind, slot) & self._affected:
                return kind, slot, seconds

    def _affected_resources(self, kind: str, slot: ReplicaSlot) -> set[str]:
        everybody = {each.name for each in self._context.slots}
        return {"replica": {slot.name}, "database": {DATABASE_RESOURCE}, "all": everybody}[FAULTS[kind].reach]


async def change_roles(
    context: FaultContext, keys: Mapping[str, bytes], ended: trio.Event, seed: int, pause: float
) -> int:
    """Withdraw and restore permissions of the roles, one after another, until `ended`. Then restore all."""
    source = random.Random(f"{seed}-roles")
    allowed = {role: {"read", "write"} for role in keys}
    changes = 0
    while True:
        if ended.is_set():
            wanted = {role: {"read", "write"} for role in keys if allowed[role] != {"read", "write"}}
            if not wanted:
                return changes
            role = next(iter(wanted))
            allowed[role] = {"read", "write"}
        else:
            role = source.choice(list(keys))
            allowed[role] ^= {source.choice(["read", "write"])}
        async with context.role_change_lock:
            await _set_role_grants(context, role, keys[role], allowed[role])
        changes += 1
        if not ended.is_set():
            with trio.move_on_after(source.uniform(0.5, 1.5) * pause):
                await ended.wait()


async def _set_role_grants(context: FaultContext, role: str, key: bytes, allowed: set[str]) -> None:
    """Set a role's permissions, with as many attempts as it takes."""
    began = now()
    while True:
        with suppress(*DATABASE_ERRORS):
            async with open_sql(context.database.url) as sql:
                await sql.fetch(
                    "WITH gone AS (DELETE FROM catbus.role_grants WHERE role = $1 AND NOT permission = ANY ($2)) "
                    "INSERT INTO catbus.role_grants (role, permission, pattern) "
                    "SELECT $1, permission, $3 FROM unnest($2::text[]) AS permission ON CONFLICT DO NOTHING",
                    key,
                    sorted(allowed),
                    f"{role}.*",
                )
            pattern = (f"{role}.*",)
            context.history.add(
                RoleChanged(
                    at=now(),
                    role=role,
                    began=began,
                    read=pattern if "read" in allowed else (),
                    write=pattern if "write" in allowed else (),
                )
            )
            return
        await trio.sleep(0.1)
