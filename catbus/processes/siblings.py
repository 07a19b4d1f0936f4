"""What workers ask each other over Unix sockets, so that each of them can answer for all.

A request is one line with the name of what is asked for; the reply is everything until the end of the connection. The
sockets are in a directory that only the broker's user can enter.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ..observability.loggers import RateLimitedLog, get_logger
from .merged_metrics import merge_metrics

REPLY_TIMEOUT = 0.5
"""Seconds for the reply of another worker. One whose event loop is blocked for longer is shown as not answering."""
MAX_REPLY_SIZE = 4 << 20
"""Bytes of a reply. A larger one counts as none."""
MAX_REPLY_AGE = 1.0
"""Seconds for which replies are used again, so that a client that asks often costs the other workers little."""
MAX_REQUEST_SIZE = 32

METRICS, REPORT = "metrics", "report"

Reply = Callable[[], bytes]

logger = get_logger("catbus.workers")


class SiblingClient:
    """Asks the other workers of a broker. `paths` are the sockets of all workers; `number` is this worker."""

    def __init__(self, number: int, paths: list[Path]) -> None:
        self._number = number
        self._paths = paths
        self._replies: dict[str, tuple[float, dict[int, bytes | None]]] = {}
        """By request, the last replies with the Trio time at which they were asked for."""
        self._asking = {METRICS: trio.Lock(), REPORT: trio.Lock()}

    async def add_metrics(self, own: bytes) -> bytes:
        """Return the metrics of all workers, each sample with the label `worker`. `own` are those of this one."""
        return merge_metrics(self._in_order(own, await self._ask_all(METRICS)))

    async def add_reports(self, own: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the descriptions of all workers. The state of a worker that does not answer is `silent`."""
        found = await self._ask_all(REPORT)
        reports: dict[int, Mapping[str, Any]] = self._in_order(own, found)
        return [
            {"worker": number, **({"state": "silent"} if report is None else _parse(report))}
            for number, report in reports.items()
        ]

    def _in_order(self, own: Any, others: Mapping[int, Any]) -> dict[int, Any]:
        return dict(sorted({**others, self._number: own}.items()))

    async def _ask_all(self, request: str) -> dict[int, bytes | None]:
        """Ask all other workers at the same time, unless their last replies are recent."""
        async with self._asking[request]:
            asked, replies = self._replies.get(request, (-MAX_REPLY_AGE, {}))
            if trio.current_time() - asked >= MAX_REPLY_AGE:
                asked, replies = trio.current_time(), {}
                async with trio.open_nursery() as nursery:
                    for number, path in enumerate(self._paths):
                        if number != self._number:
                            nursery.start_soon(self._ask, number, path, request, replies)
                self._replies[request] = asked, replies
            return replies

    async def _ask(self, number: int, path: Path, request: str, replies: dict[int, bytes | None]) -> None:
        replies[number] = None
        with trio.move_on_after(REPLY_TIMEOUT):
            try:
                async with await trio.open_unix_socket(path) as stream:
                    await stream.send_all(f"{request}\n".encode())
                    reply = bytearray()
                    async for data in stream:
                        reply += data
                        if len(reply) > MAX_REPLY_SIZE:
                            return
                replies[number] = bytes(reply) or None
            except (OSError, trio.BrokenResourceError):
                return


async def serve_siblings(
    listener: socket.socket,
    replies: Mapping[str, Reply],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the other workers on the listener socket until cancelled. Each of `replies` returns one at once."""
    sock = trio.socket.from_stdlib_socket(listener)
    task_status.started()
    failures = RateLimitedLog(logger.error)
    await trio.serve_listeners(partial(_reply, replies, failures), [trio.SocketListener(sock)])


async def _reply(replies: Mapping[str, Reply], failures: RateLimitedLog, stream: trio.SocketStream) -> None:
    with trio.move_on_after(REPLY_TIMEOUT):
        try:
            request = b""
            while not request.endswith(b"\n") and len(request) < MAX_REQUEST_SIZE:
                data = await stream.receive_some(MAX_REQUEST_SIZE)
                if not data:
                    return
                request += data
            found = replies.get(request.decode(errors="replace").strip())
            if found is not None:
                await stream.send_all(found())
        except trio.BrokenResourceError:
            return  # It has waited for long enough, or it died.
        except Exception as error:  # noqa: BLE001 (it is logged)
            failures.log(trio.current_time(), "answering another worker failed", exception=error)


def _parse(report: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(report) if isinstance(report, bytes) else report
    return found
