"""Authentication: find the identity of a token, or say why it is rejected."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import trio

from ..auth.grants import Identity, client_of
from ..auth.jwt_keys import KeySetSource
from ..auth.revocations import Revocations
from ..auth.role_tokens import RoleSource, role_handle, role_key
from ..auth.token_errors import RejectionReason, TokenRejected, UnknownKey, format_time
from ..auth.tokens import Authenticator
from ..close_codes import CloseCode
from ..error_codes import ErrorCode
from ..errors import PeerError, Unavailable
from ..limits.cpu_scheduler import CpuScheduler
from ..observability.loggers import RateLimitedLog, get_logger
from ..observability.runtime_statistics import RuntimeStatistics
from ..protocol.wire_messages import clip
from .hooks import ClientInfo, Hooks, RefusedByHook

logger = get_logger("catbus.replica")


class Authentication:
    """Verifies tokens: by the hook `authenticate`, or as one of the broker's own.

    Without `roles`, role tokens are rejected, and without `key_sets` no keys are fetched. A `client_id` has at most
    `max_client_id` bytes. A token that expires is accepted for `leeway` more seconds.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        roles: RoleSource | None,
        revocations: Revocations,
        key_sets: KeySetSource | None,
        cpu_scheduler: CpuScheduler,
        statistics: RuntimeStatistics,
        max_client_id: int,
        hooks: Hooks,
        leeway: float,
    ) -> None:
        self._authenticator = authenticator
        self._roles = roles
        self._revocations = revocations
        self._key_sets = key_sets
        self._cpu_scheduler = cpu_scheduler
        self._statistics = statistics
        self._max_client_id = max_client_id
        self._hooks = hooks
        self._leeway = leeway
        # An unauthenticated peer can send any number of bad tokens, so their log lines are limited.
        self._rejections = RateLimitedLog(logger.info)

    async def verify(self, token: str, network: str = "", transport: str = "http") -> Identity:
        """Return the identity of a token that came from this network. Raises `PeerError` that closes.

        It waits for seconds at most: for the hook, for the lookup of a role, for the key sets of issuers if a key is
        unknown, and at the start of the replica for the revocations. A valid token gives the client its share of the
        CPU.
        """
        try:
            await self._know_revocations()
            identity = await self._call_hook(token, ClientInfo(None, transport, network))
            if identity is None:
                key = role_key(token)
                if key is None or self._roles is None:
                    identity = await self._verify_signed(token)
                else:
                    identity = await self._find_role(self._roles, key)
            self._revocations.check(identity.client_id, identity.issued)
            longest = self._max_client_id
            if identity.client_id is not None and len(identity.client_id.encode()) > longest:
                raise TokenRejected(
                    RejectionReason.CLAIMS, f"its client_id has more than {longest} bytes (limits.client_id)"
                )
            self._cpu_scheduler.authenticate(client_of(identity, token, network))
            return identity
        except TokenRejected as error:
            self._statistics.rejected_tokens[error.reason] += 1
            fields: dict[str, Any] = {} if error.subject is None else {"client_id": clip(error.subject)}
            self._rejections.log(
                trio.current_time(),
                "a token was rejected",
                kind=error.reason,
                reason=error.reason.value,
                detail=error.detail,
                **fields,
            )
            raise

    async def _call_hook(self, token: str, client: ClientInfo) -> Identity | None:
        """Return the identity that the hook finds. It never gets the admin key, which works without it."""
        if self._authenticator.is_admin_key(token):
            return None
        asked = time.time()
        try:
            identity = await self._hooks.authenticate(token, client)
        except RefusedByHook as error:
            raise TokenRejected(
                RejectionReason.HOOK,
                error.message,
                message=error.message,
                code=error.code,
                close=error.close or CloseCode.UNAUTHENTICATED,
                retry_after=error.retry_after,
            ) from None
        if identity is not None and identity.expires is not None and time.time() >= identity.expires + self._leeway:
            raise TokenRejected(
                RejectionReason.EXPIRED,
                f"the hook says that it has expired at {format_time(identity.expires)}",
                message="the token has expired",
                code=ErrorCode.TOKEN_EXPIRED,
                close=CloseCode.TOKEN_EXPIRED,
                subject=identity.client_id,
            )
        # The program may not know of a revocation that came meanwhile.
        return None if identity is None else replace(identity, issued=asked)

    async def _verify_signed(self, token: str) -> Identity:
        """Verify a token that is not a role token, and fetch key sets if its key is unknown."""
        try:
            return self._authenticator.verify(token, time.time())
        except UnknownKey:
            if self._key_sets is None:
                raise
        for fetch in (self._key_sets.finish, self._key_sets.refresh):
            complete = await fetch()
            try:
                return self._authenticator.verify(token, time.time())
            except UnknownKey:
                if complete:
                    raise
        raise PeerError(ErrorCode.UNAVAILABLE, "the keys of an issuer cannot be fetched", CloseCode.UNAVAILABLE)

    async def _know_revocations(self) -> None:
        try:
            await self._revocations.wait_known()
        except Unavailable as error:
            raise PeerError(ErrorCode.UNAVAILABLE, str(error), CloseCode.UNAVAILABLE) from None

    async def _find_role(self, roles: RoleSource, key: bytes) -> Identity:
        try:
            identity = (await roles.find([key])).get(key)
        except Unavailable as error:
            raise PeerError(ErrorCode.UNAVAILABLE, str(error), CloseCode.UNAVAILABLE) from None
        if identity is None:
            detail = f"no role {role_handle(key)}: it was deleted, or never was"
            raise TokenRejected(RejectionReason.ROLE, detail, message="no role has this token")
        return identity

    def resume_producer(self, claimed: str | None, subject: str) -> str:
        """Return the producer that a client claims if it is the client's own, or a new one."""
        if claimed and self._authenticator.verify_producer_id(claimed, subject):
            return claimed
        return self._authenticator.make_producer_id(subject, time.time())

    def producer_key(self, producer: str, subject: str) -> bytes | None:
        """Return the key under which the log recognises retries of a producer; None for another client's producer."""
        return self._authenticator.verify_producer_id(producer, subject)
