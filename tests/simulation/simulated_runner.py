"""Runs cases on the simulated database and the virtual clock, where anything can go wrong at any moment."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import trio
from trio._core._run import _r as _scheduler
from trio.testing import MockClock

from catbus.postgres import log as log_module
from catbus.postgres import outbox_relay
from catbus.postgres.access import reconnecting_tasks
from catbus.postgres.append import log_writer
from catbus.postgres.listen import notification_listener, polling_interval
from catbus.postgres.maintenance import log_retention
from catbus.protocol.channels import matches
from catbus.testing.shrinking import minimize

from .case_runner import CHANNELS, ERASED_PATTERNS, PAUSES, REPLICAS, Case, CaseRunner, Position, PromiseBroken
from .log_model import LogModel, Row
from .simulated_database import StoredRow
from .simulated_network import DISTURBANCES, KINDS, POOLED, Disturbance, SimulatedNetwork


class SimulatedRunner(CaseRunner):
    retains = True

    def __init__(self, case: Case, nursery: trio.Nursery) -> None:
        self.network = SimulatedNetwork()
        self.database = self.network.database
        self.database.on_commit = self.committed
        self.rotates = True
        """False after the database was set back without a trace, because retention must not delete what shows it."""
        nursery.start_soon(self.network.run)
        super().__init__(case, nursery, LogModel())

    def url(self, slot: int, number: int) -> str:
        return f"postgres://{slot}/{number}" + (POOLED if (self.case.seed + number) % 2 == 0 else "")

    def committed(self, rows: Sequence[StoredRow], epoch: str) -> None:
        # A replica may only append in the current epoch.
        self.model.expect(epoch == self.database.state.epoch, f"appended from {epoch}")
        self.model.commit([Row(row.seq, row.channel, row.payload) for row in rows])

    async def heal(self) -> None:
        self.start_database(0, 0)
        self.network.heal()

    def check(self) -> None:
        super().check()
        retained = {row.channel: row.seq for row in self.database.state.retained}
        expected = {channel: self.model.retained_seq(channel) for channel in CHANNELS}
        self.model.expect(retained == {c: seq for c, seq in expected.items() if seq}, f"{retained} are retained")
        # All replicas know by now.
        self.rotates = True

    async def position(self) -> Position:
        state = self.database.state
        self.retention_end = self.database.retention_end
        return Position(state.epoch, state.head, len(state.outbox))

    @property
    def busy(self) -> bool:
        return self.network.busy

    # What goes wrong

    def publish_from_sql(self, a: int, b: int) -> None:
        if self.network.unreachable or self.database.standby:
            return
        text = f'"{next(self.texts)}"'
        self.model.published_by_sql.add(text)
        self.database.publish(CHANNELS[a % 4], text)

    def cut_connections(self, a: int, b: int) -> None:
        self.network.cut(self.replicas[a % REPLICAS].url)

    def freeze_connections(self, a: int, b: int) -> None:
        self.network.frozen[self.replicas[a % REPLICAS].url] = trio.current_time() + PAUSES[b]

    def disturb_statement(self, a: int, b: int) -> None:
        """Plan a disturbance of the next statement of a kind."""
        owner = self.replicas[a % REPLICAS].url
        kind, what = KINDS[(a >> 1) % len(KINDS)], DISTURBANCES[b]
        event = (self.apply_retention, self.fail_over, self.cut_connections, self.publish_from_sql)[(a >> 4) % 4]
        delay = PAUSES[2 + (a >> 4) % 6]
        self.network.disturbances[owner, kind].append(Disturbance(what, delay, lambda: event(a, a >> 6)))

    def stop_database(self, a: int, b: int) -> None:
        self.network.stop()
        self.network.unreachable = True

    def enter_standby(self, a: int, b: int) -> None:
        """Replace the primary by a standby, which is promoted when the database is started."""
        self.network.stop()
        self.database.standby = True

    def start_database(self, a: int, b: int) -> None:
        if self.network.unreachable:
            self.network.unreachable = False
        elif self.database.standby:
            self.fail_over(a, 0)

    def fail_over(self, a: int, b: int) -> None:
        """Promote a standby, or set the database back as it is. The last commits may be lost."""
        self.network.stop()
        self.database.standby = False
        silent = self.case.silent and bool(b & 1)
        self.rotates = self.rotates and not silent
        self.database.set_back(a % 4 if silent or b & 6 else 0, moved=not silent)
        state = self.database.state
        self.model.set_back(state.head, [text for _, text in state.outbox], state.erasure)

    def erase(self, a: int, b: int) -> None:
        if not (self.network.unreachable or self.database.standby):
            pattern = ERASED_PATTERNS[a % 4]
            seqs, number = self.database.erase(pattern), self.database.state.erasure
            self.model.erase(seqs, number)
            self.model.erase_retained([channel for channel in CHANNELS if matches(pattern, channel)], number)

    def begin_epoch(self, a: int, b: int) -> None:
        """Start a new epoch by hand, although nothing has changed."""
        self.database.begin_epoch()

    def apply_retention(self, a: int, b: int) -> None:
        if self.rotates:
            self.database.apply_retention(a % 5 + 1)

    def request_retention(self, a: int, b: int) -> None:
        """Make retention due for a replica to find."""
        if self.rotates:
            self.database.expired_count = a % 5 + 1

    def lock_head(self, a: int, b: int) -> None:
        self.network.locked = trio.current_time() + PAUSES[b]

    def drop_notifications(self, a: int, b: int) -> None:
        self.network.notifications_to_drop[self.replicas[a % REPLICAS].url] = b

    def delay_notifications(self, a: int, b: int) -> None:
        """Delay the notifications of some senders."""
        self.network.notification_delays[self.replicas[a % REPLICAS].url, (a >> 1) % 2] = PAUSES[b]


def play(case: Case) -> int:
    """Run a case within `simulation_settings()`, and return its number of episodes. Raises `PromiseBroken`."""
    random.seed(case.seed)
    _scheduler.seed(case.seed)

    runner: SimulatedRunner | None = None

    async def run() -> None:
        nonlocal runner
        async with trio.open_nursery() as nursery:
            runner = SimulatedRunner(case, nursery)
            patch.setattr(log_module, "open_bridge", runner.network.open_bridge)
            await runner.play()
            nursery.cancel_scope.cancel()

    try:
        with pytest.MonkeyPatch.context() as patch:
            trio.run(run, clock=MockClock(autojump_threshold=0))
    except Exception as error:
        raise PromiseBroken("\n".join([*(runner.trace if runner else ()), repr(error)])) from error
    assert runner is not None
    if runner.model.broken:
        raise PromiseBroken("\n".join([*runner.trace, *runner.model.broken[:3]]).replace("x" * 500, "..."))
    return runner.episodes


@contextmanager
def simulation_settings() -> Iterator[None]:
    """Silence the loggers, do not read the schema's files for every replica, and shorten timeouts and intervals."""

    async def migrate(connection: object) -> None:
        await trio.lowlevel.checkpoint()

    with pytest.MonkeyPatch.context() as patch:
        silence_loggers(patch)
        patch.setattr(log_module, "migrate", migrate)
        # Timeouts are a fifth, and polling is less frequent: a case takes fewer steps of the event loop, with the same
        # events.
        for module, name, seconds in (
            (log_writer, "APPEND_TIMEOUT", 2.0),
            (log_writer, "EPOCH_TIMEOUT", 1.0),
            (notification_listener, "POLL_TIMEOUT", 0.6),
            (outbox_relay, "POLL_TIMEOUT", 0.6),
            (polling_interval, "IDLE_INTERVAL", 0.5),
            (polling_interval, "BUSY_INTERVAL", 0.1),
            (outbox_relay, "POLL_INTERVAL", 1.0),
            (outbox_relay, "BUSY_POLL_INTERVAL", 1.0),
            (outbox_relay, "POLL_TIME_SHARE", 1),
        ):
            patch.setattr(module, name, seconds)
        yield


def silence_loggers(patch: pytest.MonkeyPatch) -> None:
    """Silence the loggers: every outage logs a line, and there are thousands of outages."""
    for module in (notification_listener, log_retention, reconnecting_tasks, log_writer):
        patch.setattr(module, "logger", SilentLogger())


class SilentLogger:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def minimize_case(case: Case) -> tuple[Case, PromiseBroken]:
    """Return the smallest part of a failing case that still fails."""
    operations = minimize(case.operations, lambda fewer: _broken(case._replace(operations=fewer)) is not None)
    minimal = case._replace(operations=operations)
    broken = _broken(minimal)
    assert broken is not None, "played again it is not broken any more"
    return minimal, broken


def _broken(case: Case) -> PromiseBroken | None:
    try:
        play(case)
    except PromiseBroken as broken:
        return broken
    return None
