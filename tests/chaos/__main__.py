"""Hurt three replicas and their PostgreSQL in every way for as long as one likes, and check what their clients saw.

    python -m tests.chaos --minutes 20 --seed 7
    python -m tests.chaos --only "network cut" --minutes 5
    python -m tests.chaos --mistakes

Replicas are processes of `catbus run`; clients publish and subscribe over both transports, through proxies. Faults are
drawn from the seed, which is printed; what was drawn is the same for the same seed, when it takes effect is not. In the
end the checker reads what everybody took down. With `--mistakes` replicas make one mistake at a time, which the checker
has to find. As root the database's disk is a small one that can be filled up; otherwise that fault is left out.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from catbus.auth.tokens import Grants
from catbus.config import DatabaseSettings
from catbus.postgres.access.migrations import schema_files
from catbus.postgres.roles.role_store import open_roles
from tests.postgres.server import execute

from . import load
from .checker import PROMISES, Report, judge
from .database import AUDIT, Database, is_root
from .faults import KINDS, NOTHING, Plan, Scene, change_roles
from .history import AnyEvent, Ended, Entry, Epoch, History, Noticed, now, read
from .mistakes import MISTAKES
from .replicas import OURS, Post, open_posts

DISK = "1500M"
ROLES = ("red", "green")
FILE = "history.jsonl"
DATABASE_ONLY = frozenset(name for name, kind in KINDS.items() if kind.database_only)
TRIES = 3
"""How often a mistake is made for half a minute until it has to be found: it does its harm when chance will have it."""
MOUNTED = "CATBUS_CHAOS_MOUNTED"


def say(text: str) -> None:
    print(text, flush=True)


async def run(
    directory: Path,
    minutes: float,
    seed: int,
    *,
    only: str | None = None,
    program: Sequence[str] = OURS,
) -> tuple[list[AnyEvent], list[str]]:
    """One run; returns the history, which is in a file too, and what replicas have done that they never should."""
    chance = random.Random(seed)
    history = History(directory / FILE)
    complaints: list[str] = []

    def hear(replica: str, event: dict[str, Any]) -> None:
        if event["event"] in ("database connected", "database unavailable, trying again"):
            available = event["event"] == "database connected"
            history.add(Noticed(at=now(), replica=replica, available=available, service=event.get("service", "")))
        elif event["level"] in ("error", "critical"):
            complaints.append(f"{replica}: {event}")

    database = Database(directory / "disk")
    async with trio.open_nursery() as nursery:
        try:
            say("starting PostgreSQL, its standby and three replicas ...")
            await database.start(nursery)
            await trio.to_thread.run_sync(prepare, database.url)
            roles = await make_roles(database.url)
            await database.follow()
            posts = await open_posts("abc", directory, database.url, hear, chance, program, nursery)
            database.paths = [path for post in posts for path in post.paths]
            for post in posts:
                post.start()
            with trio.fail_after(60):
                for post in posts:
                    await post.wait_ready()
            unanswered = await play(history, posts, database, roles, minutes, seed, only, chance)
        finally:
            with trio.CancelScope(shield=True):
                await database.close()
            history.close()
        nursery.cancel_scope.cancel()
    fallen = [f"{post.name} has ended by itself with status {status}" for post in posts for status in post.fallen]
    if unanswered:
        fallen.append(f"{unanswered} publishes were never answered")
    return history.events, [*fallen, *complaints]


def prepare(url: str) -> None:
    """Make the schema before the replicas do, and have everything kept that is appended."""
    scripts = [script for _, _, script in schema_files()]
    execute(url, *scripts, f"UPDATE catbus.schema_version SET version = {len(scripts)}", AUDIT)


async def make_roles(url: str) -> dict[str, tuple[str, bytes]]:
    """Roles that may read and write below their name: token and key of each."""
    made = {}
    async with open_roles(DatabaseSettings(url=url)) as roles:
        for name in ROLES:
            token, role = await roles.create(name, Grants((f"{name}.*",), (f"{name}.*",)))
            made[name] = token, role.key
    return made


async def play(
    history: History,
    posts: list[Post],
    database: Database,
    roles: dict[str, tuple[str, bytes]],
    minutes: float,
    seed: int,
    only: str | None,
    chance: random.Random,
) -> int:
    """Load the replicas while all that is planned happens to them; returns how many publishes have no answer."""
    ground = load.Ground(history, posts, database, chance)
    scene = Scene(history, posts, database, random.Random(seed), lambda: ground.flying, trio.Lock())
    plan = Plan(scene, seed, only)
    over = trio.Event()
    changes = 0

    async def change() -> None:
        nonlocal changes
        keys = {name: key for name, (_, key) in roles.items()}
        changes = await change_roles(scene, keys, over, seed, 3.0)

    def tell() -> None:
        say(
            f"{trio.current_time() - began:5.0f} s: {plan.done} faults, {ground.answered} messages published, "
            f"{ground.received} received, {ground.flying} on their way"
        )

    async def report() -> None:
        while True:
            await trio.sleep(15)
            tell()

    async with trio.open_nursery() as subscribers:
        async with trio.open_nursery() as publishers:
            load.start(ground, {name: token for name, (token, _) in roles.items()}, subscribers, publishers)
            await trio.sleep(3)
            began = trio.current_time()
            async with trio.open_nursery() as faults:
                faults.start_soon(report)
                async with trio.open_nursery() as doing:
                    doing.start_soon(plan.run, over)
                    doing.start_soon(change)
                    await trio.sleep(minutes * 60)
                    over.set()
                faults.cancel_scope.cancel()
            for post in posts:
                await post.wait_ready()
            ground.over.set()
            with trio.move_on_after(30):
                async with trio.open_nursery() as waiting:
                    waiting.start_soon(wait_all_answered, ground)
            unanswered = ground.flying
            publishers.cancel_scope.cancel()
        tell()
        say(f"{changes} changes of roles; waiting for everybody to catch up ...")
        await wait_moved(database)
        ((epoch, head, floor),) = await database.fetch("SELECT epoch, head, floor FROM catbus.position()")
        behind = await load.catch_up(ground, epoch, head)
        history.add(
            Ended(at=now(), epoch=epoch, head=head, floor=floor, stayed=tuple({name for name, _ in ground.positions}))
        )
        for each in behind:
            say(f"never caught up with {head} of {epoch}: {each}")
        subscribers.cancel_scope.cancel()
    await take_down(history, database)
    return unanswered


async def wait_all_answered(ground: load.Ground) -> None:
    while ground.flying:
        await trio.sleep(0.05)


async def wait_moved(database: Database) -> None:
    """Wait until what was published from SQL is in the log."""
    while (await database.fetch("SELECT catbus.outbox_pending()"))[0][0]:
        await trio.sleep(0.1)


async def take_down(history: History, database: Database) -> None:
    """What the database has kept."""
    for epoch, after in await database.fetch("SELECT epoch, after_seq FROM catbus.epochs ORDER BY ordinal"):
        history.add(Epoch(at=now(), epoch=epoch, after=after))
    for epoch, seq, channel, payload in await database.fetch("SELECT * FROM audit.entries"):
        publisher, number = msgspec.json.decode(payload)[:2]
        history.add(Entry(at=now(), epoch=epoch, seq=seq, channel=channel, message=(publisher, number)))


def once(options: argparse.Namespace, directory: Path, program: Sequence[str] = OURS) -> tuple[Report, list[str]]:
    """A run and its report, with what else went wrong."""
    with small_disk(directory / "disk"):
        events, troubles = trio.run(
            partial(run, directory, options.minutes, options.seed, only=options.only, program=program)
        )
    return judge(events, database_only=DATABASE_ONLY), troubles


def try_mistakes(options: argparse.Namespace, directory: Path) -> bool:
    """Whether each of them was found."""
    found = []
    for name, (_, kind) in MISTAKES.items():
        options.only, options.minutes = kind, 0.4
        for attempt in range(TRIES):
            place = directory / f"{len(found)}-{attempt}"
            place.mkdir()
            report, _ = once(options, place, ("tests.chaos.mistakes", name))
            broken = [PROMISES[promise] for promise in report.broken]
            if broken:
                break
            options.seed += 1
        found.append((name, broken))
        print(f"{name}: {'; '.join(broken) or 'NOT FOUND'}", flush=True)
    print("\n| Mistake | Promises that were found to be broken |\n|---|---|")
    for name, broken in found:
        print(f"| {name} | {'; '.join(broken) or 'none'} |")
    return all(broken for _, broken in found)


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """A directory that can be filled up, where that may be made."""
    directory.mkdir()
    if is_root():
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=755", "chaos", str(directory)], check=True)
    try:
        yield
    finally:
        if is_root():
            subprocess.run(["umount", "--lazy", str(directory)], check=False)


def mount(argv: Sequence[str]) -> None:
    """As root: go on in a name space for mounts of our own, where a small disk can be put below the directory."""
    os.execvpe(
        "unshare",
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.chaos", *argv],
        {**os.environ, MOUNTED: "1"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="how long there are faults (default: 2)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="what the faults are drawn from")
    kinds = [*KINDS, NOTHING]
    parser.add_argument("--only", choices=kinds, metavar="KIND", help=f"faults of one kind: {', '.join(kinds)}")
    parser.add_argument("--mistakes", action="store_true", help="have replicas make mistakes, which must be found")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep histories and logs there")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="only check a history that was kept")
    options = parser.parse_args()
    if options.judge is not None:
        report = judge(read(options.judge), database_only=DATABASE_ONLY)
        print(report)
        sys.exit(bool(report.broken))
    if shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        parser.exit(1, "there is no pgbouncer on PATH: install your distribution's package of that name\n")
    if is_root() and MOUNTED not in os.environ and shutil.which("unshare"):
        mount(sys.argv[1:])
    directory = Path(tempfile.mkdtemp(prefix="catbus-chaos-"))
    directory.chmod(0o755)
    print(f"seed {options.seed}", flush=True)
    try:
        if options.mistakes:
            sys.exit(not try_mistakes(options, directory))
        report, troubles = once(options, directory)
        print(report, *troubles[:20], sep="\n")
        sys.exit(bool(report.broken or troubles))
    finally:
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            shutil.copytree(directory, options.keep, ignore=shutil.ignore_patterns("disk", "users"), dirs_exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
