"""A worker that stops while others serve."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import catbus
from catbus.broker import HANDOVER_TIME, Broker
from catbus.endpoints.http.http_endpoint import HttpEndpoint
from catbus.processes.worker import Worker
from tests.brokers import CONFIG
from tests.endpoints.raw_peer import Peer

REQUEST = b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"


class NoSiblings:
    async def add_metrics(self, own: bytes) -> bytes:
        return own

    async def add_reports(self, own: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [own]


@pytest.mark.parametrize("all_stopping", [False, True])
async def test_accepted_connection_is_served_and_later_ones_wait_for_others(
    mock_clock: MockClock, all_stopping: bool
) -> None:
    """The clock stands still. If all workers stop, this one accepts while it drains, as one broker does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # What the child of a fork has: a descriptor of its own.
        worker = Worker(0, 2, 0, (listener.dup(),), (), False, None, NoSiblings(), lambda: all_stopping)
        async with trio.open_nursery() as nursery:
            broker: Broker = await nursery.start(partial(catbus.serve, CONFIG, worker=worker))
            endpoint = broker.replica.endpoints["websocket"]
            assert isinstance(endpoint, HttpEndpoint)
            early = await trio.open_tcp_stream(*listener.getsockname())
            while not endpoint.statistics().connections:
                await wait_all_tasks_blocked()
            broker.stop()
            await wait_all_tasks_blocked()
            if not all_stopping:
                await early.send_all(REQUEST)
                assert (await Peer(early).response()).body == b"ok"
                # The supervisor and the other workers listen on, so it can connect, and waits to be accepted.
                late = await trio.open_tcp_stream(*listener.getsockname())
                await wait_all_tasks_blocked()
                accepted, _ = listener.accept()
                accepted.close()
                await late.aclose()
                mock_clock.jump(HANDOVER_TIME)
            mock_clock.autojump_threshold = 0.01
        await early.aclose()
