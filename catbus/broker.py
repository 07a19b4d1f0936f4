"""The broker: starts all parts of a replica, and stops them in order.

A Trio nursery supervises a QUIC endpoint, a WebSocket endpoint, and a PostgreSQL notification listener, with each
client session as a child task that subscribes to an in-memory topic tree kept consistent through NOTIFY.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from math import ceil
from typing import Any, Unpack

import msgspec
import trio

from .auth.grants import Grants, Identity
from .auth.jwt_keys import KeySetSource
from .auth.tokens import Authenticator
from .certificates import CertificateSource
from .config import Config, is_url
from .delivery.page_size import MAX_HISTORY
from .endpoints import serve_http, serve_quic
from .errors import ConflictError, PeerError, Refused
from .in_process import LocalPage, LocalSnapshot, LocalSubscription, read_history, read_retained
from .log import Log, MemoryLog, Rejected
from .malloc_trim import trim_after_peaks
from .observability.metrics import export_metrics
from .postgres import PostgresLog
from .postgres.embedded import server as embedded_server
from .presence import MembersPage
from .presence.interface import MAX_MEMBERS
from .presence.member_pages import read_members
from .processes.worker import Worker
from .protocol.channels import check_pattern
from .protocol.wire_messages import MAX_NUMBER, Publish, check_payload, to_json
from .replica import Replica
from .session.hooks import HOOK_TIMEOUT, AuthenticateHook, HookOptions, Hooks, PublishHook, SessionHook
from .session.session_report import SessionReport
from .webtransport.connection_ids import ALL_CONNECTION_IDS, ConnectionIdShare

OWNER = Identity(client_id=None, grants=Grants.ADMIN, expires=None, admin=True)
"""The identity that publishes and subscribes in this process."""

FLUSH_TIMEOUT = 2.0
"""Seconds for publishing the closes of the last sessions, for ending their memberships, and for giving back the leases
of webhooks, while the replica stops."""

HANDOVER_TIME = 1.0
"""Seconds in which a connection that a stopping worker has accepted sends its first request. Later connections are
accepted by the other workers."""


@contextmanager
def refusing() -> Iterator[None]:
    """Raise `Refused` for a request that would be rejected from a client."""
    try:
        yield
    except PeerError as error:
        raise Refused(error.code, error.message) from None


class Broker:
    """A running replica, for the program that embeds it."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self._stopping = trio.Event()

    @property
    def addresses(self) -> list[tuple[str, str]]:
        """Each transport and its addresses: `("websocket", "127.0.0.1:8080")`, `("webtransport", "127.0.0.1:4433")`."""
        endpoints = self.replica.endpoints.items()
        return [(transport, address) for transport, endpoint in endpoints for address in endpoint.addresses]

    @property
    def urls(self) -> list[str]:
        """The URLs for clients: `ws://127.0.0.1:8080/ws` (or `wss://`), `https://127.0.0.1:4433`."""
        return client_urls(self.replica.config, self.addresses)

    @property
    def http_urls(self) -> list[str]:
        """The URLs of the HTTP endpoint, without a path: `http://127.0.0.1:8080` (or `https://`)."""
        return page_urls(self.replica.config, self.addresses)

    @property
    def sessions(self) -> list[SessionReport]:
        """Describe the sessions of this replica as they are now, in the order in which they were opened.

        The cost grows with the number of their subscriptions.
        """
        position = self.replica.delivery.position
        return [session.report(position) for session in self.replica.sessions.values()]

    async def history(self, pattern: str, *, before: int | None = None, limit: int = 100) -> LocalPage:
        """Read the newest `limit` messages (1 to 1,000) that match, below the seq `before`, from the log.

        They are in the page oldest first; `page.more` says whether there are older ones. Raises `Refused` for a bad
        pattern, `ValueError` for another limit, and `Unavailable` while the database is unreachable. May be cancelled.
        """
        if not 1 <= limit <= MAX_HISTORY:
            raise ValueError(f"limit: from 1 to {MAX_HISTORY}, not {limit}")
        with refusing():
            return await read_history(self.replica, pattern, before, limit)

    async def retained(self, pattern: str) -> LocalSnapshot:
        """Read the retained messages that match. To follow their changes, `subscribe` after their `seq` and `epoch`.

        It takes memory for all of them. Raises `Refused` for a bad pattern, and `Unavailable` while the database is
        unreachable. May be cancelled.
        """
        with refusing():
            return await read_retained(self.replica, pattern)

    async def members(self, pattern: str, *, after: str | None = None, limit: int = 100) -> MembersPage:
        """Read who is in the channels that match, on all replicas: at most `limit` members (1 to 1,000).

        `after` is the `next` of the page before, which is None on the last page. Raises `Refused` for a bad pattern or
        another `after`, `ValueError` for another limit, and `Unavailable` while the database is unreachable. May be
        cancelled.
        """
        if not 1 <= limit <= MAX_MEMBERS:
            raise ValueError(f"limit: from 1 to {MAX_MEMBERS}, not {limit}")
        with refusing():
            check_pattern(pattern)
            return await read_members(self.replica.presence, pattern, after, limit)

    async def publish(
        self,
        channel: str,
        payload: Any,
        *,
        ephemeral: bool = False,
        sender: str | None = None,
        retain: bool = False,
        expect: int | None = None,
    ) -> int | None:
        """Publish a JSON value and return its seq once it is committed (None for an ephemeral one).

        `sender` is the client_id that subscribers receive with the message; it counts against no limit of that client.
        `retain` makes the message the channel's retained one, or removes that if the payload is None. With `expect`, it
        is published only if that is the seq of the channel's retained message, 0 for none. No hook is called.

        Raises `Refused` (`ConflictError` if `expect` does not hold), and `TypeError` or `ValueError` for a payload that
        has no JSON form, a sender that is no client_id, and an `expect` that is no seq. Cancelling it leaves open
        whether the message is committed.
        """
        if sender is not None:
            _check_sender(sender, self.replica.config.limits.client_id)
        if expect is not None and not 0 <= expect <= MAX_NUMBER:
            raise ValueError(f"expect: a seq from 0 to {MAX_NUMBER}")
        with refusing():
            data = msgspec.Raw(check_payload(to_json(payload)))
            request = Publish(channel, data, ephemeral=ephemeral, retain=retain, expect=expect)
        [outcome] = await self.replica.publish(replace(OWNER, client_id=sender), [request], charged=False)
        if isinstance(outcome, Rejected):
            if outcome.retained_seq is not None:
                raise ConflictError(outcome.message, outcome.retained_seq)
            raise Refused(outcome.code, outcome.message)
        return None if outcome is None else outcome.seq

    @asynccontextmanager
    async def subscribe(
        self, pattern: str, *, since: int | None = None, epoch: str | None = None
    ) -> AsyncIterator[LocalSubscription]:
        """Subscribe to the messages that match, from now on or after `since`. Raises `Refused` for a bad pattern."""
        with refusing():
            messages = LocalSubscription(self.replica, pattern, since, epoch)
        try:
            yield messages
        finally:
            messages.close()

    async def erase(self, pattern: str, *, sender: str | None = None, before: datetime | None = None) -> int:
        """Erase the contents of messages that match, and return the number of these messages. Their seqs stay.

        `sender` and `before` restrict it to messages of that `client_id`, and to older ones. Raises `Refused` for a bad
        pattern, and `Unavailable`; then, and when it is cancelled, a part of them may be erased.
        """
        with refusing():
            check_pattern(pattern)
        at = None if before is None else ceil(before.timestamp() * 1000)
        return await self.replica.log.erase(pattern, sender=sender, before=at)

    def reload(self) -> None:
        """Read the certificate again. If it is not valid, the present one stays, and a log line says why."""
        if self.replica.certificates is not None:
            self.replica.certificates.reload(datetime.now(UTC))

    def stop(self) -> None:
        """Begin a graceful shutdown: `serve` returns when it is complete."""
        self._stopping.set()

    async def wait_stopping(self) -> None:
        """Wait until `stop` has been called."""
        await self._stopping.wait()


