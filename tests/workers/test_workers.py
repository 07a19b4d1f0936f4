"""`catbus run --workers`: processes that share the ports, and what clients notice of their ends."""

from __future__ import annotations

import os
import random
import secrets
import signal
import sys
from contextlib import AsyncExitStack, suppress
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio

from catbus.cli import workers
from catbus.cli.development_credentials import CERTIFICATE_FILE
from catbus.client import Bus, connect
from catbus.config import Config, DatabaseSettings, RunSettings
from catbus.postgres.embedded.server import running_url
from tests import brokers
from tests.chaos.udp_relay import UdpRelay
from tests.cli.conftest import Command, Start, catbus, clean_environment, logging_as_before, next_event, start
from tests.postgres.processes import open_replicas, token
from tests.workers.__main__ import state_directory
from tests.workers.load import WorkerLoad
from tests.workers.processes import Samples, WorkerBroker, is_running, open_workers, threads, until

__all__ = ["catbus", "clean_environment", "logging_as_before", "start"]

PATIENCE = 60.0

MAIN = "from catbus.cli import main; main()"


async def connect_to_both(stack: AsyncExitStack, broker: WorkerBroker) -> tuple[Bus, Bus]:
    """A client on each worker."""
    found: dict[int, Bus] = {}
    for number in count():
        name = f"client-{number}"
        bus = await stack.enter_async_context(connect(broker.url, token=token(name), reconnect=False))
        await until(lambda name=name: broker.opened(name))  # type: ignore[misc]
        found.setdefault(broker.worker_of(name), bus)
        if len(found) == 2:
            break
    return found[0], found[1]


def count_webtransport(samples: Samples) -> float:
    """The sessions over WebTransport on all workers."""
    return sum(number for (_, transport), number in samples["catbus_sessions"].items() if transport == "webtransport")


async def run_status(url: str) -> str:
    """The output of `catbus status`."""
    command = [sys.executable, "-m", "catbus", "status", "--url", url, "--token", token("reader")]
    return (await trio.run_process(command, capture_stdout=True)).stdout.decode()


async def test_workers_share_a_port_messages_metrics_and_status(database_url: str) -> None:
    with trio.fail_after(PATIENCE):
        async with open_workers(database_url) as broker, AsyncExitStack() as stack:
            buses = await connect_to_both(stack, broker)
            # Of a message that is in the log, and of one that is not.
            for publisher, subscriber in (buses, reversed(buses)):
                for ephemeral in (False, True):
                    async with subscriber.subscribe("here") as messages:
                        await publisher.publish("here", 1, ephemeral=ephemeral)
                        assert (await anext(messages)).payload == 1

            published = {("0",): 2, ("1",): 2}
            samples = await broker.metrics_when(lambda samples: samples["catbus_publishes_total"] == published)
            assert samples["catbus_worker_up"] == {("0",): 1, ("1",): 1}
            assert all(samples["catbus_sessions"][number, "websocket"] > 0 for number in ("0", "1"))
            assert {labels[0] for labels in samples["process_resident_memory_bytes"]} == {"0", "1"}
            for number in range(2):
                report = await broker.status_when(number, "ready")
                assert (report["worker"], report["pid"]) == (number, broker.pids[number])
            shown = await run_status(broker.url)
            assert f"  workers    0 ready (process {broker.pids[0]}), 1 ready (process {broker.pids[1]})\n" in shown
            # Only a process of one thread may fork.
            assert threads(broker.supervisor._process.pid) == 1

            # A worker that does not answer is shown as such, by those that do.
            broker.kill(0, signal.SIGSTOP)
            await broker.metrics_when(lambda samples: samples["catbus_worker_up"] == {("0",): 0, ("1",): 1})
            assert await broker.status_when(0, "silent") == {"worker": 0, "state": "silent"}
            broker.kill(0, signal.SIGCONT)
            await broker.metrics_when(lambda samples: samples["catbus_worker_up"] == {("0",): 1, ("1",): 1})
        assert not broker.supervisor.complaints


async def test_client_that_changes_its_udp_port_stays_with_its_worker(database_url: str, tmp_path: Path) -> None:
    """On each of the workers, and also when its connection has new connection IDs."""
    relay = UdpRelay(random.Random(1))
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery, open_workers(database_url, state=tmp_path) as broker:
            await nursery.start(relay.run)
            relay.set_target(("127.0.0.1", urlsplit(broker.supervisor.urls[1]).port or 0))
            async with AsyncExitStack() as stack:
                buses: dict[str, Bus] = {}
                while len({broker.worker_of(name) for name in buses}) < 2 or len(buses) < 6:
                    name = f"client-{len(buses)}"
                    url, ca = f"https://127.0.0.1:{relay.port}", tmp_path / CERTIFICATE_FILE
                    opening = connect(url, token=token(name), ca=ca, reconnect=False)
                    buses[name] = await stack.enter_async_context(opening)
                    await until(lambda name=name: broker.opened(name))  # type: ignore[misc]
                for round_ in range(3):
                    relay.forget()
                    for name, bus in buses.items():
                        async with bus.subscribe(f"moved.{name}") as messages:
                            await bus.publish(f"moved.{name}", round_)
                            assert (await anext(messages)).payload == round_
                samples = await broker.metrics_when(lambda samples: count_webtransport(samples) == len(buses))
            nursery.cancel_scope.cancel()
        assert [broker.opened(name) for name in buses] == [1] * len(buses)
        for number in ("0", "1"):
            assert samples["catbus_sessions"][number, "webtransport"] > 0
            assert samples["catbus_quic_datagrams_dropped_total"][number, "other_worker"] == 0


