"""What is measured is measured to the end, and all of it arrives. What the figures are here says nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
PATIENCE = 120
AT_A_TIME = 3
"""Programs that run beside each other: most of the time each of them waits."""

FANOUT = "fanout.py --subscribers 4 --messages 40 --rates 20 --seconds 0.5 --repeat 1"
PROGRAMS = {
    "fanout websocket": f"{FANOUT} --transport websocket",
    "fanout sse": f"{FANOUT} --transport sse",
    "fanout webtransport": f"{FANOUT} --transport webtransport",
    "publish_sql": "publish_sql.py --rates 20 --seconds 0.3",
    "soak": "soak.py --minutes 0.02 --every 0.4 --age 5 --rate 100 --held yes",
    "stalled": "stalled_subscribers.py --subscribers 20 --fill 2e6 --seconds 0.5 --repeat 1",
    "behind": "catch_up.py --sessions 40 --messages 500 --channels 20 --processes 2 --seconds 1",
    "consumers": "consumers.py --messages 300 --seconds 0.3 --repeat 1 --workers 1 --batches 10 --rate 20",
    "retained": "retained.py --channels 300 --others 2 --seconds 0.3 --repeat 1 --database memory",
    "presence": "presence.py --rate 20 --seconds 0.5 --members 0",
    "storm": "reconnect_storm.py --clients 10 --rate 10",
    "rolling": "rolling_restart.py --sessions 8 --replicas 2 --delay 0 --window 0 --svg rolling.svg",
}

Outputs = dict[str, Future[list[str]]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def outputs(directory: Path) -> Iterator[Outputs]:
    """The lines that each program writes."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {name: pool.submit(run, command, directory) for name, command in PROGRAMS.items()}


def run(command: str, directory: Path) -> list[str]:
    program, *options = command.split()
    done = subprocess.run(
        [sys.executable, BENCH / program, *options],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("transport", "servers"),
    [
        ("websocket", ["catbus", "bare"]),
        ("sse", ["catbus", "websocket", "bare"]),
        ("webtransport", ["catbus", "bare"]),
    ],
)
def test_fanout(outputs: Outputs, transport: str, servers: list[str]) -> None:
    lines = outputs[f"fanout {transport}"].result()
    assert [line.split()[-6] for line in lines[-2 * len(servers) :]] == servers * 2


def test_publish_sql(outputs: Outputs) -> None:
    lines = outputs["publish_sql"].result()
    assert [line.split()[:2] for line in lines[-3:]] == [["20", "-"], ["20", "open,"], ["20", "open,"]]


def test_soak(outputs: Outputs) -> None:
    lines = outputs["soak"].result()
    assert [line.split()[0] for line in lines[-5:]] == ["0.4", "0.8", "1.2", "middle", "last"]


def test_stalled(outputs: Outputs) -> None:
    lines = outputs["stalled"].result()
    assert [line.split()[0] for line in lines[-4:-2]] == ["none", "stalled"]


def test_behind(outputs: Outputs) -> None:
    lines = outputs["behind"].result()
    assert [line.split()[0] for line in lines[-6:-2]] == ["calm", "entering", "behind", "after"]


def test_presence(outputs: Outputs) -> None:
    assert [line.split()[0] for line in outputs["presence"].result()[-3:]] == ["one:", "two:", "PostgreSQL,"]


def test_retained(outputs: Outputs) -> None:
    lines = outputs["retained"].result()
    assert [line.split()[0] for line in lines[-4:-2]] == ["none", "snapshots"]
    assert any("snapshots of 300 channels" in line for line in lines)


def test_consumers(outputs: Outputs) -> None:
    lines = outputs["consumers"].result()
    assert lines[5].split()[:2] == ["1", "10"]
    assert any("1 of 1000 channels: 1 of 300 messages" in line for line in lines)
    loads = ["no workers", "effects alone", "following", "catching up", "skip locked"]
    assert [line[:14].strip() for line in lines[-7:-2]] == loads


def test_storm(outputs: Outputs) -> None:
    lines = outputs["storm"].result()[-3:]
    assert lines[0].startswith("10 clients over websocket, SIGKILL: 10 back, ")
    assert lines[2].endswith("lost 0, repeated 0")


def test_rolling(outputs: Outputs, directory: Path) -> None:
    assert outputs["rolling"].result()[-1] == "lost 0, repeated 0"
    assert (directory / "rolling.svg").read_text().startswith("<svg")
