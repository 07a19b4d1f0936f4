"""An issuer of JWTs: its keys, the tokens that it signs (with joserfc), and its server of key sets over HTTPS."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import Any

import trio
import trustme
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet

GRANTED = {"read": ["*"], "write": ["*"]}
PATH = "/.well-known/jwks.json"


class Issuer:
    """Signs with its newest key. `body`, `status` and `headers` are what the server replies to a request."""

    def __init__(self) -> None:
        self.keys: list[ECKey] = []
        self.status = 200
        self.headers: list[str] = []
        self.requests: list[str] = []
        """The heads of the requests so far."""
        self.sent = 0
        """Bytes of the bodies that were sent so far."""
        self.answering = trio.Event()
        """The server answers while it is set."""
        self.answering.set()
        self.body: bytes | Iterable[bytes] = b""
        self.url = ""
        self.authority = trustme.CA()
        self._names = count(1)
        self._listeners: list[trio.SocketListener] = []
        self._serving = trio.CancelScope()
        self.rotate()

    def rotate(self) -> None:
        """Sign with a new key from now on. The key set has it, and the one before."""
        self.keys = [ECKey.generate_key("P-256", {"kid": f"key {next(self._names)}"}), *self.keys[:1]]
        self.publish(*self.keys)

    def publish(self, *keys: Any) -> None:
        """Serve these keys."""
        self.body = json.dumps(KeySet(list(keys)).as_dict(private=False)).encode()

    def token(self, key: ECKey | None = None, **claims: Any) -> str:
        """A token that is signed with the newest key, or with this one."""
        key = key or self.keys[0]
        claims = {"sub": "alice", "catbus": GRANTED, **claims}
        return jwt.encode({"alg": "ES256", "kid": key.kid}, claims, key)

    async def serve(
        self, port: int = 0, *, tls: bool = True, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until `stop` is called."""
        [listener] = await trio.open_tcp_listeners(port, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}{PATH}"
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert("127.0.0.1").configure_cert(context)
        with trio.CancelScope() as self._serving:
            await trio.serve_listeners(
                partial(self._answer, context if tls else None), [listener], task_status=task_status
            )

    def stop(self) -> None:
        """Refuse all connections."""
        self._serving.cancel()

    async def _answer(self, context: ssl.SSLContext | None, stream: trio.abc.Stream) -> None:
        if context is not None:
            stream = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            async with stream:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    received = await stream.receive_some()
                    if not received:
                        return
                    head += received
                self.requests.append(head.decode())
                await self.answering.wait()
                parts = [self.body] if isinstance(self.body, bytes) else self.body
                lines = [f"HTTP/1.1 {self.status} status", "Content-Type: application/json", "Connection: close"]
                await stream.send_all("\r\n".join([*lines, *self.headers, "", ""]).encode())
                for part in parts:
                    await self.answering.wait()
                    await stream.send_all(part)
                    self.sent += len(part)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


@asynccontextmanager
async def open_issuer(*, tls: bool = True) -> AsyncIterator[Issuer]:
    """An issuer whose server runs."""
    issuer = Issuer()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(issuer.serve, tls=tls))
        yield issuer
        nursery.cancel_scope.cancel()
