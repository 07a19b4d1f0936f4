"""A TCP proxy before PostgreSQL that a test closes, cuts or blocks to simulate an outage."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

import trio


class Proxy:
    """A proxy that forwards TCP connections to the database of a URL; `url` connects through it."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._query = {**_query(url), "sslmode": "disable"}
        self._query.pop("host", None)
        self._query.pop("port", None)
        self._target = _target(url)
        self.url = ""
        self.accepted = 0
        """The number of connections forwarded so far."""
        self.refused = 0
        self._open = True
        self._connections: set[trio.CancelScope] = set()
        self._questions, self._answers = trio.Event(), trio.Event()
        self.unblock()
        self._refusal = trio.Event()

    def close(self) -> None:
        """Refuse new connections and cut the existing ones: the database is unreachable."""
        self._open = False
        self.cut()

    def open(self, url: str | None = None) -> None:
        """Accept connections again, to the same database or to another one."""
        self._open = True
        self._target = self._target if url is None else _target(url)

    def cut(self) -> None:
        """Cut all connections."""
        for scope in self._connections:
            scope.cancel()

    def block(self) -> None:
        """Forward nothing more, and close nothing."""
        self._questions = trio.Event()
        self.block_answers()

    def block_answers(self) -> None:
        """Forward nothing more from the database; requests still pass."""
        self._answers = trio.Event()

    def unblock(self) -> None:
        self._questions.set()
        self._answers.set()

    async def _wait_answers(self) -> None:
        await self._answers.wait()

    async def _wait_questions(self) -> None:
        await self._questions.wait()

    async def wait_refused(self) -> None:
        """Wait until the next connection is refused."""
        self._refusal = trio.Event()
        await self._refusal.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        user = self._parts.netloc.rpartition("@")[0]
        netloc = f"{user}@127.0.0.1:{port}" if user else f"127.0.0.1:{port}"
        self.url = urlunsplit(self._parts._replace(netloc=netloc, query=urlencode(self._query)))
        await trio.serve_listeners(self._serve, [listener], task_status=_Started(task_status))

    async def _serve(self, client: trio.SocketStream) -> None:
        async with client:
            if not self._open:
                self.refused += 1
                self._refusal.set()
                return
            self.accepted += 1
            try:
                if isinstance(self._target, str):
                    server = await trio.open_unix_socket(self._target)
                else:
                    server = await trio.open_tcp_stream(*self._target)
            except OSError:
                return  # The database itself is unreachable.
            async with server, trio.open_nursery() as nursery:
                self._connections.add(nursery.cancel_scope)
                try:
                    nursery.start_soon(self._pass_questions, client, server, nursery.cancel_scope)
                    await self._pass(server, client, self._wait_answers)
                finally:
                    self._connections.discard(nursery.cancel_scope)
                nursery.cancel_scope.cancel()

    async def _pass_questions(
        self, client: trio.SocketStream, server: trio.SocketStream, connection: trio.CancelScope
    ) -> None:
        """Forward from a client. If it was killed, its connection is reset, and the database is told."""
        if not await self._pass(client, server, self._wait_questions):
            await self._wait_questions()
            connection.cancel()

    async def _pass(
        self, source: trio.SocketStream, sink: trio.SocketStream, wait_clear: Callable[[], Awaitable[None]]
    ) -> bool:
        """Forward until the end. Returns False if one of the connections was reset."""
        try:
            async for data in source:
                await wait_clear()
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True


def _query(url: str) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(urlsplit(url).query).items()}


def _target(url: str) -> str | tuple[str, int]:
    """The address at which the database of a URL listens."""
    parts, query = urlsplit(url), _query(url)
    host = query.get("host") or parts.hostname or "localhost"
    port = int(query.get("port") or parts.port or 5432)
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)


class _Started:
    """A task status that reports the start of the listeners without their names."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()


@asynccontextmanager
async def open_proxy(url: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(url)
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.run)
        yield proxy
        nursery.cancel_scope.cancel()
