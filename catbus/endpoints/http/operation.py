"""An operation: one method of an HTTP path, with its handler and its description for `/openapi.json`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from msgspec import Struct

from ...error_codes import ErrorCode
from ..replica_interface import ReplicaInterface
from .http_request import HttpRequest
from .http_response import HttpResponse

Handler = Callable[[ReplicaInterface, HttpRequest], Awaitable[HttpResponse]]


class ErrorAnswer(Struct):
    """The body of a response that reports an error. `error` is for people."""

    error: str
    code: ErrorCode


class Access(Enum):
    """The token that a request needs."""

    OPEN = "no token"
    CLIENT = "a token"
    READER = "a token with a read grant for `*`"
    ADMINISTRATOR = "the admin key, or a token with read and write grants for `*`"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: what it means, and the type of its body. Without a type, the body is text of the type `media`."""

    meaning: str
    body: Any = None
    media: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    """The headers that matter to a client, each with its meaning."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of a path. The types are structs, from which the parameters are described.

    `answers` are the responses by status. The errors that every operation or every one with a token can answer with
    are not in it.
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
    error_body: Any = ErrorAnswer
    """The type of the body of a response that reports an error."""