async def test_sessions_of_other_workers_do_not_notice_the_end_of_a_killed_one(database_url: str) -> None:
    with trio.fail_after(PATIENCE):
        async with open_workers(database_url) as broker:
            load = WorkerLoad(broker.url, broker.address)
            names = [f"subscriber-{number}" for number in range(6)]
            async with load.running(subscribers=len(names)):
                await load.progress(100)
                await until(lambda: all(broker.opened(name) for name in names))
                before = {name: (broker.worker_of(name), broker.opened(name)) for name in names}
                starts = broker.starts
                broker.kill(0, signal.SIGKILL)
                await load.progress(100)
                await broker.restarted(starts)
                moved = {name for name, opened in before.items() if broker.opened(name) > opened[1]}
                assert moved == {name for name, opened in before.items() if opened[0] == 0}
                await broker.all_ready()
                restarts = {("0",): 1, ("1",): 0}
                await broker.metrics_when(lambda samples: samples["catbus_worker_restarts_total"] == restarts)
    load.check()


async def test_restart_of_each_worker_loses_no_message_and_refuses_no_connection(database_url: str) -> None:
    with trio.fail_after(PATIENCE):
        async with open_workers(database_url) as broker:
            load = WorkerLoad(broker.url, broker.address)
            async with load.running():
                for worker in (0, 1):
                    starts = broker.starts
                    broker.kill(worker, signal.SIGTERM)
                    await load.progress(50)
                    await broker.restarted(starts)
    load.check()
    assert load.broken == 0
    assert not broker.supervisor.complaints


async def test_workers_stop_when_their_supervisor_is_killed(database_url: str) -> None:
    with trio.fail_after(PATIENCE):
        async with open_replicas(database_url, 1, CATBUS_RUN_WORKERS="2") as [supervisor]:
            broker = WorkerBroker(supervisor)
            await broker.all_ready()
            pids = broker.pids
            try:
                async with connect(broker.url, token=token("client"), reconnect=False):
                    supervisor.kill()
                    await until(lambda: not any(map(is_running, pids)))
            finally:
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            host, _, port = broker.address.partition(":")
            with pytest.raises(OSError, match="connect"):
                await trio.open_tcp_stream(host, int(port))


@pytest.mark.parametrize("second", [None, signal.SIGINT])
async def test_first_signal_drains_all_workers_and_the_second_one_stops_them(
    database_url: str, second: signal.Signals | None
) -> None:
    delay = "0" if second is None else "100"
    with trio.fail_after(PATIENCE):
        async with open_replicas(database_url, 1, CATBUS_RUN_WORKERS="2", CATBUS_DRAIN_DELAY=delay) as [supervisor]:
            broker = WorkerBroker(supervisor)
            await broker.all_ready()
            async with AsyncExitStack() as stack:
                buses = await connect_to_both(stack, broker)
                supervisor.terminate()
                await until(lambda: sum(event["event"] == "stopping" for event in supervisor.events) == 3)
                # An init system may send it to all processes, and the supervisor passes it on as well.
                for pid in broker.pids:
                    os.kill(pid, signal.SIGTERM)
                if second is not None:
                    await buses[0].publish("still", 1)
                    supervisor._process.send_signal(second)
            assert await supervisor.wait() == (0 if second is None else 128 + second)
            assert not any(map(is_running, broker.pids))
            await until(lambda: supervisor.events[-1]["event"] == "stopped")
            # None had to be killed.
            assert not supervisor.complaints


async def test_embedded_database_is_shared_started_again_and_stopped() -> None:
    with state_directory() as state, trio.fail_after(PATIENCE):
        async with open_workers("embedded", CATBUS_STATE=str(state)) as broker, AsyncExitStack() as stack:
            buses = await connect_to_both(stack, broker)
            [pid] = [event["pid"] for event in broker._events("started the embedded database")]
            async with buses[0].subscribe("here") as messages:
                for number in range(2):
                    await buses[1].publish("here", number)
                    assert (await anext(messages)).payload == number
                    if number == 0:
                        os.kill(pid, signal.SIGKILL)
                        await until(lambda: broker._events("the embedded database died, starting it again"))
                        await until(lambda: running_url(state / "postgres"))
        assert not (state / "postgres" / "cluster" / "data" / "postmaster.pid").exists()


