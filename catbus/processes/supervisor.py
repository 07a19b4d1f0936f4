"""The supervisor of a broker with workers: it forks them, starts those that die again, and passes signals on.

It is a process of one thread without an event loop, so that forking is safe. It also owns the embedded PostgreSQL, and
waits for every child, as process 1 of a container has to.

| Signal | Passed on to all workers as |
|---|---|
| the first SIGTERM or SIGINT | SIGTERM: each drains |
| the second one | SIGINT: each stops at once |
| SIGHUP | SIGHUP: each reloads; with a terminal, it counts as SIGTERM |
"""

from __future__ import annotations

import gc
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import msgspec

from ..config import Config
from ..errors import CatbusError
from ..observability.loggers import get_logger
from ..postgres.embedded.server import prepare_server
from .held_sockets import HeldSockets, open_held_sockets
from .restart_policy import MAX_DEATHS, PERIOD, RestartPolicy
from .service_manager import ALIVE, READY, STOPPING, ServiceManager
from .siblings import SiblingClient
from .signal_queue import QUEUED, SignalQueue
from .supervised_database import SupervisedDatabase
from .worker import Worker
from .worker_process import WorkerProcess

STOP_MARGIN = 15.0
"""Seconds beyond `drain.delay`, `drain.window` and `drain.deadline` after which workers that still run are killed."""
IMMEDIATE_STOP_TIME = 5.0
"""Seconds for workers to stop at once, after which they are killed."""

RunWorker = Callable[[WorkerProcess], int]
"""Runs a worker in its own process, and returns its exit status. It raises nothing."""

logger = get_logger("catbus.workers")


class WorkersFailed(CatbusError):
    """A worker died again and again, so the broker has ended."""


@dataclass(eq=False)
class WorkerSlot:
    """The place of one worker, and the process in it, if any."""

    number: int
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    pid: int | None = None
    ready_pipe: int | None = None
    """Where the worker writes when it serves, until it has done so or ended."""
    due: float | None = None
    """The monotonic time at which it is started."""
    starts: int = 0
    has_served: bool = False


def supervise(
    config: Config,
    count: int,
    run_worker: RunWorker,
    on_serving: Callable[[list[tuple[str, str]]], None],
    manager: ServiceManager,
) -> int:
    """Run `count` workers until a signal stops them, and return the exit status.

    `on_serving` gets the addresses when all workers serve for the first time. Raises `ConfigError` for sockets that
    cannot be opened and a database that does not start, and `WorkersFailed` if a worker dies again and again.
    """
    with SignalQueue() as signals, ExitStack() as closing:
        held = closing.enter_context(open_held_sockets(config, count))
        database = None
        if config.database.url == "embedded":
            directory = config.state_directory / "postgres"
            database = closing.enter_context(_running_database(directory))
            if not database.wait_ready(signals):
                return 0
            config = msgspec.structs.replace(
                config, database=msgspec.structs.replace(config.database, url=database.url)
            )
        if not held.steered and held.udp[0]:
            logger.warning(
                "this system cannot choose the worker of a QUIC packet, so worker 0 alone serves WebTransport"
            )
        # Pages with what exists now stay shared between the processes: no collection writes to them.
        gc.collect()
        gc.freeze()
        return Supervisor(config, held, database, signals, run_worker, on_serving, manager).run()


@contextmanager
def _running_database(directory: Path) -> Iterator[SupervisedDatabase]:
    with prepare_server(directory) as server:
        database = SupervisedDatabase(server)
        database.start()
        try:
            yield database
        finally:
            database.stop()


