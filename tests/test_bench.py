"""What is measured is measured to the end, and all of it arrives. What the figures are here says nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
PATIENCE = 120

FANOUT = ("fanout.py", "--subscribers", "4", "--messages", "40", "--rates", "20", "--seconds", "0.5", "--repeat", "1")

STALLED = ("stalled.py", "--subscribers", "20", "--fill", "2e6", "--seconds", "0.5", "--repeat", "1")
BEHIND = (
    "behind.py",
    "--sessions",
    "40",
    "--messages",
    "500",
    "--channels",
    "20",
    "--processes",
    "2",
    "--seconds",
    "1",
)


@pytest.mark.parametrize("transport", ["websocket", "webtransport"])
def test_fanout(transport: str) -> None:
    output = run(*FANOUT, "--transport", transport)
    assert [line.split()[-6] for line in output.splitlines()[-4:]] == ["catbus", "bare"] * 2


def test_publish_sql() -> None:
    output = run("publish_sql.py", "--rates", "20", "--seconds", "0.3")
    assert [line.split()[:2] for line in output.splitlines()[-3:]] == [["20", "-"], ["20", "open,"], ["20", "open,"]]


def test_soak() -> None:
    output = run("soak.py", "--minutes", "0.02", "--every", "0.4", "--age", "5", "--rate", "100", "--held", "yes")
    assert [line.split()[0] for line in output.splitlines()[-5:]] == ["0.4", "0.8", "1.2", "middle", "last"]


def test_stalled() -> None:
    output = run(*STALLED)
    assert [line.split()[0] for line in output.splitlines()[-4:-2]] == ["none", "stalled"]


def test_behind() -> None:
    output = run(*BEHIND)
    assert [line.split()[0] for line in output.splitlines()[-6:-2]] == ["calm", "entering", "behind", "after"]


def test_storm() -> None:
    lines = run("storm.py", "--clients", "10", "--rate", "10").splitlines()[-3:]
    assert lines[0].startswith("10 clients over websocket, SIGKILL: 10 back, ")
    assert lines[2].endswith("lost 0, repeated 0")


def test_rolling(tmp_path: Path) -> None:
    picture = tmp_path / "rolling.svg"
    options = ("--sessions", "8", "--replicas", "2", "--delay", "0", "--window", "0", "--svg", str(picture))
    output = run("rolling.py", *options)
    assert output.splitlines()[-1] == "lost 0, repeated 0"
    assert picture.read_text().startswith("<svg")


def run(program: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, BENCH / program, *options], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
