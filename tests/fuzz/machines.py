"""Machines that are counted, and the runs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from catbus.testing import BrokerMachine, Dialled, TestBroker, dial

QUICK = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    report_multiple_bugs=False,
    print_blob=False,
)


@dataclass
class Count:
    """Examples that were begun, and steps of all of them: after each one everybody's messages were compared."""

    examples: int = 0
    steps: int = 0


def run(broker: TestBroker, how: settings, count: Count) -> None:
    """Raises what the machine finds."""

    class Machine(BrokerMachine):
        secret = broker.secret

        def __init__(self) -> None:
            super().__init__()
            count.examples += 1

        def connect(self) -> Dialled:
            return dial(broker.url)

        def check_invariants(self, *args: Any, **kwargs: Any) -> None:
            count.steps += 1
            super().check_invariants(*args, **kwargs)

    run_state_machine_as_test(Machine, settings=how)
