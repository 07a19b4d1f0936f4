"""catbus.testing.BrokerMachine: it agrees with the broker, and with no broker that makes a mistake."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import Phase, settings
from hypothesis.errors import Flaky

from catbus.testing import machine as machine_module
from catbus.testing import open_test_broker
from tests.fuzz.machines import QUICK, Count, run
from tests.fuzz.mistakes import MISTAKES, Patch

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
    monkeypatch.setattr(machine_module, "PATIENCE", 1.0)
    monkeypatch.setattr(machine_module, "SETTLING", 0.3)
    count = Count()
    with open_test_broker() as broker, monkeypatch.context() as patch:
        mistake(patch)
        with pytest.raises((AssertionError, ExceptionGroup, Flaky)):
            run(broker, FINDING, count)
    print(f"| {mistake.__name__.replace('_', ' ')} | {count.examples} | {count.steps} |")
