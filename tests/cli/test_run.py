"""`catbus run`: signals, the secret, and its output."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from catbus.cli.commands import run
from catbus.cli.development_credentials import development_token, read_secret
from catbus.config import AuthSettings, Config, LoggingSettings, WebSocketSettings
from catbus.errors import ConfigError
from catbus.processes.service_manager import ServiceManager
from tests.cli.conftest import Start, next_event

LOCAL = WebSocketSettings(bind=("127.0.0.1:0",))


class FakeBroker:
    def __init__(self, *addresses: str) -> None:
        self.addresses = [("websocket", address) for address in addresses]
        self.stopping = trio.Event()

    def stop(self) -> None:
        self.stopping.set()


class FakeServer:
    """A double of `serve`: it starts when allowed, and stops on request if `orderly`."""

    def __init__(self, *, starts: bool = True, orderly: bool = True) -> None:
        self.starts = starts
        self.orderly = orderly
        self.started = trio.Event()
        self.broker = FakeBroker("127.0.0.1:8080")
        self.ended = ""

    async def __call__(self, config: Config, *, task_status: trio.TaskStatus[FakeBroker]) -> None:
        try:
            self.started.set()
            if not self.starts:
                await trio.sleep_forever()
            task_status.started(self.broker)
            await self.broker.stopping.wait()
            if not self.orderly:
                await trio.sleep_forever()
            self.ended = "in order"
        except trio.Cancelled:
            self.ended = "at once"
            raise


@pytest.fixture(autouse=True)
def collector_as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


async def supervise(monkeypatch: pytest.MonkeyPatch, server: FakeServer, *signals: signal.Signals) -> int:
    monkeypatch.setattr(run, "serve", server)

    async def send() -> None:
        await server.started.wait()
        for number in signals:
            await trio.testing.wait_all_tasks_blocked()
            signal.raise_signal(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        return await run.serve_until_signalled(Config(websocket=LOCAL), None, lambda: None, ServiceManager({}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_first_signal_starts_a_graceful_shutdown(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    server = FakeServer()
    assert await supervise(monkeypatch, server, number) == 0
    assert server.ended == "in order"


async def test_second_signal_stops_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer(orderly=False)
    assert await supervise(monkeypatch, server, signal.SIGTERM, signal.SIGINT) == 130
    assert server.ended == "at once"


async def test_signal_before_the_start_stops_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer(starts=False)
    assert await supervise(monkeypatch, server, signal.SIGTERM) == 0
    assert server.ended == "at once"


def test_broker_on_loopback_creates_and_keeps_a_secret(tmp_path: Path) -> None:
    config, token = run.ensure_secret(Config(websocket=LOCAL, state=str(tmp_path)))
    [secret] = config.auth.secrets
    assert secret == read_secret(tmp_path)
    assert token == development_token(secret)
    assert run.ensure_secret(Config(websocket=LOCAL, state=str(tmp_path))) == (config, token)


def test_reachable_broker_requires_a_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CATBUS_SECRET"):
        run.ensure_secret(Config(state=str(tmp_path)))
    assert read_secret(tmp_path) is None


def test_configured_secret_is_used() -> None:
    config = Config(auth=AuthSettings(secrets=("given",)))
    assert run.ensure_secret(config) == (config, None)


def test_reachable_broker_starts_with_chosen_settings() -> None:
    strong = AuthSettings(secrets=("q7Lw2pT5rYb8nHd1mKc4sJf6g0aEuXzV",))
    asked = {"database.url": "command line"}
    run.check_exposure(Config(auth=strong), asked)
    run.check_exposure(Config(auth=AuthSettings(secrets=("abc",)), websocket=LOCAL), {})
    run.check_exposure(Config(auth=AuthSettings(secrets=("abc",), allow_weak_secrets=True)), asked)
    with pytest.raises(ConfigError, match="--database memory"):
        run.check_exposure(Config(auth=strong), {})
    with pytest.raises(ConfigError, match="openssl rand -hex 32"):
        run.check_exposure(Config(auth=AuthSettings(secrets=("abc",))), asked)


def test_weak_secret_and_misspelt_variable_are_warnings_on_loopback(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "catbus.toml"
    config.write_text("[auth]\nsecret = 'abc'\nadmin_key = 'def'\n")
    process = start("run", "--config", str(config), "--ws-bind", "127.0.0.1:0", variables={"CATBUS_ADMIN_KEI": "x"})
    for text in (
        "CATBUS_ADMIN_KEI is not a known variable and has no effect (did you mean CATBUS_ADMIN_KEY?)",
        "the secret has fewer than 32 bytes",
        "the admin key has fewer than 32 bytes",
    ):
        assert next_event(process, text)["level"] == "warning"
    next_event(process, "serving")


def test_sighup_reloads_log_levels_and_names_settings_that_require_a_restart(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "catbus.toml"
    config.write_text("[limits]\nconnections = 10\n")
    process = start("run", "--config", str(config), "--ws-bind", "127.0.0.1:0")
    next_event(process, "serving")

    def reload(text: str) -> dict[str, Any]:
        config.write_text(text)
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            if "configuration" in event["event"]:
                return event
        pytest.fail("it ended")

    assert reload("[limits]\nconnections = 10\n")["unchanged"] is True
    levels = "[logging]\nlevels = 'catbus=debug'\n"
    assert reload(levels + "[limits]\nconnections = 10\n")["reloaded"] == ["logging.levels"]
    assert reload(levels + "[limits]\nconnections = 11\n[auth]\nadmin_key = 'hunter2'\n")["reloaded"] == []
    left = next_event(process, "changed settings require a restart")
    assert (left["settings"], left["level"]) == (["auth.admin_key", "limits.connections"], "warning")
    wrong = reload("[limits]\nconnections = true\n")
    assert "connections: expected a whole number" in wrong["reason"]
    assert "hunter2" not in json.dumps([left, wrong])


def test_sighup_names_changed_public_keys(start: Start, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "keys.pem").write_bytes(pem)
    config = tmp_path / "catbus.toml"
    config.write_text("[auth]\njwt = 'keys.pem'\n")
    process = start("run", "--config", str(config), "--ws-bind", "127.0.0.1:0")
    next_event(process, "serving")
    (tmp_path / "keys.pem").write_bytes(pem + pem)
    process.send_signal(signal.SIGHUP)
    assert next_event(process, "changed settings require a restart")["settings"] == ["auth.jwt"]


def announced(capsys: pytest.CaptureFixture[str], form: str, token: str | None, state: str | None) -> tuple[str, str]:
    broker = FakeBroker("127.0.0.1:8080", "[::1]:8080")
    config = Config(logging=LoggingSettings(format=form), state=state)  # type: ignore[arg-type]
    run._show_address(broker.addresses, config, token)
    output, errors = capsys.readouterr()
    return output, errors


def test_urls_and_token_are_printed_on_a_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output, _ = announced(capsys, "text", "the-token", str(tmp_path / "state"))
    for part in ("ws://127.0.0.1:8080/ws", "ws://[::1]:8080/ws", "the-token", "sub 'demo.*'\n"):
        assert part in output
    assert "export CATBUS_TOKEN" not in output


def test_printed_commands_work_with_another_state_directory(capsys: pytest.CaptureFixture[str]) -> None:
    output, _ = announced(capsys, "text", "the-token", "/elsewhere")
    assert "export CATBUS_TOKEN=the-token" in output


def test_json_output_has_only_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    output, errors = announced(capsys, "json", "the-token", None)
    assert "the-token" in errors and "the-token" not in output
    _, errors = announced(capsys, "json", None, None)
    assert not errors
