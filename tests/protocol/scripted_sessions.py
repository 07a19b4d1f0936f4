"""Runs the sessions of `protocol/vectors/sessions.json` against a broker, over any transport."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.client import Disconnected, Transport
from catbus.client.transport_interface import DrivenTransport
from catbus.protocol.json_splitter import JsonSplitter

FILE = Path(__file__).parents[2] / "protocol" / "vectors" / "sessions.json"
SESSIONS: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["sessions"]

KINDS: dict[str, Callable[[Any], bool]] = {
    "$int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "$string": lambda value: isinstance(value, str),
}
STEP_TIMEOUT = 10.0
"""Seconds for one step."""
_ABSENT = object()


class Mismatch(AssertionError):
    """The broker sent something else."""


class ScriptedClient(Protocol):
    """A client that sends the texts of a session and returns the objects that it receives."""

    async def send(self, text: str) -> bool:
        """Send the text. Returns False if this client has no way to send it."""

    async def receive(self) -> dict[str, Any]:
        """Return the next object. Raises `Disconnected`, with the closing code, at the end."""

    async def close(self) -> None: ...


class Connection:
    """A `ScriptedClient` that sends every text unchanged, over a transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._framer: JsonSplitter[dict[str, Any]] = JsonSplitter(msgspec.json.Decoder(dict[str, Any]).decode, 1 << 20)
        self._received: list[dict[str, Any]] = []

    async def send(self, text: str) -> bool:
        await self._transport.send(text.encode())
        return True

    async def receive(self) -> dict[str, Any]:
        while not self._received:
            for each in self._framer.feed((await self._transport.receive()).data):
                assert isinstance(each, dict)
                self._received.append(each)
        return self._received.pop(0)

    async def close(self) -> None:
        await self._transport.aclose()


Open = Callable[[trio.Nursery], Awaitable[ScriptedClient]]


def over(dial: Callable[[], Awaitable[Transport]]) -> Open:
    """Make clients that send every text unchanged, each over its own connection."""

    async def open_client(nursery: trio.Nursery) -> ScriptedClient:
        transport = await dial()
        if isinstance(transport, DrivenTransport):
            nursery.start_soon(transport.run)
        return Connection(transport)

    return open_client


class ScriptedSession:
    """One session of the vectors, with the names of the values that were received."""

    def __init__(self, session: dict[str, Any], open_client: Open, secret: str) -> None:
        self.passed_over: list[str] = []
        """The texts that a client could not send."""
        self._session = session
        self._open = open_client
        self._names: dict[str, Any] = {}
        self._word = secrets.token_hex(4)
        self._tokens = {name: self._sign(secret, found) for name, found in session["tokens"].items()}
        self._clients: dict[str, ScriptedClient] = {}
        self._silent: set[str] = set()
        """Clients that could not send the last text, so that no reply is expected."""

    @staticmethod
    def _sign(secret: str, found: dict[str, Any]) -> str:
        grants = {kind: tuple(p for k, p in found["grants"] if k in (kind, "all")) for kind in ("read", "write")}
        return sign(secret, client_id=found["client_id"], grants=Grants(**grants))

    async def run(self) -> None:
        """Run all steps. Raises `Mismatch` if the broker sends something else."""
        mismatch = None
        async with trio.open_nursery() as nursery:
            try:
                for number, step in enumerate(self._session["steps"], 1):
                    await self._take(number, step, nursery)
            except Mismatch as error:
                mismatch = error
            finally:
                with trio.CancelScope(shield=True):
                    for client in self._clients.values():
                        await client.close()
            nursery.cancel_scope.cancel()
        if mismatch is not None:
            raise mismatch

    async def _take(self, number: int, step: dict[str, Any], nursery: trio.Nursery) -> None:
        try:
            with trio.fail_after(STEP_TIMEOUT):
                await self._step(step, nursery)
        except (Mismatch, Disconnected, trio.TooSlowError) as error:
            raise Mismatch(f"{self._session['name']}, step {number}, {step}: {error}") from None

    async def _step(self, step: dict[str, Any], nursery: trio.Nursery) -> None:
        name = next(step[kind] for kind in ("send", "receive", "close", "closed") if kind in step)
        if name not in self._clients:
            self._clients[name] = await self._open(nursery)
        client = self._clients[name]
        if "send" in step:
            if await client.send(step["text"] if "text" in step else json.dumps(self._fill(step["object"]))):
                self._silent.discard(name)
            else:
                self._silent.add(name)
                self.passed_over.append(step["text"] if "text" in step else step["object"]["type"])
        elif "close" in step:
            await client.close()
        elif name in self._silent:
            pass
        elif "closed" in step:
            await self._expect_end(client, step["code"])
        elif "unordered" in step:
            received = [await self._receive(client) for _ in step["unordered"]]
            for wanted in step["unordered"]:
                match = next((each for each in received if self._is(wanted, each)), None)
                if match is None:
                    raise Mismatch(f"none of {received} is {self._fill(wanted)}")
                received.remove(match)
        else:
            found = await self._receive(client)
            wanted = step.get("object") or step["exactly"]
            if not self._is(wanted, found) or ("exactly" in step and wanted.keys() != found.keys()):
                raise Mismatch(f"{found} is not that ({self._names})")

    async def _receive(self, client: ScriptedClient) -> dict[str, Any]:
        while (found := await client.receive())["type"] == "head":
            pass
        return found

    async def _expect_end(self, client: ScriptedClient, code: int) -> None:
        try:
            while True:
                await client.receive()
        except Disconnected as end:
            if end.code != code:
                raise Mismatch(f"it was closed with {end.code}") from None

    def _fill(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._fill(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._fill(inner) for inner in value]
        if not isinstance(value, str):
            return value
        if value in self._names:
            return self._names[value]
        value = value.replace("${run}", self._word)
        return re.sub(r"\$\{token:(\w+)\}", lambda found: self._tokens[found[1]], value)

    def _is(self, wanted: Any, found: Any) -> bool:
        """Whether the value matches. If so, the names in `wanted` keep their values for later steps."""
        names = dict(self._names)
        if self._fits(wanted, found, names):
            self._names = names
            return True
        return False

    def _fits(self, wanted: Any, found: Any, names: dict[str, Any]) -> bool:
        if isinstance(wanted, dict):
            return isinstance(found, dict) and all(
                self._fits(inner, found.get(key, _ABSENT), names) for key, inner in wanted.items()
            )
        if isinstance(wanted, list):
            return (
                isinstance(found, list)
                and len(wanted) == len(found)
                and all(self._fits(one, other, names) for one, other in zip(wanted, found, strict=True))
            )
        if wanted == "$absent":
            return found is _ABSENT
        if wanted in KINDS:
            return KINDS[wanted](found)
        if isinstance(wanted, str) and re.fullmatch(r"\$\w+", wanted):
            return found is not _ABSENT and bool(names.setdefault(wanted, found) == found)
        return bool(self._fill(wanted) == found)
