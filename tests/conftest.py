"""What all tests share."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import settings

pytest_plugins = ["tests.postgres.server"]

# The machines that run this are shared: how long an example takes says nothing.
settings.register_profile("catbus", deadline=None, print_blob=True)
settings.load_profile("catbus")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run coroutine tests on Trio, except those that anyio's plugin runs on a backend of their own.

    pytest-trio's `trio_mode` would take those too, and run them on Trio whatever their backend says.
    """
    for item in items:
        test = getattr(item, "obj", None)
        test = getattr(getattr(test, "hypothesis", None), "inner_test", test)
        if inspect.iscoroutinefunction(test) and item.get_closest_marker("anyio") is None:
            item.add_marker(pytest.mark.trio)
