"""The tokens of a client: one, or an async function that returns the next."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ..close_codes import CloseCode
from ..error_codes import ErrorCode
from ..errors import Disconnected, Refused
from .argument_checks import check_text
from .reconnect_policy import SignedOut

Token = str | Callable[[], Awaitable[str | None]]


class TokenSource:
    """Returns the token for the next connection."""

    def __init__(self, token: Token) -> None:
        self._token = token

    @property
    def fixed(self) -> str | None:
        """The token, if it does not come from a function."""
        return self._token if isinstance(self._token, str) else None

    def renew(self, token: str) -> None:
        """Use another token from now on, unless the tokens come from a function."""
        if self.fixed is not None:
            self._token = token

    async def request(self) -> str:
        """Return a token. Raises `SignedOut`, `Disconnected` if there is none for now, and what the function raises."""
        if isinstance(self._token, str):
            return self._token
        try:
            token = await self._token()
        except OSError as error:
            raise Disconnected(f"the token function failed: {error}") from error
        except Refused as error:
            raise SignedOut(error.code, error.message) from error
        if token is None:
            raise SignedOut(ErrorCode.UNAUTHENTICATED, "the token function returned None")
        return check_text("token", token)


def final_token_error(error: Refused) -> Disconnected:
    """Return the end of a client whose token was rejected for good."""
    if isinstance(error, SignedOut):
        return Disconnected(f"signed out: {error}", CloseCode.UNAUTHENTICATED)
    return Disconnected(f"the broker rejected the token: {error}", _CLOSE_CODES.get(error.code))


_CLOSE_CODES = {
    ErrorCode.UNAUTHENTICATED: CloseCode.UNAUTHENTICATED,
    ErrorCode.TOKEN_EXPIRED: CloseCode.TOKEN_EXPIRED,
    ErrorCode.REVOKED: CloseCode.REVOKED,
}
