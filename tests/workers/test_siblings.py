"""What workers ask each other over Unix sockets."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from catbus.processes import siblings
from catbus.processes.siblings import METRICS, REPORT, Reply, SiblingClient, serve_siblings


class Siblings:
    """Three workers, of which this process is worker 1, and what the others answer."""

    def __init__(self, directory: Path) -> None:
        self.paths = [directory / str(number) for number in range(3)]
        self.asked = 0
        self.client = SiblingClient(1, self.paths)

    def listen(self, number: int) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self.paths[number]))
        sock.listen()
        return sock

    def report(self, number: int) -> bytes:
        self.asked += 1
        return b'{"pid":%d}' % number


@asynccontextmanager
async def others(
    directory: Path, silent: tuple[int, ...] = (), replies: Mapping[str, Reply] | None = None
) -> AsyncIterator[Siblings]:
    """`silent` workers listen and do not answer."""
    with trio.fail_after(30), ExitStack() as listeners:
        async with trio.open_nursery() as nursery:
            found = Siblings(directory)
            for number in (0, 2):
                listener = listeners.enter_context(found.listen(number))
                if number in silent:
                    continue
                answers = replies or {REPORT: lambda number=number: found.report(number)}  # type: ignore[misc]
                await nursery.start(serve_siblings, listener, answers)
            yield found
            nursery.cancel_scope.cancel()


async def test_reports_of_all_workers_are_in_order(tmp_path: Path) -> None:
    async with others(tmp_path) as found:
        reports = await found.client.add_reports({"pid": 1})
        assert reports == [{"worker": number, "pid": number} for number in range(3)]


async def test_replies_are_used_again_for_a_second(tmp_path: Path) -> None:
    async with others(tmp_path) as found:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(found.client.add_reports, {})
        assert found.asked == 2
        while found.asked == 2:
            await found.client.add_reports({})
        assert found.asked == 4


async def test_worker_without_an_answer_is_silent_and_delays_no_other(tmp_path: Path) -> None:
    async with others(tmp_path, silent=(0,)) as found:
        reports = await found.client.add_reports({"pid": 1})
        assert reports == [{"worker": 0, "state": "silent"}, {"worker": 1, "pid": 1}, {"worker": 2, "pid": 2}]
        assert b'catbus_worker_up{worker="0"} 0.0\n' in await found.client.add_metrics(b"")


async def test_worker_that_does_not_listen_is_silent(tmp_path: Path) -> None:
    reports = await SiblingClient(0, [tmp_path / "0", tmp_path / "1"]).add_reports({})
    assert reports == [{"worker": 0}, {"worker": 1, "state": "silent"}]


@pytest.mark.parametrize("reply", ["too long", "an exception"])
async def test_reply_that_cannot_be_used_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: str
) -> None:
    monkeypatch.setattr(siblings, "MAX_REPLY_SIZE", 1000)

    def answer() -> bytes:
        if reply == "an exception":
            raise RuntimeError
        return b" " * 1001

    async with others(tmp_path, replies={METRICS: answer, REPORT: answer}) as found:
        reports = await found.client.add_reports({})
        assert [report.get("state") for report in reports] == ["silent", None, "silent"]
        # They go on answering.
        assert b'{worker="2"} 0.0' in await found.client.add_metrics(b"")


async def test_other_requests_are_not_answered(tmp_path: Path) -> None:
    async with others(tmp_path) as found:
        for request in (b"other\n", b"x" * 1000):
            async with await trio.open_unix_socket(found.paths[0]) as stream:
                await stream.send_all(request)
                # It may have closed the connection without reading the rest.
                with suppress(trio.BrokenResourceError):
                    assert await stream.receive_some() == b""
