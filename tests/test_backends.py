"""Coroutine tests run on Trio; those marked for anyio run on the backend that they ask for."""

from __future__ import annotations

import pytest
import sniffio
import trio
from hypothesis import given
from hypothesis import strategies as st


async def test_unmarked_tests_run_on_trio(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    assert sniffio.current_async_library() == "trio"
    await trio.sleep(3600)
    assert trio.current_time() == 3600
    nursery.start_soon(trio.sleep, 0)


@given(st.booleans())
async def test_hypothesis_runs_on_trio(example: bool) -> None:
    assert sniffio.current_async_library() == "trio", example


@pytest.mark.anyio
async def test_anyio_runs_on_its_own(anyio_backend_name: str) -> None:
    assert sniffio.current_async_library() == anyio_backend_name