def client_urls(config: Config, addresses: Sequence[tuple[str, str]]) -> list[str]:
    """Return the URLs for clients of each transport and its address."""
    websocket = "wss" if config.websocket.tls else "ws"
    forms = {"websocket": f"{websocket}://{{}}/ws", "webtransport": "https://{}"}
    return [forms[transport].format(address) for transport, address in addresses]


def page_urls(config: Config, addresses: Sequence[tuple[str, str]]) -> list[str]:
    """Return the URLs of the HTTP endpoint, without a path."""
    scheme = "https" if config.websocket.tls else "http"
    return [f"{scheme}://{address}" for transport, address in addresses if transport == "websocket"]


async def serve(
    config: Config,
    *,
    authenticate: AuthenticateHook | None = None,
    on_publish: PublishHook | None = None,
    on_session: SessionHook | None = None,
    hook_timeout: float = HOOK_TIMEOUT,
    worker: Worker | None = None,
    task_status: trio.TaskStatus[Broker] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a replica until `Broker.stop`. `task_status` gets the broker when its endpoints are open.

    While the database is unreachable, the endpoints are open, `/ready` returns 503, and connecting is retried. Raises
    `ConfigError`, also for an address that cannot be bound, in an exception group. Cancelling it closes all connections
    at once.

    The hooks are called for clients, over every transport:

    - `authenticate(token, client)` returns the `AuthenticatedClient` that a token names, or None: then the token is
      verified as one of the broker's own. It is not called for the admin key.
    - `on_publish(client, channel, payload)` is called for each publish that the client's grants allow, retries
      included, before it is appended. It returns None to publish it as it is, or a `Replacement`. The publishes of a
      session, or of a request, wait for one another, so they keep their order.
    - `on_session(client)` returns an async context manager. The broker enters it when a session opens, before the
      client is told so, and leaves it when the session ends, in the same task.

    Each may raise `Refused`: the request is rejected with its code and text. It may raise `Unavailable` or
    `trio.TooSlowError`, or take longer than `hook_timeout` seconds (each of entering and leaving for `on_session`):
    the request is rejected as `unavailable`. After any other exception it is rejected as `internal`. Only refusals are
    not logged. If a session's context ends by itself, the session is closed. A hook is cancelled when the broker is
    cancelled, and `authenticate` and `on_publish` also when the broker closes their client's connection.

    `worker` is for `catbus run --workers`: the sockets that a worker has inherited, and how it asks the others.
    """
    certificates = None
    if config.certificate_needed:
        certificates = CertificateSource(config.webtransport, config.state_directory, datetime.now(UTC))
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as contexts:
            hooks = Hooks(
                contexts,
                authenticate=authenticate,
                on_publish=on_publish,
                on_session=on_session,
                hook_timeout=hook_timeout,
            )
            broker = await _start(config, nursery, certificates, hooks, worker)
            replica = broker.replica
            async with trio.open_nursery() as sessions:
                inherited = () if worker is None else worker.listeners
                http = await nursery.start(
                    partial(serve_http, replica, config.websocket.bind, sessions, inherited=inherited)
                )
                replica.add_endpoint("websocket", http)
                if certificates is not None and config.webtransport_served and (worker is None or worker.udp_sockets):
                    latest, udp = certificates.latest_quic, _udp_options(worker)
                    quic = partial(serve_quic, replica, config.webtransport.bind, latest, sessions, **udp)
                    replica.add_endpoint("webtransport", await nursery.start(quic))
                task_status.started(broker)

                await broker.wait_stopping()
                if worker is not None and not worker.all_stopping():
                    http.stop_accepting()
                    await trio.sleep(HANDOVER_TIME)
                await replica.drain()
                for endpoint in replica.endpoints.values():
                    endpoint.close()
                replica.finish()
                sessions.cancel_scope.deadline = trio.current_time() + config.drain.deadline
            with trio.move_on_after(FLUSH_TIMEOUT):
                await replica.session_events.flush()
                await replica.presence.flush()
                await replica.log.finish()
            # The contexts of sessions are left when their connections are closed, while the broker still runs.
        nursery.cancel_scope.cancel()


def _udp_options(worker: Worker | None) -> dict[str, Any]:
    """Return what `serve_quic` needs to know of the worker that it runs in."""
    if worker is None:
        return {}
    share = ConnectionIdShare(worker.number, worker.count) if worker.steered else ALL_CONNECTION_IDS
    return {"inherited": worker.udp_sockets, "share": share}


@asynccontextmanager
async def open_broker(config: Config | None = None, **hooks: Unpack[HookOptions]) -> AsyncIterator[Broker]:
    """Run a replica without endpoints, for use in this process. Waits until the database is reachable.

    The hooks of `serve` are called for connections that something else serves: `catbus.testing.open_test_broker` does.
    """
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as contexts:
            broker = await _start(config or Config(), nursery, hooks=Hooks(contexts, **hooks))
            await broker.replica.log.wait_open()
            yield broker
            contexts.cancel_scope.deadline = trio.current_time() + hooks.get("hook_timeout", HOOK_TIMEOUT)
        nursery.cancel_scope.cancel()


def _check_sender(sender: str, most: int) -> None:
    if "\0" in sender or len(sender.encode()) > most:
        raise ValueError(f"sender: a client_id of at most {most} bytes, without U+0000")


async def _start(
    config: Config,
    nursery: trio.Nursery,
    certificates: CertificateSource | None = None,
    hooks: Hooks | None = None,
    worker: Worker | None = None,
) -> Broker:
    """Start a replica without its endpoints: the log, the delivery that follows it, and the flusher."""
    settings = config.auth
    authenticator = Authenticator(
        settings.secrets,
        admin_key=settings.admin_key,
        jwt_keys=[await trio.Path(file).read_text() for file in settings.jwt if not is_url(file)],
        issuers=settings.issuer,
        audiences=settings.audience,
        leeway=settings.leeway,
    )
    key_sets = await _fetch_key_sets([url for url in settings.jwt if is_url(url)], authenticator, nursery)
    log = await _open_log(config, nursery)
    roles = log.roles if isinstance(log, PostgresLog) else None
    revocations = log.revocations if isinstance(log, PostgresLog) else None
    presence = log.presence if isinstance(log, PostgresLog) else None
    consumers = log.consumers if isinstance(log, PostgresLog) else None
    replica = Replica(
        config,
        log,
        authenticator,
        certificates,
        roles,
        export_metrics,
        hooks,
        revocations,
        key_sets,
        presence,
        consumers,
        worker,
    )
    await nursery.start(replica.log.run, replica.delivery, replica.describe)
    nursery.start_soon(replica.cpu_scheduler.run)
    nursery.start_soon(trim_after_peaks)
    nursery.start_soon(replica.delivery.run)
    nursery.start_soon(replica.flusher.run)
    nursery.start_soon(replica.send_heads)
    nursery.start_soon(replica.permissions.run)
    nursery.start_soon(replica.session_events.run)
    nursery.start_soon(replica.revocations.run)
    nursery.start_soon(replica.presence.run)
    nursery.start_soon(replica.presence_feeder.run)
    nursery.start_soon(replica.runtime_statistics.run, log)
    return Broker(replica)


async def _fetch_key_sets(
    urls: Sequence[str], authenticator: Authenticator, nursery: trio.Nursery
) -> KeySetSource | None:
    if not urls:
        return None
    # The HTTP client takes 0.15 s to import, and most brokers do not need it.
    from .auth.key_sets import KeySetFetcher

    fetcher = KeySetFetcher(urls, authenticator.replace_fetched_keys)
    await nursery.start(fetcher.run)
    return fetcher


async def _open_log(config: Config, nursery: trio.Nursery) -> Log:
    settings, limits = config.database, config.limits
    if settings.url == "memory":
        return MemoryLog(limits.recent, pending=limits.pending_total, retained_bytes=config.retention.retained)
    if settings.url == "embedded":
        url = await nursery.start(embedded_server.run_server, config.state_directory / "postgres")
        settings = msgspec.structs.replace(settings, url=url)
    return PostgresLog(
        settings,
        config.retention,
        config.webhooks,
        recent=limits.recent,
        pending=limits.pending_total,
        presence_grace=config.presence.grace,
    )
