"""Inject faults into three replicas and their PostgreSQL, and check what their clients saw.

    python -m tests.chaos --minutes 20 --seed 7
    python -m tests.chaos --only "network cut" --minutes 5
    python -m tests.chaos --mistakes

Replicas are processes of `catbus run`. Clients publish and subscribe over WebSocket and WebTransport, and subscribe
over server-sent events, through proxies. They also increment counters in retained messages, and are members of
channels. Workers of a consumer are processes that are killed all the time. Faults are drawn from the seed, which is
printed: the same seed draws the same faults, but not the same moments at which they take effect. After the run the
checker reads what all clients recorded. With `--mistakes`, replicas run with one planted mistake at a time, which the
checker must find. For root, the disk of the database is a small one that can be filled up; otherwise that fault is left
out.
"""

from __future__ import annotations

import argparse
import inspect
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from catbus.auth.grants import Grants
from catbus.config import DatabaseSettings
from catbus.postgres.access import reconnecting_tasks
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS
from catbus.postgres.access.migrations import schema_files, version_update
from catbus.postgres.roles.role_store import open_roles
from tests.postgres.proxy import Proxy
from tests.postgres.server import execute

from . import clients
from .consumer_workers import ConsumerWorkers, prepare_consumer, wait_processed
from .database_pair import AUDIT, DatabasePair, is_root
from .event_stream_client import start_event_stream_clients
from .faults import FAULTS, NO_FAULTS, FaultContext, FaultSchedule, change_roles
from .history import AnyEvent, DatabaseStatusLogged, Effect, History, LogEntry, LogEpoch, RunEnded, now, read
from .history_checker import check_history
from .members import list_members, start_members
from .mistakes import EARLY_WORKERS, MISTAKES, STALE_MISTAKE, assert_mistakes_fit
from .replica_slots import BROKER_MODULE, ReplicaSlot, open_slots
from .report import PROMISES, Report
from .shared_state import start_shared_state, wait_maps_settled

DISK = "1500M"
ROLES = ("red", "green")
FILE = "history.jsonl"
DATABASE_ONLY = frozenset(name for name, kind in FAULTS.items() if kind.database_only)
ATTEMPTS = 3
"""Runs of half a minute within which a planted mistake must be found. Whether it shows depends on chance."""
DATABASE_EVENTS = {"database connected": True, "database unavailable, trying again": False}
"""Log events that say whether a replica reaches its database."""
MOUNT_VARIABLE = "CATBUS_CHAOS_MOUNTED"


def print_now(text: str) -> None:
    print(text, flush=True)


async def run(
    directory: Path,
    minutes: float,
    seed: int,
    *,
    only: str | None = None,
    program: Sequence[str] = BROKER_MODULE,
    early: bool = False,
) -> tuple[list[AnyEvent], list[str]]:
    """Run the load and the faults. Returns the history, and what replicas and workers did that they never should.

    `early`: the workers of the consumer are broken.
    """
    rng = random.Random(seed)
    history = History(directory / FILE)
    complaints: list[str] = []

    for text in DATABASE_EVENTS:
        assert text in inspect.getsource(reconnecting_tasks), f"replicas do not log {text!r} any more"

    def handle_log_event(replica: str, event: dict[str, Any]) -> None:
        if event["event"] in DATABASE_EVENTS:
            available = DATABASE_EVENTS[event["event"]]
            history.add(
                DatabaseStatusLogged(at=now(), replica=replica, available=available, service=event.get("service", ""))
            )
        elif event["level"] in ("error", "critical"):
            complaints.append(f"{replica}: {event}")

    database = DatabasePair(directory / "disk")
    async with trio.open_nursery() as nursery:
        try:
            print_now("starting PostgreSQL, its standby and three replicas ...")
            await database.start(nursery)
            await trio.to_thread.run_sync(prepare, database.url)
            roles = await make_roles(database.url)
            await database.follow()
            slots = await open_slots("abc", directory, database.url, handle_log_event, rng, program, nursery)
            proxy = Proxy(database.url)
            await nursery.start(proxy.run)
            workers = ConsumerWorkers(proxy, seed, directory / "workers", early=early)
            database.proxies = [proxy, *(path for slot in slots for path in slot.database_proxies)]
            for slot in slots:
                slot.start()
            with trio.fail_after(60):
                for slot in slots:
                    await slot.wait_ready()
            unanswered = await run_load(history, slots, database, workers, roles, minutes, seed, only, rng)
        finally:
            with trio.CancelScope(shield=True):
                await database.close()
            history.close()
        nursery.cancel_scope.cancel()
    exits = [
        f"{slot.name} has ended by itself with status {status}" for slot in slots for status in slot.unexpected_exits
    ]
    exits += [f"a worker of the consumer has ended by itself with {status}" for status in workers.unexpected_exits]
    if unanswered:
        exits.append(f"{unanswered} publishes were never answered")
    return history.events, [*exits, *complaints]


