"""Output that is not read or cannot be written: nothing waits for it, and lost lines are counted."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from catbus.cli import line_writer
from catbus.cli.line_writer import LineWriter
from catbus.cli.log_configuration import LINES_DROPPED, configure_logging
from catbus.observability.loggers import dropped_log_lines, get_logger
from tests.cli.conftest import Command, Start, next_event

PATIENCE = 60
SMALLEST_PIPE = 4096


class Pipe:
    """A pipe of the smallest size of the kernel."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)

    def fill(self) -> None:
        """Write until the pipe is full."""
        os.set_blocking(self.writer, False)
        try:
            while True:
                os.write(self.writer, b"." * (SMALLEST_PIPE // 4 - 1) + b"\n")
        except BlockingIOError:
            os.set_blocking(self.writer, True)

    def read_lines(self) -> Iterator[bytes]:
        """Yield lines until the other end is closed."""
        with os.fdopen(os.dup(self.reader), "rb") as file:
            yield from (line for line in file if not line.startswith(b"."))

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def ask(port: int, path: str, times: int = 1) -> bytes:
    """Return the response to the last of `times` requests."""
    request = f"GET {path} HTTP/1.1\r\nHost: test\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        sender = threading.Thread(
            target=connection.sendall,
            args=(f"{request}\r\n".encode() * (times - 1) + f"{request}Connection: close\r\n\r\n".encode(),),
        )
        sender.start()
        answers = b""
        while data := connection.recv(1 << 16):
            answers = (answers + data)[-100_000:]
        sender.join()
    return answers


def serving(start: Start, stdout: int, tmp_path: Path) -> tuple[subprocess.Popen[str], int]:
    """Start a broker that logs every request to `stdout`. Return its port, which it prints on stderr."""
    config = tmp_path / "catbus.toml"
    config.write_text("[logging]\nlevels = 'catbus=debug'\n")
    process = start("run", "--config", str(config), "--ws-bind", "127.0.0.1:0", stdout=stdout)
    assert process.stderr is not None
    found = next(filter(None, (re.search(r"ws://127.0.0.1:(\d+)/ws", line) for line in process.stderr)))
    return process, int(found[1])


def dropped(port: int) -> int:
    found = re.search(rb"^catbus_output_lines_dropped_total (\S+)$", ask(port, "/metrics"), re.MULTILINE)
    assert found
    return int(float(found[1]))


def test_broker_with_unread_output_serves_counts_and_stops(start: Start, tmp_path: Path, pipe: Pipe) -> None:
    pipe.fill()
    process, port = serving(start, pipe.writer, tmp_path)
    while not dropped(port):
        assert b" 404 " in ask(port, f"/{'x' * 200}", times=500)
    assert b" 200 " in ask(port, "/health")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 0


def test_notice_counts_dropped_lines_when_the_output_is_read_again(start: Start, tmp_path: Path, pipe: Pipe) -> None:
    pipe.fill()
    process, port = serving(start, pipe.writer, tmp_path)
    while not dropped(port):
        ask(port, f"/{'x' * 200}", times=500)
    missing = dropped(port)
    lines = pipe.read_lines()
    events = map(json.loads, lines)
    report = next(event for event in events if event["event"] == LINES_DROPPED)
    assert (report["level"], report["logger"]) == ("warning", "catbus.logs")
    # This includes the line of the request for the metrics.
    assert report["number"] >= missing
    assert dropped(port) == report["number"]
    assert next(events)["event"] == "request"
    process.send_signal(signal.SIGTERM)
    assert next(event for event in events if event["event"] == "stopped")
    assert process.wait(timeout=PATIENCE) == 0


def test_broker_survives_the_end_of_its_reader(start: Start, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process, port = serving(start, writer, tmp_path)
    os.close(writer)
    os.close(reader)
    while not dropped(port):
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_subscriber_with_unread_output_stops(start: Start, catbus: Command, tmp_path: Path, pipe: Pipe) -> None:
    broker = start("run", "--database", "memory", "--ws-bind", "127.0.0.1:0")
    [url] = next_event(broker, "serving")["urls"]
    pipe.fill()
    subscriber = start("sub", "a", "--verbose", "--url", url, stdout=pipe.writer)
    assert subscriber.stderr is not None
    assert subscriber.stderr.readline().startswith("catbus: subscribed to a")
    assert catbus("pub", "a", "1", "--url", url).status == 0
    subscriber.send_signal(signal.SIGTERM)
    assert subscriber.wait(timeout=PATIENCE) == 0


def test_subscriber_with_unread_stderr_continues(start: Start, catbus: Command, tmp_path: Path, pipe: Pipe) -> None:
    broker = start("run", "--database", "memory", "--ws-bind", "127.0.0.1:0")
    [url] = next_event(broker, "serving")["urls"]
    catbus("pub", "a", "1", "--url", url)
    pipe.fill()
    subscriber = start("sub", "a", "--verbose", "--since", "0", "--count", "1", "--url", url, stderr=pipe.writer)
    assert subscriber.stdout is not None
    assert json.loads(subscriber.stdout.readline())["payload"] == 1
    assert subscriber.wait(timeout=PATIENCE) == 0


def test_lines_of_many_threads_stay_complete_and_in_order(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer)
    each = 500

    def write(name: int) -> None:
        for number in range(each):
            writer.put(b"%d %d\n" % (name, number))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    numbers: dict[bytes, list[int]] = {}
    lines = pipe.read_lines()
    for _ in range(each * len(threads)):
        name, number = next(lines).split()
        numbers.setdefault(name, []).append(int(number))
    assert list(numbers.values()) == [list(range(each))] * len(threads)
    writer.close()


def test_writer_waits_for_a_nonblocking_output(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    writer = LineWriter(pipe.writer)
    for number in range(5000):
        writer.put(b"%d\n" % number)
    lines = pipe.read_lines()
    assert [int(next(lines)) for _ in range(5000)] == list(range(5000))
    writer.close()


def test_unwritable_lines_are_counted_and_the_next_starts_on_a_new_line(
    monkeypatch: pytest.MonkeyPatch, pipe: Pipe
) -> None:
    writer, before, real = LineWriter(pipe.writer), dropped_log_lines.number, os.write
    failing = iter([5, 0])

    def write(descriptor: int, data: memoryview) -> int:
        try:
            size = next(failing)
        except StopIteration:
            return real(descriptor, data)
        if not size:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:size])

    monkeypatch.setattr(line_writer.os, "write", write)
    writer.put(b"torn off\n")
    writer.flush()
    writer.put(b"whole\n")
    lines = pipe.read_lines()
    assert [next(lines) for _ in range(3)] == [
        b"torn \n",
        b"whole\n",
        b"catbus: 1 lines were dropped, because the output was not read\n",
    ]
    assert dropped_log_lines.number == before + 1
    writer.close()
    writer.put(b"too late\n")
    assert dropped_log_lines.number == before + 2


def test_flush_waits_only_once_for_a_blocked_reader(monkeypatch: pytest.MonkeyPatch, pipe: Pipe) -> None:
    waits: list[float | None] = []
    real = threading.Condition.wait_for

    def wait_for(condition: threading.Condition, predicate: object, timeout: float | None = None) -> object:
        if timeout is not None:
            waits.append(timeout)
            timeout = 0
        return real(condition, predicate, timeout)  # type: ignore[arg-type]

    monkeypatch.setattr(threading.Condition, "wait_for", wait_for)
    pipe.fill()
    writer = LineWriter(pipe.writer)
    writer.put(b"x\n")
    writer.flush()
    writer.flush()
    writer.close()
    assert waits == [line_writer.FLUSH_TIMEOUT]
    # The thread must write the line while the descriptor still belongs to this pipe.
    assert next(pipe.read_lines()) == b"x\n"


def test_record_without_text_is_reported(pipe: Pipe) -> None:
    with os.fdopen(os.dup(pipe.writer), "w") as stream:
        configure_logging("debug", "json", stream)
        logging.getLogger("other").info("%d sheep", "x")
        get_logger("catbus.test").info("next")
        lines = pipe.read_lines()
        told, following = json.loads(next(lines)), json.loads(next(lines))
        assert (told["event"], told["logger"]) == ("a log line has no text: TypeError", "other")
        assert following["event"] == "next"
        line_writer.close_writers()
