"""Fixtures that run the command in this process, or in a process of its own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import structlog

from catbus.cli import main


class Outcome(NamedTuple):
    status: object
    output: str
    errors: str


Command = Callable[..., Outcome]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logger.level for name, logger in root.manager.loggerDict.items() if hasattr(logger, "level")}
    yield
    root.handlers[:], root.level = handlers, level
    for name in root.manager.loggerDict:
        logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DATABASE_URL", "RUST_LOG", "PYTHONWARNINGS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SECRET", "ADMIN_KEY", "CERT", "KEY", "BIND", "WS_BIND", "LISTEN_URL", "LOG", "URL", "TOKEN"):
        monkeypatch.delenv(f"CATBUS_{name}", raising=False)
    monkeypatch.setenv("CATBUS_STATE", str(tmp_path / "state"))


@pytest.fixture
def catbus(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command. Return its exit status and output."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["catbus", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        output, errors = capfd.readouterr()
        return Outcome(leaving.value.code or 0, output, errors)

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Run the command in a process that ends with the test."""
    processes = []

    def run(
        *arguments: str,
        state: Path = tmp_path / "state",
        secret: str = "",
        variables: Mapping[str, str] = MappingProxyType({}),
        program: Sequence[str] = (sys.executable, "-m", "catbus"),
        **options: Any,
    ) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CATBUS_")}
        environment |= {"CATBUS_SECRET": secret} if secret else {}
        process = subprocess.Popen(
            [*program, *arguments],
            env={**environment, "CATBUS_STATE": str(state), **variables},
            stdin=subprocess.PIPE,
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def next_event(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == name:
            return event
    pytest.fail(f"it ended without {name!r}: {process.communicate()}")


class Running(NamedTuple):
    url: str
    process: subprocess.Popen[str]
    state: Path


@pytest.fixture
def broker(start: Start, tmp_path: Path) -> Running:
    config = tmp_path / "catbus.toml"
    config.write_text("[drain]\ndelay = 0\nwindow = 0\n")
    process = start("run", "--config", str(config), "--database", "memory", "--ws-bind", "127.0.0.1:0")
    [url] = next_event(process, "serving")["urls"]
    return Running(url, process, tmp_path / "state")
