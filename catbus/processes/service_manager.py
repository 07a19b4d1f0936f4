"""What a service manager such as systemd is told: that the broker serves, reloads, stops, and lives (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress

READY = "READY=1"
STOPPING = "STOPPING=1"
ALIVE = "WATCHDOG=1"


class ServiceManager:
    """The manager that has started this process, or nobody, who is told nothing.

    The constructor removes the variables of the protocol from `environ`: programs that this process starts are no
    services.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        # With @, the socket is in Linux's abstract namespace (unix(7)).
        self._address = "\0" + address[1:] if address.startswith("@") else address
        period, process = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        for_this = process in ("", str(os.getpid()))
        self.watchdog_interval = int(period) / 2e6 if self._address and for_this and period.isdecimal() else None
        """Seconds after which it wants another `ALIVE`: half of the time after which it kills. None: it wants none."""

    def tell(self, *states: str) -> None:
        """Send states, without waiting. A manager that does not listen any more misses them."""
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            sender.sendto("\n".join(states).encode(), self._address)

    def tell_reloading(self) -> None:
        """Send that a reload begins. `READY` ends it."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
