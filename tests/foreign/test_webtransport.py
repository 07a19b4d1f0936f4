"""Clients that use third-party WebTransport libraries, with a broker that makes its own certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

import catbus
from catbus import CloseCode
from catbus.certificates import DEVELOPMENT_FILE
from catbus.config import WebSocketSettings, WebTransportSettings
from tests.brokers import CONFIG, TOKEN
from tests.programs import find_foreign_python, find_program

CLIENT = Path(__file__).with_name("client.py")


def configuration(state: Path, *, tls: bool = False) -> catbus.Config:
    return msgspec.structs.replace(
        CONFIG,
        state=str(state),
        websocket=WebSocketSettings(bind=("127.0.0.1:0",), tls=tls),
        webtransport=WebTransportSettings(bind=("127.0.0.1:0",)),
    )


def write_certificate(state: Path) -> Path:
    """Write the certificate of the broker to a file of its own, without the key."""
    text = (state / DEVELOPMENT_FILE).read_text()
    path = state / "certificate.pem"
    path.write_text(text[text.index("-----BEGIN CERTIFICATE") :])
    return path


async def run_session(library: str, state: Path) -> dict[str, Any]:
    python = find_foreign_python()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, configuration(state))
            url = f"https://{dict(broker.addresses)['webtransport']}/"
            command = [str(python), str(CLIENT), library, url, str(write_certificate(state)), TOKEN]
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
            assert done.returncode == 0, done.stderr.decode()
            while broker.replica.sessions:
                await trio.sleep(0.01)
            broker.stop()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("library", ["pywebtransport", "web-transport-quinn"])
async def test_foreign_library_runs_a_whole_session(library: str, tmp_path: Path) -> None:
    found = await run_session(library, tmp_path)
    assert (found["hello"]["type"], found["hello"]["client_id"]) == ("auth_ok", "alice")
    subscribed, message = found["own"]
    assert (subscribed["type"], subscribed["stream"]) == ("subscribed", True)
    assert (message["seq"], message["payload"]) == (1, "kept")
    assert found["datagram"]["payload"] == "fleeting"
    assert "seq" not in found["datagram"]
    assert (found["published"]["type"], found["published"]["id"], found["published"]["seq"]) == ("published", 1, 1)
    # The client has stopped the stream, which ends its subscription.
    assert found["ended"] == {"type": "unsubscribed", "pattern": "foreign.*", "seq": 1}
    if library == "web-transport-quinn":
        assert found["closed"] == [CloseCode.UNAUTHENTICATED, "the token is not valid"]


async def test_curl_accepts_the_certificate_as_its_authority(tmp_path: Path) -> None:
    curl = find_program("curl", "curl")
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, configuration(tmp_path, tls=True))
            port = dict(broker.addresses)["websocket"].rpartition(":")[2]
            command = [curl, "--silent", "--show-error", "--cacert", str(write_certificate(tmp_path))]
            done = await trio.run_process(
                [*command, f"https://127.0.0.1:{port}/health"], capture_stdout=True, capture_stderr=True, check=False
            )
            assert (done.stdout, done.stderr) == (b"ok", b"")
            broker.stop()