async def test_one_worker_serves_webtransport_where_the_kernel_cannot_steer(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from catbus.endpoints.webtransport import udp_steering\nudp_steering.can_steer_datagrams = lambda: False\n"
    )
    monkeypatch.setattr("tests.postgres.processes.ROOT", f"{tmp_path}:{Path(__file__).parents[2]}")
    with trio.fail_after(PATIENCE):
        async with open_workers(database_url, state=tmp_path) as broker:
            url = broker.supervisor.urls[1]
            async with AsyncExitStack() as stack:
                for number in range(3):
                    bus = connect(url, token=token(f"client-{number}"), ca=tmp_path / CERTIFICATE_FILE)
                    await stack.enter_async_context(bus)
                samples = await broker.metrics_when(lambda samples: count_webtransport(samples) == 3)
            assert samples["catbus_sessions"]["0", "webtransport"] == 3
            for _ in range(8):
                found = (await brokers.request(broker.address, "/.well-known/catbus")).body
                assert f":{urlsplit(url).port}".encode() in found
    assert [event["level"] for event in broker.supervisor.complaints] == ["warning"]


def test_worker_that_dies_again_and_again_ends_the_broker(start: Start, database_url: str, tmp_path: Path) -> None:
    patched = (
        "import os, signal; from catbus.processes import restart_policy, worker_process\n"
        "restart_policy.FIRST_DELAY = 0.01; serve = worker_process.serve\n"
        "async def die(*arguments, worker, **options):\n"
        "    if worker.number == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    await serve(*arguments, worker=worker, **options)\n"
        f"worker_process.serve = die; {MAIN}"
    )
    process = start(
        *("run", "--database", database_url, "--ws-bind", "127.0.0.1:0", "--workers", "2"),
        program=[sys.executable, "-c", patched],
    )
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors == "catbus: worker 1 died 5 times in 60 s, the last time with -9\n"


def test_worker_that_cannot_start_at_first_ends_the_broker(start: Start, database_url: str, tmp_path: Path) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).write_text("nothing")
    process = start(
        *("run", "--database", database_url, "--ws-bind", "127.0.0.1:0", "--workers", "2"),
        secret=secrets.token_hex(),
        variables={
            "CATBUS_CERT": str(tmp_path / "cert"),
            "CATBUS_KEY": str(tmp_path / "key"),
            "CATBUS_BIND": "[::1]:0",
        },
    )
    _, errors = process.communicate()
    assert process.returncode == 1
    [line] = errors.splitlines()
    assert line.startswith("catbus: worker 0: ")
    assert str(tmp_path) in line


def test_address_in_use_is_an_error(start: Start, database_url: str) -> None:
    one = start("run", "--database", database_url, "--ws-bind", "127.0.0.1:0", variables={"CATBUS_BIND": "[]"})
    [url] = next_event(one, "serving")["urls"]
    address = urlsplit(url).netloc
    other = start("run", "--database", database_url, "--ws-bind", address, "--workers", "2")
    _, errors = other.communicate()
    assert (other.returncode, errors) == (1, f"catbus: cannot listen on {address}: Address already in use\n")


@pytest.mark.parametrize("workers", ["2", "auto"])
def test_workers_need_a_log_that_they_share(start: Start, workers: str) -> None:
    process = start("run", "--database", "memory", "--ws-bind", "127.0.0.1:0", "--workers", workers)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "several workers need a log that they share" in errors


def test_check_reports_workers(catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATBUS_RUN_WORKERS", "3")
    assert "ok       workers        3 processes" in catbus("check", "--database", "embedded").output
    assert "error    workers        several workers need a log" in catbus("check", "--database", "memory").output


def test_automatic_number_of_workers_is_that_of_the_usable_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(workers, "_CPU_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    config = Config(run=RunSettings(workers="auto"), database=DatabaseSettings(url="embedded"))
    assert workers.worker_count(config) == 6
    for text, number in (("max 100000", 6), ("250000 100000", 3), ("50000 100000", 1), ("9000000 100000", 6)):
        quota.write_text(f"{text}\n")
        assert workers.worker_count(config) == number


def test_hangup_reloads_every_worker(start: Start, database_url: str, tmp_path: Path) -> None:
    config = tmp_path / "catbus.toml"
    config.write_text("[limits]\nconnections = 10\n")
    process = start(
        *("run", "--config", str(config), "--database", database_url),
        *("--ws-bind", "127.0.0.1:0", "--workers", "2"),
    )
    next_event(process, "serving")
    config.write_text("[limits]\nconnections = 20\n[logging]\nlevels = 'catbus=debug'\n")
    process.send_signal(signal.SIGHUP)
    reloaded = [next_event(process, "reloaded the configuration") for _ in range(2)]
    assert {event["worker"] for event in reloaded} == {0, 1}
    assert all(event["reloaded"] == ["logging.levels"] for event in reloaded)
