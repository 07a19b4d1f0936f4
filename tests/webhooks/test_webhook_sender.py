"""Requests of deliveries over real sockets, to receivers that respond in every way."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trustme

from catbus.webhooks.public_addresses import AddressRules
from catbus.webhooks.signed_request import SignedRequest
from catbus.webhooks.verdicts import AttemptResult, Outcome
from catbus.webhooks.webhook_sender import MAX_BODY, WebhookSender
from tests.postgres.webhook_receiver import Delivery, Receiver, Reply, open_receiver

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
LOOPBACK = AddressRules(["127.0.0.0/8"])


@asynccontextmanager
async def sender(rules: AddressRules = LOOPBACK) -> AsyncIterator[WebhookSender]:
    found = WebhookSender(rules, 4)
    try:
        yield found
    finally:
        await found.close()


async def send(url: str, rules: AddressRules = LOOPBACK, timeout: float = 20) -> AttemptResult:
    async with sender(rules) as found:
        return await found.send(SignedRequest("msg_1", url, b'{"n":1}', [SECRET]), 1_700_000_000, timeout)


async def replying(reply: Reply) -> tuple[AttemptResult, Receiver]:
    async def decide(_: Delivery) -> Reply:
        return reply

    async with open_receiver(decide) as receiver:
        return await send(receiver.url), receiver


@pytest.mark.parametrize(
    ("reply", "outcome", "wait"),
    [
        (Reply(200), Outcome.DELIVERED, 0),
        (Reply(204), Outcome.DELIVERED, 0),
        (Reply(302, (("Location", "http://127.0.0.1:1/other"),)), Outcome.REJECTED, 0),
        (Reply(410), Outcome.GONE, 0),
        (Reply(429, (("Retry-After", "9"),)), Outcome.THROTTLED, 9),
        (Reply(500, (), b"x" * 100), Outcome.REJECTED, 0),
        (Reply(None), Outcome.UNREACHABLE, 0),
        (Reply(200, (), b"x" * (MAX_BODY * 3)), Outcome.DELIVERED, 0),
    ],
    ids=["200", "204", "redirect", "410", "429", "500", "closed", "long"],
)
async def test_response_becomes_an_outcome(reply: Reply, outcome: Outcome, wait: float) -> None:
    found, receiver = await replying(reply)
    assert (found.outcome, found.retry_after) == (outcome, wait)
    (delivery,) = receiver.deliveries
    assert delivery.body == b'{"n":1}'
    assert delivery.headers["webhook-id"] == "msg_1"
    assert delivery.headers["content-type"] == "application/json"


async def test_receiver_that_does_not_respond_is_given_up() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        found = await send(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.1)
    assert (found.outcome, found.text) == (Outcome.TIMEOUT, "no response within 0.1 s")


async def test_response_without_an_end_is_given_up_after_its_bound() -> None:
    """A status is enough. Neither a body without an end nor one that never comes holds the connection."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            try:
                while True:
                    await stream.send_all(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            except trio.BrokenResourceError:
                closed.set()

    closed = trio.Event()
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        found = await send(f"http://127.0.0.1:{listener.socket.getsockname()[1]}/")
        assert found.outcome is Outcome.DELIVERED
        with trio.fail_after(20):
            await closed.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\0" * 100, b"SSH-2.0-x\r\n", b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"],
    ids=["empty", "zeros", "ssh", "status", "length"],
)
async def test_peer_that_is_no_receiver_is_an_error(garbage: bytes) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(garbage)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        found = await send(f"http://127.0.0.1:{listener.socket.getsockname()[1]}/")
        assert found.outcome is Outcome.UNREACHABLE
        assert found.text.isprintable()
        nursery.cancel_scope.cancel()


HOSTS = [
    "127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f000001", "127.1", "[::ffff:127.0.0.1]", "10.0.0.1",
    "169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "192.168.1.1", "224.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", HOSTS)
async def test_private_address_is_not_connected_to(monkeypatch: pytest.MonkeyPatch, host: str, scheme: str) -> None:
    """However it is written. Connecting would fail the test."""

    async def connect(*_: object, **__: object) -> None:
        raise AssertionError("it connects")

    monkeypatch.setattr("httpcore.TrioBackend.connect_tcp", connect)
    found = await send(f"{scheme}://{host}/", AddressRules())
    assert found.outcome is Outcome.UNREACHABLE
    assert "is not allowed" in found.text


async def test_address_is_that_which_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers differently the second time changes nothing: there is no second time."""
    answers = iter([["1.1.1.1", "10.0.0.1"], ["127.0.0.1"]])
    connected = []

    def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        assert host == "example.com"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    async def connect(_: object, host: str, *__: object) -> None:
        connected.append(host)
        raise OSError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("httpcore.TrioBackend.connect_tcp", connect)
    found = await send("https://example.com/", AddressRules())
    assert found.outcome is Outcome.UNREACHABLE
    assert connected == ["1.1.1.1"]


async def test_unresolvable_name_is_an_error() -> None:
    for host in ("nothing.invalid", "a" * 64 + ".example", "x.."):
        assert (await send(f"https://{host}/")).outcome is Outcome.UNREACHABLE


async def test_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with open_receiver() as receiver:
        assert (await send(receiver.url)).outcome is Outcome.DELIVERED


async def test_certificate_is_verified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with open_receiver(context=context) as receiver:
        found = await send(receiver.url)
        assert found.outcome is Outcome.UNREACHABLE
        assert "certificate verify failed" in found.text
        file = tmp_path / "authority.pem"
        authority.cert_pem.write_to_path(file)
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        assert (await send(receiver.url)).outcome is Outcome.DELIVERED


async def test_connection_is_used_again() -> None:
    async with open_receiver() as receiver, sender() as found:
        for _ in range(3):
            request = SignedRequest("msg_1", receiver.url, b"{}", [SECRET])
            assert (await found.send(request, 0, 20)).outcome is Outcome.DELIVERED
        assert len(receiver.deliveries) == 3
        assert receiver.connections == 1