class Supervisor:
    """The worker processes of one broker."""

    def __init__(
        self,
        config: Config,
        held: HeldSockets,
        database: SupervisedDatabase | None,
        signals: SignalQueue,
        run_worker: RunWorker,
        on_serving: Callable[[list[tuple[str, str]]], None],
        manager: ServiceManager,
    ) -> None:
        self._config = config
        self._held = held
        self._database = database
        self._signals = signals
        self._run_worker = run_worker
        self._on_serving = on_serving
        self._manager = manager
        self._alive_due = None if manager.watchdog_interval is None else time.monotonic()
        """The monotonic time at which the service manager expects to be told that this process is alive."""
        self._slots = [WorkerSlot(number) for number in range(len(held.siblings))]
        self._reloads = not sys.stdin.isatty()
        # A byte that all processes share: whether all workers stop.
        self._stopping_flag = mmap.mmap(-1, 1)
        # Workers hold the end to read from, which ends when this process does, however it ends.
        self._lifeline, self._lifeline_writer = os.pipe()
        self._serving = False
        """Whether all workers have served."""
        self._stopping = False
        self._kill_at: float | None = None
        self._status = 0
        self._failure = ""

    def run(self) -> int:
        """Run the workers until all have ended after a signal, and return the exit status."""
        # The first worker migrates the database and finds mistakes in the configuration. The others follow.
        self._slots[0].due = time.monotonic()
        try:
            while not self._stopping or any(slot.pid for slot in self._slots):
                self._start_due(time.monotonic())
                for number in self._signals.wait(self._seconds_to_wait(), self._ready_pipes()):
                    self._handle_signal(number)
                self._note_serving()
                self._reap()
        finally:
            self._kill_all(signal.SIGKILL)
        if self._failure:
            raise WorkersFailed(self._failure)
        return self._status

    # Processes

    def _start_due(self, now: float) -> None:
        database = self._database
        if database is not None and database.due is not None and database.due <= now and not self._stopping:
            database.start()
        if self._alive_due is not None and self._alive_due <= now:
            self._manager.tell(ALIVE)
            self._alive_due = now + (self._manager.watchdog_interval or 0)
        for slot in self._slots:
            if slot.due is not None and slot.due <= now:
                slot.due = None
                self._start(slot)
        if self._kill_at is not None and self._kill_at <= now:
            self._kill_at = None
            logger.error("workers did not stop in time, and are killed")
            self._kill_all(signal.SIGKILL)

    def _start(self, slot: WorkerSlot) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal between the fork and the worker's own handlers waits until it has them.
        signal.pthread_sigmask(signal.SIG_BLOCK, QUEUED)
        pid = os.fork()
        if pid == 0:
            self._become_worker(slot, reader, writer)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, QUEUED)
        os.close(writer)
        slot.pid, slot.ready_pipe = pid, reader
        slot.starts += 1

    def _become_worker(self, slot: WorkerSlot, reader: int, writer: int) -> NoReturn:
        """Run the worker in the new process, and end it."""
        status = 1
        try:
            self._signals.close_in_child()
            # Ctrl-C in a terminal is for the supervisor alone, which passes it on.
            os.setpgid(0, 0)
            # Some terminals stop processes outside of the foreground group when they write.
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            for descriptor in (reader, self._lifeline_writer, *self._ready_pipes()):
                os.close(descriptor)
            held, number = self._held, slot.number
            held.close_others(number)
            worker = Worker(
                number=number,
                count=len(self._slots),
                restarts=slot.starts,
                listeners=held.listeners,
                udp_sockets=held.udp[number],
                steered=held.steered,
                webtransport_port=held.webtransport_port,
                siblings=SiblingClient(number, list(held.sibling_paths)),
                all_stopping=lambda: self._stopping_flag[0] == 1,
            )
            status = self._run_worker(
                WorkerProcess(worker, self._config, held.siblings[number], writer, self._lifeline)
            )
        except BaseException:  # noqa: BLE001 (nothing else would report it)
            traceback.print_exc()
        finally:
            # No cleanup of the supervisor's contexts, which are this process's, too.
            os._exit(status)

    def _reap(self) -> None:
        """Wait for the children that have ended. As process 1, this one also gets the children of others."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            status = os.waitstatus_to_exitcode(status)
            for slot in self._slots:
                if slot.pid == pid:
                    self._handle_end(slot, status)
            if self._database is not None and self._database.pid == pid:
                self._database.record_end(status, time.monotonic())

    def _handle_end(self, slot: WorkerSlot, status: int) -> None:
        """Start a worker again that has ended, or end the broker."""
        pid, slot.pid = slot.pid, None
        self._close_ready_pipe(slot)
        if self._stopping:
            return
        now = time.monotonic()
        if status == 0:
            # An operator has restarted it.
            logger.info("a worker stopped, starting it again", worker=slot.number, pid=pid)
            slot.due = now
            return
        delay = slot.policy.record_death(now)
        if not any(each.has_served for each in self._slots) and status > 0:
            # It has written the reason.
            self._stop(status)
        elif delay is None:
            self._failure = f"worker {slot.number} died {MAX_DEATHS} times in {PERIOD:g} s, the last time with {status}"
            self._stop(1)
        else:
            logger.error("a worker died, starting it again", worker=slot.number, pid=pid, status=status, delay=delay)
            slot.due = now + delay

    # Readiness

    def _ready_pipes(self) -> list[int]:
        return [slot.ready_pipe for slot in self._slots if slot.ready_pipe is not None]

    def _note_serving(self) -> None:
        """Note which workers serve. When the first one does, start the others; when all do, report it once."""
        for slot in self._slots:
            if slot.ready_pipe is None:
                continue
            os.set_blocking(slot.ready_pipe, False)
            with suppress(BlockingIOError):
                if os.read(slot.ready_pipe, 1):
                    slot.has_served = True
                self._close_ready_pipe(slot)
        if self._stopping or not self._slots[0].has_served:
            return
        for slot in self._slots:
            if not slot.starts and slot.due is None:
                slot.due = time.monotonic()
        if not self._serving and all(slot.has_served for slot in self._slots):
            self._serving = True
            self._on_serving(self._held.addresses)
            self._manager.tell(READY)

    def _close_ready_pipe(self, slot: WorkerSlot) -> None:
        if slot.ready_pipe is not None:
            os.close(slot.ready_pipe)
            slot.ready_pipe = None

    def _seconds_to_wait(self) -> float | None:
        times = [slot.due for slot in self._slots if slot.due is not None]
        times += [each for each in (self._kill_at, self._alive_due) if each is not None]
        if self._database is not None and self._database.due is not None and not self._stopping:
            times.append(self._database.due)
        return min(times) - time.monotonic() if times else None

    # Signals

    def _handle_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGCHLD:
            return
        if number == signal.SIGHUP and self._reloads:
            self._manager.tell_reloading()
            self._kill_all(number)
            self._manager.tell(READY)
        elif not self._stopping:
            logger.info("stopping", signal=number.name)
            self._stop(0)
        else:
            self._status = 128 + number
            self._kill_at = time.monotonic() + IMMEDIATE_STOP_TIME
            self._kill_all(signal.SIGINT)

    def _stop(self, status: int) -> None:
        """Have all workers drain, and then end with `status`."""
        self._stopping, self._status = True, status
        self._manager.tell(STOPPING)
        self._stopping_flag[0] = 1
        drain = self._config.drain
        self._kill_at = time.monotonic() + drain.delay + drain.window + drain.deadline + STOP_MARGIN
        for slot in self._slots:
            slot.due = None
        self._kill_all(signal.SIGTERM)

    def _kill_all(self, number: signal.Signals) -> None:
        for slot in self._slots:
            if slot.pid is not None:
                os.kill(slot.pid, number)
