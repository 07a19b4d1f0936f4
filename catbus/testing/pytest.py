"""Fixtures for pytest: name this module in `pytest_plugins`. Installing Catbus alone does not activate them."""

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
from .broker_in_thread import TestServer, open_test_server

OpenClient = Callable[..., AbstractAsyncContextManager[Bus]]


@pytest.fixture(scope="session")
def catbus_server() -> Iterator[TestServer]:
    """A broker for all tests of a run. Tests see each other's messages, so each should use its own channels."""
    with open_test_server() as server:
        yield server


@pytest.fixture
def catbus_broker() -> Iterator[TestServer]:
    """A broker for one test, with an empty log, in its own thread. The test may use Trio, asyncio, or neither."""
    with open_test_server() as server:
        yield server


@pytest.fixture
def catbus_client(catbus_broker: TestServer) -> OpenClient:
    """A function that opens clients of `catbus_broker`, on Trio and on asyncio.

        async with catbus_client("alice", read=("orders.*",), write=()) as bus: ...

    `read` and `write` are the client's grants. Other options are those of `catbus.connect`.
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