def prepare(url: str) -> None:
    """Apply the schema before the replicas do, and record everything that is appended."""
    scripts = [script for _, _, script in schema_files()]
    execute(url, *scripts, version_update(len(scripts)), AUDIT)
    prepare_consumer(url)


async def make_roles(url: str) -> dict[str, tuple[str, bytes]]:
    """Create roles that may read and write below their name. Returns token and key of each."""
    made = {}
    async with open_roles(DatabaseSettings(url=url)) as roles:
        for name in ROLES:
            token, role = await roles.create(name, Grants((f"{name}.*",), (f"{name}.*",)))
            made[name] = token, role.key
    return made


async def run_load(
    history: History,
    slots: list[ReplicaSlot],
    database: DatabasePair,
    workers: ConsumerWorkers,
    roles: dict[str, tuple[str, bytes]],
    minutes: float,
    seed: int,
    only: str | None,
    rng: random.Random,
) -> int:
    """Run the clients while faults are injected. Returns how many publishes have no reply."""
    state = clients.LoadState(history, slots, database, rng)
    context = FaultContext(history, slots, database, random.Random(seed), lambda: state.in_flight, trio.Lock())
    plan = FaultSchedule(context, seed, only)
    ended = trio.Event()
    changes = 0

    async def change() -> None:
        nonlocal changes
        keys = {name: key for name, (_, key) in roles.items()}
        changes = await change_roles(context, keys, ended, seed, 3.0)

    def print_progress() -> None:
        print_now(
            f"{trio.current_time() - began:5.0f} s: {plan.done} faults, {state.answered} messages published, "
            f"{state.received} received, {state.in_flight} on their way"
        )

    async def report() -> None:
        while True:
            await trio.sleep(15)
            print_progress()

    async with trio.open_nursery() as subscribers:
        async with trio.open_nursery() as publishers:
            tokens = {name: token for name, (token, _) in roles.items()}
            clients.start_clients(state, tokens, subscribers, publishers)
            start_event_stream_clients(state, tokens, subscribers)
            start_shared_state(state, subscribers, publishers)
            watchers = start_members(state, subscribers, publishers)
            subscribers.start_soon(workers.run, state.load_ended)
            await trio.sleep(3)
            began = trio.current_time()
            async with trio.open_nursery() as faults:
                faults.start_soon(report)
                async with trio.open_nursery() as doing:
                    doing.start_soon(plan.run, ended)
                    doing.start_soon(change)
                    await trio.sleep(minutes * 60)
                    ended.set()
                faults.cancel_scope.cancel()
            for slot in slots:
                await slot.wait_ready()
            state.load_ended.set()
            with trio.move_on_after(30):
                async with trio.open_nursery() as waiting:
                    waiting.start_soon(wait_all_answered, state)
            unanswered = state.in_flight
            publishers.cancel_scope.cancel()
        print_progress()
        print_now(f"{changes} changes of roles; waiting for everybody to catch up ...")
        await wait_moved(database)
        ((epoch, head, floor),) = await database.fetch("SELECT epoch, head, floor FROM catbus.position()")
        behind = await clients.catch_up(state, epoch, head)
        if not await wait_processed(database):
            print_now("the consumer never caught up")
        await wait_maps_settled(state)
        await list_members(state, watchers)
        history.add(
            RunEnded(at=now(), epoch=epoch, head=head, floor=floor, stayed=tuple({name for name, _ in state.cursors}))
        )
        for each in behind:
            print_now(f"never caught up with {head} of {epoch}: {each}")
        subscribers.cancel_scope.cancel()
    await record_database(history, database)
    return unanswered


async def wait_all_answered(state: clients.LoadState) -> None:
    while state.in_flight:
        await trio.sleep(0.05)


async def wait_moved(database: DatabasePair) -> None:
    """Wait until the outbox is empty."""
    while True:
        # With little CPU, connecting can take too long even after all faults.
        with suppress(*DATABASE_ERRORS):
            if not (await database.fetch("SELECT catbus.outbox_pending()"))[0][0]:
                return
        await trio.sleep(0.1)


