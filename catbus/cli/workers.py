"""`catbus run --workers`: the number of workers, and what each of them does in its own process."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path

import structlog
import trio

from ..config import Config
from ..errors import ConfigError
from ..processes.service_manager import ServiceManager
from ..processes.supervisor import supervise
from ..processes.worker_process import WorkerProcess, serve_worker
from .line_writer import close_writers, use_threads

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def worker_count(config: Config) -> int:
    """Return the number of workers of a configuration. Raises `ConfigError` if its log cannot be shared."""
    wanted = config.run.workers
    if wanted == 1:
        return 1
    if config.database.url == "memory":
        raise ConfigError(
            "several workers need a log that they share, but this one is in memory: give --database embedded or a URL, "
            "or --workers 1"
        )
    return min(usable_cores(), 128) if wanted == "auto" else int(wanted)


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA.read_text(encoding="ascii").split()
        return cores if quota == "max" else max(1, min(cores, ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def run_workers(
    config: Config,
    count: int,
    configure_logs: Callable[[], None],
    reload: Callable[[], None],
    on_serving: Callable[[list[tuple[str, str]]], None],
    explain: Callable[[BaseException], tuple[int, str]],
    manager: ServiceManager,
) -> int:
    """Supervise `count` workers, and return the exit status. The writers of this process must have no thread.

    `configure_logs` and `reload` are called in each worker, `on_serving` with the addresses in this process.
    """
    return supervise(config, count, partial(_run_worker, configure_logs, reload, explain), on_serving, manager)


def _run_worker(
    configure_logs: Callable[[], None],
    reload: Callable[[], None],
    explain: Callable[[BaseException], tuple[int, str]],
    process: WorkerProcess,
) -> int:
    """Run a worker in this process, which was forked for it, and return its exit status."""
    try:
        use_threads(True)
        # The workers share an output, so each line has the number of its worker.
        structlog.contextvars.bind_contextvars(worker=process.worker.number)
        configure_logs()
        trio.run(partial(serve_worker, process, reload=reload, on_serving=freeze_garbage_collector))
    except BaseException as error:  # noqa: BLE001 (it is reported)
        close_writers()
        if "--debug" in sys.argv[1:2]:
            traceback.print_exception(error)
        status, text = explain(error)
        if text:
            print(f"catbus: worker {process.worker.number}: {text}", file=sys.stderr, flush=True)
        return status
    close_writers()
    return 0


def freeze_garbage_collector() -> None:
    """Have the collector visit what exists now no more, because it lives until the end, and the rest only rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
