"""What goes wrong in a chaos run, drawn from a seed: a table of faults, each with what it does and how it is undone."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

import trio

from catbus.postgres.access.asyncpg_bridge import OUTAGE
from tests.postgres.sql import open_sql

from .database import Database, is_root
from .history import Granted, Healed, History, Hurt, now
from .replicas import Post

DATABASE = "the database"
"""What is touched by what is done to the database; a replica is touched under its name."""


@dataclass
class Scene:
    """What there is to hurt."""

    history: History
    posts: list[Post]
    database: Database
    chance: random.Random
    flying: Callable[[], int]
    settled: trio.Lock
    """Held by who changes roles, and by a failover, which must not lose a change."""


Deed = Callable[[Scene, Post, float], Awaitable[None]]


@dataclass(frozen=True)
class Kind:
    """A fault: does it, waits for so many seconds, undoes it. `reach` is what it touches."""

    do: Deed
    reach: str = "replica"
    """"replica", "database", or "all"."""
    longest: float = 3.0
    database_only: bool = False
    """Whether no client may lose its connection by it."""


async def kill_replica(scene: Scene, post: Post, seconds: float) -> None:
    post.kill()
    await post.wait_down()
    await trio.sleep(seconds)
    post.start()
    await post.wait_ready()


async def stop_replica(scene: Scene, post: Post, seconds: float) -> None:
    if post.replica is not None:
        post.replica.pause()
        await trio.sleep(seconds)
        post.replica.resume()


async def restart_replica(scene: Scene, post: Post, seconds: float) -> None:
    post.terminate()
    await post.wait_down()
    post.start()
    await post.wait_ready()


async def roll(scene: Scene, post: Post, seconds: float) -> None:
    for each in scene.posts:
        await restart_replica(scene, each, seconds)


async def kill_database(scene: Scene, post: Post, seconds: float) -> None:
    await scene.database.kill()
    await trio.sleep(seconds)
    await scene.database.serve()


async def kill_backend(scene: Scene, post: Post, seconds: float) -> None:
    """PostgreSQL then ends all others too, and recovers."""
    with suppress(*OUTAGE):
        for (pid,) in (await backends(scene))[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    await scene.database.serve()


async def end_backends(scene: Scene, post: Post, seconds: float) -> None:
    with suppress(*OUTAGE):
        pids = [pid for (pid,) in await backends(scene)]
        await scene.database.fetch("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", pids[:3])


async def backends(scene: Scene) -> list[tuple[int]]:
    found = await scene.database.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND query LIKE '%catbus.%' ORDER BY pid"
    )
    pids = [(int(pid),) for (pid,) in found]
    scene.chance.shuffle(pids)
    return pids


async def restart_database(scene: Scene, post: Post, seconds: float) -> None:
    await scene.database.stop()
    await scene.database.serve()


async def stop_database(scene: Scene, post: Post, seconds: float) -> None:
    scene.database.primary.pause()
    await trio.sleep(seconds)
    scene.database.primary.resume()


async def end_listener(scene: Scene, post: Post, seconds: float) -> None:
    post.paths[-1].cut()


async def silence_listener(scene: Scene, post: Post, seconds: float) -> None:
    post.paths[-1].block_answers()
    await trio.sleep(seconds)
    post.paths[-1].unblock()


async def lose_answers(scene: Scene, post: Post, seconds: float) -> None:
    """What was asked is done, and nobody hears of it."""
    post.database.block_answers()
    await trio.sleep(seconds)
    post.database.cut()
    post.database.unblock()


async def cut_database(scene: Scene, post: Post, seconds: float) -> None:
    for path in post.paths:
        path.block()
    await trio.sleep(seconds)
    for path in post.paths:
        path.unblock()


async def cut_clients(scene: Scene, post: Post, seconds: float) -> None:
    post.cut_clients()
    await trio.sleep(seconds)
    post.join_clients()


async def silence_replica(scene: Scene, post: Post, seconds: float) -> None:
    """What was published is, and nobody hears of it."""
    post.silence()
    await trio.sleep(seconds)
    post.websocket.cut()
    post.join_clients()


async def lose_datagrams(scene: Scene, post: Post, seconds: float) -> None:
    post.webtransport.loss = scene.chance.uniform(0.05, 0.3)
    await trio.sleep(seconds)
    post.webtransport.loss = 0.0


async def reset_clients(scene: Scene, post: Post, seconds: float) -> None:
    post.websocket.cut()
    post.webtransport.forget()


async def fill_disk(scene: Scene, post: Post, seconds: float) -> None:
    await trio.to_thread.run_sync(scene.database.fill)
    await trio.sleep(seconds)
    scene.database.clear()
    await scene.database.serve()


async def fail_over(scene: Scene, post: Post, seconds: float) -> None:
    async with scene.settled:
        await scene.database.fail_over(min(seconds, 1.0))


async def kill_pooler(scene: Scene, post: Post, seconds: float) -> None:
    bouncer = scene.posts[-1].bouncer
    assert bouncer is not None
    bouncer.kill()
    await trio.sleep(seconds)
    await bouncer.restart()


KINDS: Mapping[str, Kind] = {
    "replica killed": Kind(kill_replica),
    "replica stopped": Kind(stop_replica, longest=5.0),
    "replica restarted": Kind(restart_replica),
    "rolling restart": Kind(roll, reach="all"),
    "network cut": Kind(cut_clients, longest=5.0),
    "answers to clients lost": Kind(silence_replica, longest=4.0),
    "network lossy": Kind(lose_datagrams, longest=5.0),
    "connections reset": Kind(reset_clients),
    "database killed": Kind(kill_database, reach="database", database_only=True),
    "database backend killed": Kind(kill_backend, reach="database", database_only=True),
    "database connections ended": Kind(end_backends, reach="database", database_only=True),
    "database restarted": Kind(restart_database, reach="database", database_only=True),
    "database stopped": Kind(stop_database, reach="database", longest=6.0, database_only=True),
    "database failed over": Kind(fail_over, reach="database", database_only=True),
    "database cut off": Kind(cut_database, longest=6.0, database_only=True),
    "answers of the database lost": Kind(lose_answers, longest=5.0, database_only=True),
    "listener cut": Kind(end_listener, database_only=True),
    "listener silent": Kind(silence_listener, longest=6.0, database_only=True),
    "pooler killed": Kind(kill_pooler, reach="database", database_only=True),
    "disk full": Kind(fill_disk, reach="database", database_only=True),
}


NOTHING = "nothing"
"""What can be asked for in the place of a kind: all that happens then is that roles change."""


class Plan:
    """Faults, one after the other, in lanes beside each other; now and then all is calm."""

    def __init__(self, scene: Scene, seed: int, only: str | None = None) -> None:
        """With `only`, faults of that kind, one at a time; with NOTHING, none."""
        self.done = 0
        self._scene = scene
        self._seed = seed
        self._kinds = [kind for kind in KINDS if kind != "disk full" or is_root()] if only is None else [only]
        self._lanes = 2 if only is None else int(only != NOTHING)
        self._numbers = count(1)
        self._touched: set[str] = set()

    async def run(self, over: trio.Event) -> None:
        """Until it is over, and what was done by then is undone."""
        sources = [random.Random(f"{self._seed}-{lane}") for lane in range(self._lanes)]
        while not over.is_set():
            async with trio.open_nursery() as nursery:
                for source in sources:
                    nursery.start_soon(self._hurt, source, over)
            with trio.move_on_after(14 if self._lanes > 1 else 4):
                await over.wait()

    async def _hurt(self, source: random.Random, over: trio.Event) -> None:
        for _ in range(4 if self._lanes > 1 else 1):
            kind, post, seconds = self._draw(source)
            number = next(self._numbers)
            history = self._scene.history
            replica = post.name if KINDS[kind].reach == "replica" else ""
            touched = self._reach(kind, post)
            self._touched |= touched
            history.add(Hurt(at=now(), number=number, kind=kind, replica=replica, flying=self._scene.flying()))
            await KINDS[kind].do(self._scene, post, seconds)
            history.add(Healed(at=now(), number=number))
            self._touched -= touched
            self.done += 1
            with trio.move_on_after(source.uniform(0.5, 2.5)):
                await over.wait()
            if over.is_set():
                return

    def _draw(self, source: random.Random) -> tuple[str, Post, float]:
        """The next fault that touches nothing that another lane touches just now."""
        while True:
            kind, post = source.choice(self._kinds), source.choice(self._scene.posts)
            seconds = source.uniform(0.2, KINDS[kind].longest)
            if not self._reach(kind, post) & self._touched:
                return kind, post, seconds

    def _reach(self, kind: str, post: Post) -> set[str]:
        everybody = {each.name for each in self._scene.posts}
        return {"replica": {post.name}, "database": {DATABASE}, "all": everybody}[KINDS[kind].reach]


async def change_roles(scene: Scene, keys: Mapping[str, bytes], over: trio.Event, seed: int, pause: float) -> int:
    """Take permissions from the roles and give them back, one after another, until it is over; then all have all."""
    source = random.Random(f"{seed}-roles")
    allowed = {role: {"read", "write"} for role in keys}
    changes = 0
    while True:
        if over.is_set():
            wanted = {role: {"read", "write"} for role in keys if allowed[role] != {"read", "write"}}
            if not wanted:
                return changes
            role = next(iter(wanted))
            allowed[role] = {"read", "write"}
        else:
            role = source.choice(list(keys))
            allowed[role] ^= {source.choice(["read", "write"])}
        async with scene.settled:
            await _have(scene, role, keys[role], allowed[role])
        changes += 1
        if not over.is_set():
            with trio.move_on_after(source.uniform(0.5, 1.5) * pause):
                await over.wait()


async def _have(scene: Scene, role: str, key: bytes, allowed: set[str]) -> None:
    """Make a role's permissions these, however often it takes."""
    began = now()
    while True:
        with suppress(*OUTAGE):
            async with open_sql(scene.database.url) as sql:
                await sql.fetch(
                    "WITH gone AS (DELETE FROM catbus.role_grants WHERE role = $1 AND NOT permission = ANY ($2)) "
                    "INSERT INTO catbus.role_grants (role, permission, pattern) "
                    "SELECT $1, permission, $3 FROM unnest($2::text[]) AS permission ON CONFLICT DO NOTHING",
                    key,
                    sorted(allowed),
                    f"{role}.*",
                )
            pattern = (f"{role}.*",)
            scene.history.add(
                Granted(
                    at=now(),
                    role=role,
                    began=began,
                    read=pattern if "read" in allowed else (),
                    write=pattern if "write" in allowed else (),
                )
            )
            return
        await trio.sleep(0.1)
