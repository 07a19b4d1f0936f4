"""catbus.testing.BrokerMachine: it agrees with the broker, and with no broker that makes a mistake."""

from __future__ import annotations

import re
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml
from hypothesis import HealthCheck, settings
from trio.testing import MockClock

from catbus.cli.commands.fuzz import command
from catbus.testing import BrokerMachine, TestServer, open_test_broker, open_test_server
from catbus.testing.fuzz import FuzzTarget, fuzz
from tests.fuzz.mistakes import MISTAKES
from tests.mistakes import MistakePlanter

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "fuzzing.md").read_text(encoding="utf-8")
SEED = 1
LIMIT = 120.0
"""Seconds within which a mistake has to be found."""


def target(broker: TestServer) -> FuzzTarget:
    """All of its channels are ours."""
    return FuzzTarget([(broker.url, None)], secret=broker.secret, root="")


def test_broker_agrees_with_the_model() -> None:
    with open_test_server() as broker:
        result = fuzz(target(broker), 0, SEED)
    assert result.found is None
    assert result.examples >= 10
    assert result.steps > 100
    assert result.attacks > 10


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_machine_finds_a_planted_mistake(
    mistake: Callable[[MistakePlanter], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BrokerMachine, "reply_timeout", 1.0)
    monkeypatch.setattr(BrokerMachine, "delivery_timeout", 0.3)
    with open_test_server() as broker, monkeypatch.context() as patch:
        planter = MistakePlanter(patch)
        mistake(planter)
        result = fuzz(target(broker), LIMIT, SEED)
        planter.check()
    assert result.found is not None, result
    print(f"| {mistake.__name__.replace('_', ' ')} | {SEED} | {result.examples} | {result.steps} |")


EXAMPLES = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


async def test_outage_of_the_document_runs(autojump_clock: MockClock) -> None:
    names: dict[str, Any] = {"open_test_broker": open_test_broker, "trio": trio}
    exec(EXAMPLES[0], names)
    await names["test_an_outage"](autojump_clock)


def test_machine_of_the_document_runs() -> None:
    """As it is written there, but for where the broker is."""
    with open_test_server() as broker:
        example = EXAMPLES[1].replace("what tokens are signed with", broker.secret)
        names: dict[str, Any] = {}
        exec(example.replace("ws://127.0.0.1:8080/ws", broker.url), names)
        case = names["TestMyBroker"]
        case.settings = settings(max_examples=2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        result = unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())
    assert (result.testsRun, result.wasSuccessful()) == (1, True), result


def test_fuzz_workflow_runs_the_documented_command() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "fuzz.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["fuzz"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ['make fuzz FUZZ_MINUTES="$FUZZ_MINUTES"']
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "python -m tests.fuzz --minutes $(FUZZ_MINUTES) --script found.py" in makefile
    kept = {step["with"]["path"] for step in steps if "path" in step.get("with", {})}
    [keep] = [option.default for option in command.params if option.name == "keep"]
    assert kept == {keep, "found.py"}


def test_document_names_every_planted_mistake() -> None:
    for mistake in MISTAKES:
        assert f"| {mistake.__name__.replace('_', ' ')} | {SEED} |" in DOCUMENT
