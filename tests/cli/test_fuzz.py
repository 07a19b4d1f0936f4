"""`catbus fuzz`: its output for a correct broker, and for a broker with a planted mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from catbus.testing import BrokerMachine, TestServer, fuzz, open_test_server
from tests.fuzz import mistakes
from tests.mistakes import MistakePlanter

from .conftest import Command

ROOT = Path(__file__).parents[2]
SHORT = ("--minutes", "0.01", "--seed", "1")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "EXAMPLES", 4)


@pytest.fixture
def broker() -> Iterator[TestServer]:
    with open_test_server(webtransport=True) as found:
        yield found


@pytest.fixture
def mistaken(broker: TestServer, monkeypatch: pytest.MonkeyPatch) -> TestServer:
    monkeypatch.setattr(BrokerMachine, "reply_timeout", 1.0)
    monkeypatch.setattr(BrokerMachine, "delivery_timeout", 0.1)
    mistakes.deliver_after_unsubscribe(MistakePlanter(monkeypatch))
    return broker


def test_correct_broker_has_no_failure(broker: TestServer, catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATBUS_SECRET", broker.secret)
    status, output, errors = catbus("fuzz", "--url", broker.url, *SHORT)
    assert (status, output[:13]) == (0, "no failure in"), output + errors
    assert f"fuzzing {broker.url}, {broker.webtransport_url} for 0.01 min, seed 1" in errors
    assert broker.secret not in output + errors


def test_fuzzing_continues_without_udp(catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_test_server() as server:
        monkeypatch.setattr(fuzz, "_discover", lambda url, ca: ("https://127.0.0.1:9", None))
        status, _, errors = catbus("fuzz", "--url", server.url, "--secret", server.secret, *SHORT)
    assert status == 0
    assert errors.splitlines()[0].startswith("catbus: cannot connect to https://127.0.0.1:9: ")
    assert f"fuzzing {server.url} for 0.01 min" in errors


def test_token_is_sufficient_without_a_secret(broker: TestServer, catbus: Command) -> None:
    token = broker.token("fuzzer", read=("mine.*",), write=("mine.*",))
    status, output, _ = catbus("fuzz", "--url", broker.url, "--token", token, "--root", "mine", *SHORT)
    assert (status, output[:10]) == (0, "no failure")

    status, output, errors = catbus("fuzz", "--url", broker.url, "--token", token, *SHORT)
    assert (status, output) == (1, "")
    assert "fuzz.*: no read grant covers this pattern (unauthorized)" in errors


def test_failure_is_printed_with_a_script_that_reproduces_it(
    mistaken: TestServer, catbus: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CATBUS_SECRET", mistaken.secret)
    status, output, errors = catbus("fuzz", "--url", mistaken.url, "--seed", "1", "--script", "again.py")
    assert status == 1
    assert output.startswith("failure in "), output
    assert "These steps reproduce it.\nThe script is in again.py.\n" in output
    assert mistaken.secret not in output + errors + (tmp_path / "again.py").read_text()

    def run() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "again.py"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 1
    assert "AssertionError" in done.stderr
    # The example is small: a client subscribes twice or unsubscribes, and a message is published.
    assert (tmp_path / "again.py").read_text().count("        ('") <= 8

    # The kept example fails immediately. The examples before it are not counted.
    status, output, _ = catbus("fuzz", "--url", mistaken.url, "--seed", "2")
    assert status == 1
    assert "\nimport os\n" in output

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CATBUS_SECRET", mistaken.secret)
    done = run()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (("--url", "http://127.0.0.1/"), 2, "--url: the URL of a broker begins with ws://"),
        (("--url", "ws://10.0.0.1/ws"), 2, "give --token, or set CATBUS_SECRET"),
        (("--root", "a..b"), 2, "--root: "),
        (("--minutes", "0"), 2, "'--minutes'"),
        (("--url", "ws://127.0.0.1:9/ws", "--secret", "x"), 1, "cannot connect to ws://127.0.0.1:9/ws"),
    ],
)
def test_wrong_usage_is_an_error(catbus: Command, arguments: tuple[str, ...], status: int, part: str) -> None:
    found = catbus("fuzz", *arguments)
    assert found.status == status
    assert part in found.errors
    assert len(found.errors.splitlines()) == 1
