"""The commands with a broker in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from .conftest import Command, Running, Start, next_event

PATIENCE = 30


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, str]:
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output, errors


def test_published_message_is_printed(broker: Running, catbus: Command, start: Start) -> None:
    subscriber = start("sub", "demo.*", "--verbose", "--url", broker.url)
    assert subscriber.stderr is not None and subscriber.stdout is not None
    assert subscriber.stderr.readline().startswith("catbus: subscribed to demo.*")

    assert catbus("pub", "demo.hello", '{"n": 1}', "--url", broker.url) == (
        0, '{"channel":"demo.hello","seq":1}\n', "",
    )  # fmt: skip
    message = json.loads(subscriber.stdout.readline())
    assert message.pop("at") > 0
    assert message == {
        "channel": "demo.hello",
        "payload": {"n": 1},
        "seq": 1,
        "sender": "development",
        "pattern": "demo.*",
    }
    assert end(subscriber, signal.SIGINT) == (0, "", "")

    status, output, _ = catbus("status", "--url", broker.url)
    assert status == 0
    assert output.startswith(f"{broker.url} is ready\n")
    assert "  log        messages 1 to 1 in " in output

    status, output, _ = catbus("status", "--json", "--url", broker.url)
    report = json.loads(output)
    assert status == 0
    assert (report["ready"], report["state"], report["head"], report["floor"]) == (True, "ready", 1, 1)
    assert report["log"]["size"] > 0

    # A second subscriber reads older messages and exits.
    assert catbus("pub", "other", "2", "--url", broker.url).status == 0
    status, output, errors = catbus("sub", "demo.*", "other", "--since", "0", "--count", "2", "--url", broker.url)
    assert (status, errors) == (0, "")
    assert {json.loads(line)["seq"] for line in output.splitlines()} == {1, 2}


def test_pub_and_sub_work_over_both_transports(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "catbus.toml"
    config.write_text(
        '[database]\nurl = "memory"\n'
        '[websocket]\nbind = "127.0.0.1:0"\n[webtransport]\nbind = "127.0.0.1:0"\n[drain]\ndelay = 0\nwindow = 0\n'
    )
    broker = start("run", "--config", str(config))
    websocket, webtransport = next_event(broker, "serving")["urls"]
    for here, there in ((websocket, webtransport), (webtransport, websocket)):
        options = ("--verbose", "--stream", "--datagrams", "--count", "2", "--url", there)
        subscriber = start("sub", "demo.*", *options)
        assert subscriber.stderr is not None
        assert subscriber.stderr.readline().startswith("catbus: subscribed to demo.*")
        for more in ((), ("--ephemeral",)):
            output, errors = start("pub", "demo.hello", '"hello"', "--url", here, *more).communicate(timeout=PATIENCE)
            assert (json.loads(output or "{}").get("seq") is None) == bool(more), errors
        output, _ = subscriber.communicate(timeout=PATIENCE)
        assert [json.loads(line)["payload"] for line in output.splitlines()] == ["hello"] * 2
    assert end(broker, signal.SIGTERM)[0] == 0


def test_lines_of_stdin_are_published_in_order(broker: Running, catbus: Command, start: Start) -> None:
    publisher = start("pub", "many", "-", "--url", broker.url)
    lines = "".join(f"{number}\n" for number in range(1, 1201))
    output, errors = publisher.communicate(lines + '\n{"last": 1}\n{broken\n0\n', timeout=PATIENCE)
    assert [json.loads(line)["seq"] for line in output.splitlines()] == list(range(1, 1202))
    assert errors.startswith("catbus: line 1203: the payload is not JSON") and errors.count("\n") == 1
    assert publisher.returncode == 1

    _, output, _ = catbus("sub", "many", "--since", "0", "--count", "1201", "--url", broker.url)
    messages = [json.loads(line) for line in output.splitlines()]
    assert [message["payload"] for message in messages] == [*range(1, 1201), {"last": 1}]


def test_closed_output_is_no_error(broker: Running, catbus: Command, start: Start) -> None:
    subscriber = start("sub", "*", "--since", "0", "--url", broker.url)
    assert subscriber.stdout is not None and subscriber.stderr is not None
    catbus("pub", "a", "1", "--url", broker.url)
    assert subscriber.stdout.readline()
    subscriber.stdout.close()
    catbus("pub", "a", "2", "--url", broker.url)
    assert subscriber.wait(timeout=PATIENCE) == 0
    assert subscriber.stderr.read() == ""


def test_rejected_token_is_an_error(broker: Running, catbus: Command) -> None:
    forged = "sub-eyJjbGllbnRfaWQiOiJhIn0.AAAAAAAAAAAAAAAAAAAAAA"
    for command in (["pub", "a", "1"], ["sub", "a"]):
        status, output, errors = catbus(*command, "--url", broker.url, "--token", forged)
        assert (status, output) == (1, "")
        assert errors.startswith("catbus: ") and errors.endswith("(unauthenticated)\n") and errors.count("\n") == 1
        assert forged not in errors


def restart(broker: Running, start: Start) -> None:
    """Restart the broker with an empty log."""
    again = start("run", "--database", "memory", "--ws-bind", broker.url.split("/")[2])
    next_event(again, "serving")


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
def test_subscriber_continues_after_a_restart_of_the_broker(broker: Running, start: Start, way: signal.Signals) -> None:
    subscriber = start("sub", "a", "--verbose", "--count", "1", "--url", broker.url)
    assert subscriber.stderr is not None
    assert subscriber.stderr.readline().startswith("catbus: subscribed to a")
    status, output, _ = end(broker.process, way)
    if way == signal.SIGTERM:
        assert status == 0
        assert [json.loads(line)["event"] for line in output.splitlines()][-1] == "stopped"
    assert subscriber.stderr.readline().endswith("; reconnecting\n")
    restart(broker, start)
    assert subscriber.stderr.readline() == "catbus: reconnected\n"
    # The log is empty.
    assert subscriber.stderr.readline().startswith(
        "catbus: a: messages after 0 belong to a lost log; those of the new log follow (reason: epoch;"
    )
    publisher = start("pub", "a", '"again"', "--url", broker.url)
    assert json.loads(publisher.communicate(timeout=PATIENCE)[0])["seq"] == 1
    output, errors = subscriber.communicate(timeout=PATIENCE)
    assert (json.loads(output)["payload"], errors, subscriber.returncode) == ("again", "", 0)


def test_publisher_continues_after_a_restart_of_the_broker(broker: Running, start: Start) -> None:
    publisher = start("pub", "a", "-", "--url", broker.url)
    assert publisher.stdin is not None and publisher.stdout is not None and publisher.stderr is not None
    publisher.stdin.write("1\n")
    publisher.stdin.flush()
    assert json.loads(publisher.stdout.readline())["seq"] == 1
    end(broker.process, signal.SIGKILL)
    publisher.stdin.write("2\n")
    publisher.stdin.flush()
    assert publisher.stderr.readline().endswith("; reconnecting\n")
    restart(broker, start)
    output, errors = publisher.communicate(timeout=PATIENCE)
    assert (json.loads(output)["seq"], errors, publisher.returncode) == (1, "catbus: reconnected\n", 0)


def test_publisher_stops_after_its_timeout(broker: Running, start: Start) -> None:
    publisher = start("pub", "a", "-", "--timeout", "0.5", "--url", broker.url)
    assert publisher.stdin is not None and publisher.stdout is not None
    publisher.stdin.write("1\n")
    publisher.stdin.flush()
    assert publisher.stdout.readline()
    end(broker.process, signal.SIGKILL)
    output, errors = publisher.communicate("2\n", timeout=PATIENCE)
    assert (output, publisher.returncode) == ("", 1)
    assert errors.splitlines()[-1] == (
        "catbus: no acknowledgement within 0.5 s; some of the lines 2 to 2 may have been published"
    )


def test_printed_development_token_works(broker: Running, catbus: Command, tmp_path: Path) -> None:
    assert catbus("grant", "-p", "read", "a", "--client-id", "x").status == 0  # the same user can read the secret
    status, output, errors = end(broker.process, signal.SIGINT)
    assert status == 0
    [token] = [line.strip() for line in errors.splitlines() if line.strip().startswith("sub-")]
    assert token not in output
    assert (broker.state / "development-secret").read_text().strip() not in output + errors
    assert f"--url {broker.url}" in errors


def test_user_with_the_secret_needs_no_token(start: Start, catbus: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a sidecar container of the broker."""
    monkeypatch.setenv("CATBUS_SECRET", "a secret for two")
    process = start("run", "--database", "memory", "--ws-bind", "127.0.0.1:0", secret="a secret for two")
    [url] = [url for url in next_event(process, "serving")["urls"] if url.startswith("ws")]
    assert catbus("pub", "a", "1", "--url", url) == (0, '{"channel":"a","seq":1}\n', "")
    assert "messages 1 to 1" in catbus("status", "--url", url).output
    monkeypatch.setenv("CATBUS_SECRET", "another secret")
    assert catbus("pub", "a", "1", "--url", url).status == 1


def test_sighup_reloads_the_certificate(start: Start, catbus: Command, tmp_path: Path) -> None:
    """The broker creates a certificate, the command finds it, and the broker continues after SIGHUP."""
    config = tmp_path / "catbus.toml"
    config.write_text("[drain]\ndelay = 0\nwindow = 0\n[websocket]\ntls = true\n[webtransport]\nbind = []\n")
    process = start("run", "--config", str(config), "--database", "memory", "--ws-bind", "127.0.0.1:0")
    [url] = next_event(process, "serving")["urls"]
    assert url.startswith("wss://127.0.0.1:")
    for number in (1, 2):
        assert catbus("pub", "a", "1", "--url", url) == (0, f'{{"channel":"a","seq":{number}}}\n', "")
        process.send_signal(signal.SIGHUP)
        assert next_event(process, "loaded a new certificate")["level"] == "info"
    assert catbus("status", "--url", url).output.startswith(f"{url} is ready\n")
    assert end(process, signal.SIGTERM)[0] == 0
