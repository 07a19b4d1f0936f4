"""Plays `protocol/vectors/conversations.json` to a broker, over any transport."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from catbus.auth.tokens import Grants, sign
from catbus.client import Disconnected, Transport
from catbus.client.transport import Driven
from catbus.protocol.json_splitter import Framer

FILE = Path(__file__).parents[2] / "protocol" / "vectors" / "conversations.json"
CONVERSATIONS: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["conversations"]

KINDS: dict[str, Callable[[Any], bool]] = {
    "$int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "$string": lambda value: isinstance(value, str),
}
PATIENCE = 10.0
"""Seconds for one step."""
_ABSENT = object()


class Mismatch(AssertionError):
    """The broker has said something else."""


class Peer(Protocol):
    """Who speaks to a broker, and tells what it hears."""

    async def say(self, text: str) -> bool:
        """Say it; False for what this peer cannot be brought to say."""

    async def hear(self) -> dict[str, Any]:
        """The next object. Raises `Disconnected`, with the code, where there is no more."""

    async def close(self) -> None: ...


class Connection:
    """A `Peer` that says what it is told, over a transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._framer: Framer[dict[str, Any]] = Framer(msgspec.json.Decoder(dict[str, Any]).decode, 1 << 20)
        self._heard: list[dict[str, Any]] = []

    async def say(self, text: str) -> bool:
        await self._transport.send(text.encode())
        return True

    async def hear(self) -> dict[str, Any]:
        while not self._heard:
            for each in self._framer.feed((await self._transport.receive()).data):
                assert isinstance(each, dict)
                self._heard.append(each)
        return self._heard.pop(0)

    async def close(self) -> None:
        await self._transport.aclose()


Open = Callable[[trio.Nursery], Awaitable[Peer]]


def over(dial: Callable[[], Awaitable[Transport]]) -> Open:
    """Peers that say what they are told, each over a connection of its own."""

    async def open_peer(nursery: trio.Nursery) -> Peer:
        transport = await dial()
        if isinstance(transport, Driven):
            nursery.start_soon(transport.run)
        return Connection(transport)

    return open_peer


class Player:
    """One conversation, with the names that it has given to what it heard."""

    def __init__(self, conversation: dict[str, Any], open_peer: Open, secret: str) -> None:
        self.passed_over: list[str] = []
        """What a peer could not be brought to say."""
        self._conversation = conversation
        self._open = open_peer
        self._names: dict[str, Any] = {}
        self._run = secrets.token_hex(4)
        self._tokens = {name: self._sign(secret, found) for name, found in conversation["tokens"].items()}
        self._peers: dict[str, Peer] = {}
        self._silent: set[str] = set()
        """Peers that have said nothing of what they should: there is nothing to be heard."""

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
                    for peer in self._peers.values():
                        await peer.close()
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
        name = next(step[kind] for kind in ("say", "hear", "close", "closed") if kind in step)
        if name not in self._peers:
            self._peers[name] = await self._open(nursery)
        peer = self._peers[name]
        if "say" in step:
            if await peer.say(step["text"] if "text" in step else json.dumps(self._said(step["object"]))):
                self._silent.discard(name)
            else:
                self._silent.add(name)
                self.passed_over.append(step["text"] if "text" in step else step["object"]["type"])
        elif "close" in step:
            await peer.close()
        elif name in self._silent:
            pass
        elif "closed" in step:
            await self._expect_end(peer, step["code"])
        elif "unordered" in step:
            heard = [await self._hear(peer) for _ in step["unordered"]]
            for wanted in step["unordered"]:
                match = next((each for each in heard if self._is(wanted, each)), None)
                if match is None:
                    raise Mismatch(f"none of {heard} is {self._said(wanted)}")
                heard.remove(match)
        else:
            found = await self._hear(peer)
            wanted = step.get("object") or step["exactly"]
            if not self._is(wanted, found) or ("exactly" in step and wanted.keys() != found.keys()):
                raise Mismatch(f"{found} is not that ({self._names})")

    async def _hear(self, peer: Peer) -> dict[str, Any]:
        while (found := await peer.hear())["type"] == "head":
            pass
        return found

    async def _expect_end(self, peer: Peer, code: int) -> None:
        try:
            while True:
                await peer.hear()
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
