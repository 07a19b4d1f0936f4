"""Fixtures for pytest: name this module in `pytest_plugins`. Without an entry point, nobody gets them unasked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .brokers import TestBroker, open_test_broker


@pytest.fixture(scope="session")
def catbus_server() -> Iterator[TestBroker]:
    """A broker for all tests of a run. What one publishes, others may see: give each its own channels."""
    with open_test_broker() as broker:
        yield broker


@pytest.fixture
def catbus_broker() -> Iterator[TestBroker]:
    """A broker for one test, with an empty log."""
    with open_test_broker() as broker:
        yield broker
