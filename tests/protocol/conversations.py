"""Plays `protocol/vectors/conversations.json` to a broker, over any transport."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from catbus.auth import Grants, sign
from catbus.client import Disconnected, Transport
from catbus.client.transport import Driven
from catbus.framing import Framer

FILE = Path(__file__).parents[2] / "protocol" / "vectors" / "conversations.json"
CONVERSATIONS: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["conversations"]

Dial = Callable[[], Awaitable[Transport]]
KINDS: dict[str, Callable[[Any], bool]] = {
    "$int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "$string": lambda value: isinstance(value, str),
}
PATIENCE = 10.0
"""Seconds for one step."""
_ABSENT = object()


class Mismatch(AssertionError):
    """The broker has said something else."""


class Connection:
    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._framer: Framer[dict[str, Any]] = Framer(msgspec.json.Decoder(dict[str, Any]).decode, 1 << 20)
        self._heard: list[dict[str, Any]] = []

    async def hear(self) -> dict[str, Any]:
        while True:
            while self._heard:
                found = self._heard.pop(0)
                if found["type"] != "head":
                    return found
            for each in self._framer.feed((await self.transport.receive()).data):
                assert isinstance(each, dict)
                self._heard.append(each)


class Player:
    """One conversation, with the names that it has given to what it heard."""

    def __init__(self, conversation: dict[str, Any], dial: Dial, secret: str) -> None:
        self._conversation = conversation
        self._dial = dial
        self._names: dict[str, Any] = {}
        self._run = secrets.token_hex(4)
        self._tokens = {name: self._sign(secret, found) for name, found in conversation["tokens"].items()}
        self._connections: dict[str, Connection] = {}

    @staticmethod
    def _sign(secret: str, found: dict[str, Any]) -> str:
        grants = {kind: tuple(p for k, p in found["grants"] if k in (kind, "all")) for kind in ("read", "write")}
        return sign(secret, client_id=found["client_id"], grants=Grants(**grants))

    async def play(self) -> None:
        """Raises `Mismatch` where the broker says something else."""
        mismatch = None
        async with trio.open_nursery() as nursery:
            try:
                for number, step in enumerate(self._conversation["steps"], 1):
                    await self._take(number, step, nursery)
            except Mismatch as error:
                mismatch = error
            finally:
                with trio.CancelScope(shield=True):
                    for connection in self._connections.values():
                        await connection.transport.aclose()
            nursery.cancel_scope.cancel()
        if mismatch is not None:
            raise mismatch

    async def _take(self, number: int, step: dict[str, Any], nursery: trio.Nursery) -> None:
        try:
            with trio.fail_after(PATIENCE):
                await self._step(step, nursery)
        except (Mismatch, Disconnected, trio.TooSlowError) as error:
            raise Mismatch(f"{self._conversation['name']}, step {number}, {step}: {error}") from None

    async def _step(self, step: dict[str, Any], nursery: trio.Nursery) -> None:
        if "close" in step:
            await self._connections[step["close"]].transport.aclose()
            return
        if "closed" in step:
            await self._expect_end(self._connections[step["closed"]], step["code"])
            return
        connection = await self._connection(step.get("say") or step["hear"], nursery)
        if "say" in step:
            text = step["text"] if "text" in step else json.dumps(self._said(step["object"]))
            await connection.transport.send(text.encode())
        elif "unordered" in step:
            heard = [await connection.hear() for _ in step["unordered"]]
            for wanted in step["unordered"]:
                match = next((each for each in heard if self._is(wanted, each)), None)
                if match is None:
                    raise Mismatch(f"none of {heard} is {self._said(wanted)}")
                heard.remove(match)
        else:
            found = await connection.hear()
            wanted = step.get("object") or step["exactly"]
            if not self._is(wanted, found) or ("exactly" in step and wanted.keys() != found.keys()):
                raise Mismatch(f"{found} is not that ({self._names})")

    async def _connection(self, name: str, nursery: trio.Nursery) -> Connection:
        if name not in self._connections:
            transport = await self._dial()
            if isinstance(transport, Driven):
                nursery.start_soon(transport.run)
            self._connections[name] = Connection(transport)
        return self._connections[name]

    async def _expect_end(self, connection: Connection, code: int) -> None:
        try:
            while True:
                await connection.hear()
        except Disconnected as end:
            if end.code != code:
                raise Mismatch(f"it was closed with {end.code}") from None

    def _said(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._said(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._said(inner) for inner in value]
        if not isinstance(value, str):
            return value
        if value in self._names:
            return self._names[value]
        value = value.replace("${run}", self._run)
        return re.sub(r"\$\{token:(\w+)\}", lambda found: self._tokens[found[1]], value)

    def _is(self, wanted: Any, found: Any) -> bool:
        """Whether it is that; what it is called is remembered when it is."""
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
        return bool(self._said(wanted) == found)
