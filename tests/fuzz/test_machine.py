"""catbus.testing.BrokerMachine: it agrees with the broker, and with no broker that makes a mistake."""

from __future__ import annotations

import re
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from catbus.testing import BrokerMachine, TestServer, open_test_server
from catbus.testing.fuzz import Target, fuzz
from tests.fuzz.mistakes import MISTAKES, Patch

DOCUMENT = (Path(__file__).parents[2] / "docs" / "fuzzing.md").read_text(encoding="utf-8")
SEED = 1
LIMIT = 120.0
"""Seconds within which a mistake has to be found."""


def target(broker: TestServer) -> Target:
    """All of its channels are ours."""
    return Target([(broker.url, None)], secret=broker.secret, root="")


def test_the_broker_does_what_the_model_does() -> None:
    with open_test_server() as broker:
        tally = fuzz(target(broker), 0, SEED)
    assert tally.found is None
    assert tally.examples >= 10
    assert tally.steps > 100
    assert tally.attacks > 10


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(mistake: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BrokerMachine, "patience", 1.0)
    monkeypatch.setattr(BrokerMachine, "settling", 0.3)
    with open_test_server() as broker, monkeypatch.context() as patch:
        mistake(patch)
        tally = fuzz(target(broker), LIMIT, SEED)
    assert tally.found is not None, tally
    print(f"| {mistake.__name__.replace('_', ' ')} | {SEED} | {tally.examples} | {tally.steps} |")


def test_the_example_of_the_document() -> None:
    """As it is written there, but for where the broker is."""
    [example] = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    with open_test_server() as broker:
        example = example.replace("what tokens are signed with", broker.secret).replace(
            "ws://127.0.0.1:8080/ws", broker.url
        )
        names: dict[str, Any] = {}
        exec(example, names)
        case = names["TestMyBroker"]
        case.settings = settings(max_examples=2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        result = unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())
    assert (result.testsRun, result.wasSuccessful()) == (1, True), result


def test_the_document_names_every_mistake() -> None:
    for mistake in MISTAKES:
        assert f"| {mistake.__name__.replace('_', ' ')} | {SEED} |" in DOCUMENT
