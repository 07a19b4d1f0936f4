"""An operation: one method of an HTTP path, with its handler and its description for `/openapi.json`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from msgspec import Struct

from ..replica_interface import ReplicaInterface
from .http_request import HttpRequest
from .http_response import ErrorAnswer, HttpResponse

Handler = Callable[[ReplicaInterface, HttpRequest], Awaitable[HttpResponse]]


class Access(Enum):
    """The token that a request needs."""

    OPEN = "no token"
    CLIENT = "a token"
    READER = "a token with a read grant for `*`"
    ADMINISTRATOR = "the admin key, or a token with read and write grants for `*`"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: what it means, the type of its body, and its media type. Without a type, its body is a text.

    The body of an event stream is a sequence of events, and the type is that of one.
    """

    meaning: str
    body: Any = None
    media: str = ""

    @property
    def media_type(self) -> str:
        """`media`, or by default JSON for a body with a type and plain text for one without."""
        return self.media or ("text/plain" if self.body is None else "application/json")


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of a path: its handler, and what `/openapi.json` says of it.

    `path`, `query` and `headers` are structs whose fields are the parameters. `body` and `error_body` are types for
    JSON. `answers` are the responses by status; the errors of each operation, and of each with a token, are added.
    """

    handler: Handler
    summary: str
    answers: Mapping[int, Answer]
    access: Access = Access.OPEN
    details: str = ""
    path: type[Struct] | None = None
    query: type[Struct] | None = None
    headers: type[Struct] | None = None
    body: Any = None
    body_required: bool = True
    error_body: Any = ErrorAnswer
