"""catbus.testing.BrokerMachine: it agrees with the broker, and with no broker that makes a mistake."""

from __future__ import annotations

import re
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.errors import Flaky

from catbus.testing import BrokerMachine, open_test_broker
from tests.fuzz.machines import QUICK, Count, run
from tests.fuzz.mistakes import MISTAKES, Patch

DOCUMENT = (Path(__file__).parents[2] / "docs" / "fuzzing.md").read_text(encoding="utf-8")

# What was found need not be made small: with mistakes that are made now and then only, it is another one each time.
FINDING = settings(QUICK, max_examples=300, phases=[Phase.generate])


def test_the_broker_does_what_the_model_does() -> None:
    count = Count()
    with open_test_broker() as broker:
        run(broker, QUICK, count)
    assert count.examples >= 12
    assert count.steps > 100


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(mistake: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BrokerMachine, "patience", 1.0)
    monkeypatch.setattr(BrokerMachine, "settling", 0.3)
    count = Count()
    with open_test_broker() as broker, monkeypatch.context() as patch:
        mistake(patch)
        with pytest.raises((AssertionError, ExceptionGroup, Flaky)):
            run(broker, FINDING, count)
    print(f"| {mistake.__name__.replace('_', ' ')} | {count.examples} | {count.steps} |")


def test_the_example_of_the_document() -> None:
    """As it is written there, but for where the broker is."""
    [example] = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    with open_test_broker() as broker:
        example = example.replace("what tokens are signed with", broker.secret).replace(
            "ws://127.0.0.1:8080/ws", broker.url
        )
        names: dict[str, Any] = {}
        exec(example, names)
        case = names["TestMyBroker"]
        case.settings = settings(QUICK, max_examples=2)
        result = unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())
    assert (result.testsRun, result.wasSuccessful()) == (1, True), result


def test_the_document_names_every_mistake() -> None:
    for mistake in MISTAKES:
        assert f"| {mistake.__name__.replace('_', ' ')} |" in DOCUMENT
