"""The embedded PostgreSQL of a broker with workers: a child of the supervisor, which starts it again when it dies."""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress

from ..observability.loggers import RateLimitedLog, get_logger
from ..postgres.embedded.server import FAST_SHUTDOWN_TIME, IMMEDIATE_SHUTDOWN_TIME, EmbeddedServer
from .signal_queue import SignalQueue

logger = get_logger("catbus.postgres")

RESTART_DELAY = 1.0
_POLL_INTERVAL = 0.02


class SupervisedDatabase:
    """The process of an embedded server. Its owner waits for all children, and reports the end of this one."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.url = server.url
        self.due: float | None = None
        """The monotonic time of the next start, while it does not run."""
        self.pid: int | None = None
        self._server = server
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths = RateLimitedLog(logger.error)

    def start(self) -> None:
        with self._server.log_file.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603
                self._server.command, stdout=log, stderr=subprocess.STDOUT, **self._server.popen_options
            )
        self.pid, self.due = self._process.pid, None

    def wait_ready(self, signals: SignalQueue) -> bool:
        """Wait until it accepts connections. Return False after a signal to stop. Raises `ConfigError` if it ends."""
        assert self._process is not None
        while not self._server.is_ready(self._process.pid):
            if self._process.poll() is not None:
                self.pid = None
                raise self._server.failure()
            if {signal.SIGTERM, signal.SIGINT} & set(signals.wait(_POLL_INTERVAL)):
                return False
        logger.info("started the embedded database", pid=self.pid, server=str(self._server.binaries))
        return True

    def record_end(self, status: int, now: float) -> None:
        """Record that the process has ended, and when it is started again."""
        assert self._process is not None
        self._process.returncode = status
        self.pid, self.due = None, now + RESTART_DELAY
        file = str(self._server.log_file)
        self._deaths.log(now, "the embedded database died, starting it again", status=status, log=file)

    def stop(self) -> None:
        """Stop the server if it runs, and wait for it, for 20 s at most."""
        for number, patience in (
            (signal.SIGINT, FAST_SHUTDOWN_TIME),
            (signal.SIGQUIT, IMMEDIATE_SHUTDOWN_TIME),
            (signal.SIGKILL, IMMEDIATE_SHUTDOWN_TIME),
        ):
            if self._process is None or self._process.poll() is not None:
                break
            self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self.pid = None
