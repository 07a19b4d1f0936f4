"""A wrong argument is an error of its own call. The error names it, and other calls continue."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.client import Bus, connect
from catbus.client.argument_checks import check_integer, check_position, check_text, encode_cursor
from catbus.errors import Refused
from tests.client.scripted_broker import Honest, talk_to

pytestmark = pytest.mark.anyio

HALF = "party \U0001f389".encode("utf-16-le")[:-2].decode("utf-16-le", "surrogatepass")

PLACES = [-1, "5", "", 2**63, 2**64, 1.5, True, b"5", [5], "5.", ".e1", "-1.e1", f"5.{HALF}", f"{2**63}.e1", "5.e 1"]

CALLS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    *[("subscribe", "since", ("a",), {"since": place}) for place in PLACES],
    *[("subscribe", "epoch", ("a",), {"since": 5, "epoch": epoch}) for epoch in (5, HALF, "e" * 70_000, b"e1")],
    ("subscribe", "epoch", ("a",), {"since": "5.e1", "epoch": "e2"}),
    *[("subscribe", "last", ("a",), {"last": last}) for last in (0, -1, 1.0, "5", True, 2**40)],
    ("subscribe", "last", ("a",), {"since": 5, "last": 5}),
    *[("subscribe", "buffer", ("a",), {"buffer": buffer}) for buffer in (0, -1, 1.5, "9", None)],
    ("subscribe", "stream", ("a",), {"stream": "yes"}),
    ("subscribe", "datagrams", ("a",), {"datagrams": 1}),
    ("subscribe", "on_event", ("a",), {"on_event": "print"}),
    *[("subscribe", "pattern", (pattern,), {}) for pattern in (5, None, b"a", HALF, "", "a..b")],
    *[("history", "pattern", (pattern,), {}) for pattern in (5, None, HALF)],
    *[("history", "limit", ("a",), {"limit": limit}) for limit in (0, -1, 1.5, "5", True, None, 2**64)],
    *[("history", "before", ("a",), {"before": before}) for before in PLACES],
    *[("publish", "channel", (channel, 1), {}) for channel in (5, None, b"a", HALF, "a.*")],
    *[("publish", "payload", ("a", payload), {}) for payload in (HALF, {HALF: 1}, object(), {1, object()}, 10**5000)],
    ("publish", "ephemeral", ("a", 1), {"ephemeral": "yes"}),
    ("publish", "echo", ("a", 1), {"echo": 0}),
    ("publish_many", "messages[1]", ([("a", 1), "ab"],), {}),
    ("publish_many", "messages[0]", ([5],), {}),
    ("publish_many", "channel of messages[0]", ([(5, 1)],), {}),
    ("publish_many", "echo", ([("a", 1)],), {"echo": None}),
    *[("authenticate", "token", (token,), {}) for token in (None, 5, b"t", HALF, "t" * 70_000)],
]


async def call(bus: Bus, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    if method == "subscribe":
        async with bus.subscribe(*args, **options):
            pass
    else:
        await getattr(bus, method)(*args, **options)


async def test_wrong_argument_affects_no_other_call() -> None:
    broker = Honest()
    async with talk_to(broker) as bus, bus.subscribe("b") as messages:
        for method, name, args, options in CALLS:
            with pytest.raises((TypeError, ValueError, Refused)) as caught:
                await call(bus, method, args, options)
            text = str(caught.value)
            assert name in text or isinstance(caught.value, Refused), (method, name, text)
            assert len(text) < 400
        nested: list[Any] = []
        for _ in range(100):
            nested = [nested]
        with pytest.raises(Refused, match="nested"):
            await bus.publish("a", nested)
        assert await bus.publish("b", 1) == 101
        assert (await anext(messages)).payload == 1
    assert [request["pattern"] for request in broker.subscribes] == ["b"]
    assert len(broker.published) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("url", {"url": 5}),
        ("url", {"url": HALF}),
        ("fallback_url", {"fallback_url": 5}),
        ("token", {"token": 5}),
        ("token", {"token": None}),
        ("token", {"token": HALF}),
        ("timeout", {"timeout": 0}),
        ("timeout", {"timeout": "1"}),
        ("keepalive", {"keepalive": float("nan")}),
        ("upgrade", {"upgrade": -1}),
        ("persist", {"persist": "yes"}),
        ("wait", {"wait": 0}),
        ("reconnect", {"reconnect": 5}),
        ("on_event", {"on_event": 5}),
        ("ssl_context", {"ssl_context": ssl.create_default_context(), "url": "https://127.0.0.1:1"}),
        ("certificate_hash", {"certificate_hash": b"x"}),
    ],
)
async def test_wrong_argument_of_connect_is_named(name: str, options: dict[str, Any]) -> None:
    given = {"url": "ws://127.0.0.1:1", "token": "t", **options}
    with pytest.raises((TypeError, ValueError), match=name):
        async with connect(**given):
            pytest.fail("it connected")


@given(st.integers(0, 2**63 - 1), st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=60))
def test_cursor_decodes_to_the_seq_and_epoch_that_were_encoded(seq: int, epoch: str) -> None:
    assert check_position("since", encode_cursor(seq, epoch)) == (seq, epoch)


@given(st.text() | st.integers() | st.floats() | st.none() | st.binary())
def test_any_position_is_accepted_or_rejected(value: object) -> None:
    try:
        seq, _ = check_position("since", value)
    except (TypeError, ValueError):
        seq = None
    assert seq is None or 0 <= seq < 2**63


def test_error_shows_a_value_at_a_bounded_length() -> None:
    for check in (lambda: check_integer("n", "x" * 10_000, 0), lambda: check_integer("n", 10**10_000, 0)):
        with pytest.raises((TypeError, ValueError)) as caught:
            check()
        assert len(str(caught.value)) < 150
    with pytest.raises(ValueError, match="longer than 3 bytes"):
        check_text("t", "\u00e4\u00e4", 3)
