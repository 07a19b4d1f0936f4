"""Fixtures for pytest: name this module in `pytest_plugins`. Without an entry point, nobody gets them unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

try:
    import pytest
except ModuleNotFoundError as error:
    if error.name != "pytest":
        raise
    raise ModuleNotFoundError("catbus.testing.pytest needs pytest: pip install pytest", name=error.name) from None

from ..client import Bus, connect
from .servers import TestServer, open_test_server

OpenClient = Callable[..., AbstractAsyncContextManager[Bus]]


@pytest.fixture(scope="session")
def catbus_server() -> Iterator[TestServer]:
    """A broker for all tests of a run. What one publishes, others may see: give each its own channels."""
    with open_test_server() as server:
        yield server


@pytest.fixture
def catbus_broker() -> Iterator[TestServer]:
    """A broker for one test, with an empty log, in its own thread: the test may be on Trio, asyncio, or neither."""
    with open_test_server() as server:
        yield server


@pytest.fixture
def catbus_client(catbus_broker: TestServer) -> OpenClient:
    """Opens clients of `catbus_broker`, on Trio and on asyncio.

    `async with catbus_client("alice", read=("orders.*",), write=()) as bus`: whoever that is, and what it may; for the
    other options see `catbus.connect`.
    """

    def open_client(
        client_id: str | None = "test",
        *,
        read: tuple[str, ...] = ("*",),
        write: tuple[str, ...] = ("*",),
        **options: Any,
    ) -> AbstractAsyncContextManager[Bus]:
        return connect(catbus_broker.url, token=catbus_broker.token(client_id, read=read, write=write), **options)

    return open_client
