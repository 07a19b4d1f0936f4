"""What all tests share: the event loop of coroutine tests, Hypothesis profiles, and the marker `integration`.

A test is an integration test if it is in an integration folder, if its module imports something that starts processes
or opens sockets, or if it uses a fixture that does. All others are unit tests: `make quick` runs them alone.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["tests.postgres.server"]

ROOT = Path(__file__).parents[1]

INTEGRATION_FOLDERS = frozenset(
    {
        "browser",
        "cli",
        "conformance",
        "foreign",
        "fuzz",
        "fuzz_bytes",
        "hostile",
        "javascript",
        "k8s",
        "openapi",
        "postgres",
        "simulation",
    }
)
INTEGRATION_IMPORTS = frozenset(
    {"h11", "multiprocessing", "socket", "subprocess", "tests.brokers", "tests.programs"}
    | {f"tests.{folder}" for folder in INTEGRATION_FOLDERS}
)
INTEGRATION_FIXTURES = frozenset({"catbus_broker", "catbus_server", "database_url"})

SLOW_TESTS = frozenset(
    {
        "TestDelivery",
        "TestLives",
        "TestSharers",
        "TestTreeAgainstPairs",
        "test_catching_up_meets_live_delivery_without_gap_or_repeat_in_20000_interleavings",
        "test_each_stream_delivers_exactly_the_sent_bytes",
        "test_frames_of_broker_and_library_are_never_mixed_or_lost",
        "test_library_reads_the_same_from_three_frames_split_anywhere",
        "test_stream_in_any_three_pieces_is_split",
    }
)
"""Unit tests of several seconds each, which `make quick` leaves out: exhaustive ones, and state machines."""

# The machines that run the tests are shared, so the time that an example takes means nothing.
settings.register_profile("catbus", deadline=None, print_blob=True)
settings.register_profile("quick", deadline=None, print_blob=True, max_examples=20)
settings.load_profile("catbus")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark integration tests, and run coroutine tests on Trio, except those that anyio's plugin runs.

    pytest-trio's `trio_mode` would take those too, and run them on Trio whatever their backend is.
    """
    for item in items:
        if not INTEGRATION_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())) or _is_integration_module(item.path):
            item.add_marker(pytest.mark.integration)
        # The class of a state machine has another name than the one that its module gives it.
        if not SLOW_TESTS.isdisjoint({item.name.partition("[")[0], getattr(item.parent, "name", "")}):
            item.add_marker(pytest.mark.slow)
        test = getattr(item, "obj", None)
        test = getattr(getattr(test, "hypothesis", None), "inner_test", test)
        if inspect.iscoroutinefunction(test) and item.get_closest_marker("anyio") is None:
            item.add_marker(pytest.mark.trio)


@cache
def _is_integration_module(path: Path) -> bool:
    if path.relative_to(ROOT).parts[1] in INTEGRATION_FOLDERS:
        return True
    return any(name == each or name.startswith(f"{each}.") for name in _imports(path) for each in INTEGRATION_IMPORTS)


def _imports(path: Path) -> Iterator[str]:
    """Yield the full names of everything that a test module imports, at its top or in a function."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [*(package[: -node.level] if node.level else ()), *filter(None, [node.module])]
            yield from (".".join([*parts, alias.name]) for alias in node.names)