async def record_database(history: History, database: DatabasePair) -> None:
    """Record what the database has kept."""
    for epoch, after in await database.fetch("SELECT epoch, after_seq FROM catbus.epochs ORDER BY ordinal"):
        history.add(LogEpoch(at=now(), epoch=epoch, after=after))
    for epoch, seq, channel, payload in await database.fetch("SELECT * FROM audit.entries"):
        message = clients.identify(msgspec.json.decode(payload))
        history.add(LogEntry(at=now(), epoch=epoch, seq=seq, channel=channel, message=message))
    for seq, channel, payload in await database.fetch("SELECT seq, channel, payload FROM public.effects ORDER BY id"):
        message = clients.identify(msgspec.json.decode(payload))
        history.add(Effect(at=now(), seq=seq, channel=channel, message=message))


def run_once(
    options: argparse.Namespace, directory: Path, program: Sequence[str] = BROKER_MODULE, *, early: bool = False
) -> tuple[Report, list[str]]:
    """Run once, and return the report and the other problems."""
    with small_disk(directory / "disk"):
        events, problems = trio.run(
            partial(run, directory, options.minutes, options.seed, only=options.only, program=program, early=early)
        )
    return check_history(events, database_only=DATABASE_ONLY), problems


def try_mistakes(options: argparse.Namespace, directory: Path) -> bool:
    """Run with each planted mistake, and return whether the checker found the promises broken that they break.

    Raises `AssertionError` if a mistake does not fit the broker any more, which proves nothing.
    """
    assert_mistakes_fit()
    found: list[tuple[str, list[str]]] = []
    for name, (_, kind, promise) in MISTAKES.items():
        options.only, options.minutes = kind, 0.4
        broken: list[str] = []
        for attempt in range(ATTEMPTS):
            place = directory / f"{len(found)}-{attempt}"
            place.mkdir()
            program = ("tests.chaos.mistakes", name)
            report, problems = run_once(options, place, program, early=name == EARLY_WORKERS)
            stale = [problem for problem in problems if problem.endswith(f"status {STALE_MISTAKE}")]
            assert not stale, f"the planted mistake {name!r} fails itself: {stale[0]}"
            if promise in report.broken:
                broken = [PROMISES[each] for each in report.broken]
                break
            options.seed += 1
        found.append((name, broken))
        print(f"{name}: {'; '.join(broken) or 'NOT FOUND'}", flush=True)
    print("\n| Planted mistake | Promises that it breaks |\n|---|---|")
    for name, broken in found:
        print(f"| {name} | {'; '.join(broken) or 'none'} |")
    return all(broken for _, broken in found)


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Mount a small disk at a directory, if that is possible."""
    directory.mkdir()
    if is_root():
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=755", "chaos", str(directory)], check=True)
    try:
        yield
    finally:
        if is_root():
            subprocess.run(["umount", "--lazy", str(directory)], check=False)


def mount(argv: Sequence[str]) -> None:
    """As root: continue in a mount namespace of our own, in which a small disk can be mounted."""
    os.execvpe(
        "unshare",
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.chaos", *argv],
        {**os.environ, MOUNT_VARIABLE: "1"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="how long faults are injected (default: 2)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="draw the faults from this seed")
    kinds = [*FAULTS, NO_FAULTS]
    parser.add_argument("--only", choices=kinds, metavar="KIND", help=f"faults of one kind: {', '.join(kinds)}")
    parser.add_argument("--mistakes", action="store_true", help="plant mistakes in replicas, which must be found")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep histories and logs in this directory")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="only check a recorded history")
    options = parser.parse_args()
    if options.judge is not None:
        report = check_history(read(options.judge), database_only=DATABASE_ONLY)
        print(report)
        sys.exit(bool(report.broken))
    if shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        parser.exit(1, "there is no pgbouncer on PATH: install your distribution's package of that name\n")
    if is_root() and MOUNT_VARIABLE not in os.environ and shutil.which("unshare"):
        mount(sys.argv[1:])
    directory = Path(tempfile.mkdtemp(prefix="catbus-chaos-"))
    directory.chmod(0o755)
    print(f"seed {options.seed}", flush=True)
    try:
        if options.mistakes:
            sys.exit(not try_mistakes(options, directory))
        report, problems = run_once(options, directory)
        print(report, *problems[:20], sep="\n")
        sys.exit(bool(report.broken or problems))
    finally:
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            shutil.copytree(directory, options.keep, ignore=shutil.ignore_patterns("disk", "users"), dirs_exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
