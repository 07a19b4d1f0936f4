"""`catbus sessions`, `channels` and `disconnect`, with a broker in a process of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.cli.development_credentials import read_secret
from catbus.close_codes import CloseCode
from catbus.testing.blocking_connection import dial

from .conftest import Command, Running

PATIENCE = 30.0
NAME = "a/b \x1b[2J"
"""A client_id that would clear a terminal."""


class Client:
    """A connection that has authenticated."""

    def __init__(self, broker: Running, client_id: str) -> None:
        self.connection = dial(broker.url)
        self.request("auth_ok", type="auth", token=token(broker, client_id), protocol=1)

    def request(self, reply: str, **message: object) -> None:
        self.connection.send(json.dumps(message).encode())
        found = self.connection.receive(PATIENCE)
        assert found is not None
        assert found["type"] == reply


@pytest.fixture
def subscriber(broker: Running) -> Client:
    client = Client(broker, NAME)
    for pattern in ("demo.*", "other"):
        client.request("subscribed", type="subscribe", pattern=pattern)
    return client


def token(broker: Running, client_id: str, grants: Grants = Grants.ALL) -> str:
    secret = read_secret(broker.state)
    assert secret is not None
    return sign(secret, client_id=client_id, grants=grants)


def test_sessions_are_listed(broker: Running, subscriber: Client, catbus: Command) -> None:
    status, output, errors = catbus("sessions", "--url", broker.url)
    assert (status, errors) == (0, "")
    first, columns, row = output.splitlines()
    assert first.endswith(": 1 open, 1 listed")
    assert columns.split()[:4] == ["ID", "CLIENT", "STATE", "TRANSPORT"]
    assert row.split()[:3] == ["1", "'a/b", r"\x1b[2J'"], "a name cannot control the terminal"
    assert row.split()[-7:] == ["2", "0", "0", "0", "0", "0", "0"]
    found = json.loads(catbus("sessions", "--json", "--url", broker.url).output)
    assert [each["client_id"] for each in found["sessions"]] == [NAME]
    assert json.loads(catbus("sessions", "--client-id", "x", "--json", "--url", broker.url).output)["sessions"] == []


def test_all_pages_are_read(broker: Running, catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catbus.cli.commands.sessions._PAGE", 2)
    clients = [Client(broker, f"client-{number}") for number in range(5)]
    for limit, listed in ((100, 5), (3, 3)):
        found = json.loads(catbus("sessions", "--limit", str(limit), "--json", "--url", broker.url).output)
        assert [each["client_id"] for each in found["sessions"]] == [f"client-{number}" for number in range(listed)]
    assert catbus("sessions", "--limit", "3", "--url", broker.url).output.endswith("  There are more: --limit\n")
    assert not any(client.connection.code for client in clients)


def test_channels_are_shown(broker: Running, subscriber: Client, catbus: Command) -> None:
    for channel in ("demo.a", "demo.a", "demo.b"):
        catbus("pub", channel, "1", "--url", broker.url)
    status, output, errors = catbus("channels", "--url", broker.url)
    assert (status, errors) == (0, "")
    first, *lines = output.splitlines()
    assert " had 3 messages in " in first
    assert [line.split() for line in lines] == [
        ["CHANNEL", "MESSAGES", "SUBSCRIPTIONS"],
        ["demo.a", "2", "1"],
        ["demo.b", "1", "1"],
        ["PATTERN", "SUBSCRIPTIONS", "LAGGING"],
        ["demo.*", "1", "0"],
        ["other", "1", "0"],
    ]
    found = json.loads(catbus("channels", "--limit", "1", "--json", "--url", broker.url).output)
    assert found["channels"] == [{"channel": "demo.a", "messages": 2, "subscriptions": 1}]


def test_client_is_disconnected(broker: Running, subscriber: Client, catbus: Command) -> None:
    status, output, errors = catbus("disconnect", NAME, "--url", broker.url)
    assert (status, errors) == (0, "")
    assert output.startswith("disconnected 'a/b \\x1b[2J': 1 session of ")
    assert subscriber.connection.receive(PATIENCE) is None
    assert subscriber.connection.code == CloseCode.DISCONNECTED
    status, output, _ = catbus("disconnect", "nobody", "--json", "--url", broker.url)
    assert (status, json.loads(output)["sessions"]) == (0, 0)
    assert catbus("disconnect", "nobody", "--url", broker.url).output.startswith("disconnected nobody: 0 sessions of ")


@pytest.mark.parametrize("command", [("sessions",), ("channels",), ("disconnect", "alice")])
def test_errors_say_what_to_do(broker: Running, catbus: Command, command: tuple[str, ...]) -> None:
    def error(status: int, *options: str) -> str:
        outcome = catbus(*command, *options)
        assert (outcome.status, outcome.output) == (status, "")
        assert outcome.errors.count("\n") == 1
        return outcome.errors

    reader = token(broker, "bob", Grants(("*",), ("a.*",)))
    assert "(set CATBUS_TOKEN to the admin key, or to a token of: catbus grant" in error(
        1, "--url", broker.url, "--token", reader
    )
    assert "catbus grant" in error(1, "--url", broker.url, "--token", "nonsense")
    assert "no token is set" in error(2, "--url", "ws://bus.example/ws")
    assert "must begin with ws:// or wss://" in error(2, "--url", "https://127.0.0.1:1", "--token", reader)
    assert "cannot reach a broker" in error(1, "--url", "ws://127.0.0.1:1/ws", "--token", reader)


@pytest.mark.parametrize(
    "arguments", [("disconnect", ""), ("sessions", "--client-id", ""), ("sessions", "--limit", "0")]
)
def test_wrong_usage_is_rejected(catbus: Command, arguments: tuple[str, ...]) -> None:
    assert catbus(*arguments, "--token", "x").status == 2


class OtherServer(BaseHTTPRequestHandler):
    """A server that is no broker."""

    def do_GET(self) -> None:
        self.send_error(int(self.headers["Authorization"].rpartition(" ")[2]))

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Log nothing."""


@pytest.fixture(scope="module")
def other_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), OtherServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.server_port}/ws"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, "has no /api/channels: it is of an earlier release, or a proxy"), (502, "answered: HTTP status 502")],
)
def test_answers_of_other_servers_are_explained(other_server: str, catbus: Command, status: int, expected: str) -> None:
    outcome = catbus("channels", "--url", other_server, "--token", str(status))
    assert outcome.status == 1
    assert expected in outcome.errors
