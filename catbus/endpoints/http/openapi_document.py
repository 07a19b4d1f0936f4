"""The OpenAPI 3.1 document of the HTTP paths, made from the table of routes and the structs of the code. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
from msgspec import Struct

from ...protocol import wire_messages as wire
from ...version import version
from .formats import CHANNEL
from .operation import Access, Answer, Operation

GENERAL_ERRORS = {
    400: "The request is not valid.",
    431: "The path with its query and the headers are too large together.",
    500: "A fault of the broker.",
}
"""The errors of every operation, by status."""

TOKEN_ERRORS = {
    401: "The token is missing or not valid.",
    403: "The token does not allow this.",
    429: "The client sends too many requests, or its address has too many connections.",
    503: "The token cannot be verified at present, or is not valid yet.",
}
"""The errors of operations that need a token, by status."""

BODY_ERRORS = {408: "The body did not arrive in time.", 413: "The body is too large."}
"""The errors of operations with a body, by status."""

MESSAGE_FIELDS = ("type", "channel", "payload", "ephemeral", "retain", "expect")
"""The fields of a message that have an effect in a request."""

_PLACE = "#/components/schemas/"
_DESCRIPTION = (
    "What HTTP clients and administrators can ask of a broker, on its WebSocket port. The specification of the "
    "protocol says more about messages, tokens and error codes. Every path with GET also answers HEAD. Integers in "
    "bodies are written without fraction and exponent."
)


def openapi_document(routes: Mapping[str, Mapping[str, Operation]]) -> dict[str, Any]:
    """Return the document for a table of routes, as JSON types."""
    schemas = _Schemas(routes)
    paths = {
        path: {method.lower(): _describe(method.lower(), path, each, schemas) for method, each in methods.items()}
        for path, methods in routes.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Catbus", "version": version(), "description": _DESCRIPTION, "license": {"name": "MIT"}},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "A token, or the admin key."}
            },
        },
    }


class _Schemas:
    """The JSON Schemas of the types in a table of routes."""

    def __init__(self, routes: Mapping[str, Mapping[str, Operation]]) -> None:
        operations = [each for methods in routes.values() for each in methods.values()]
        structs = [kind for each in operations for kind in (each.path, each.query, each.headers) if kind is not None]
        bodies = [kind for each in operations for body in _bodies(each) for kind in _members(body)]
        found, schemas = msgspec.json.schema_components([*structs, *bodies], ref_template=f"{_PLACE}{{name}}")
        self._found = dict(zip(map(repr, [*structs, *bodies]), found, strict=True))
        self._structs = {kind: schemas.pop(kind.__name__) for kind in dict.fromkeys(structs)}
        self.components = schemas
        _adapt_message(schemas[wire.Publish.__name__])

    def of(self, body: Any) -> dict[str, Any]:
        """Return the schema of a body; of a union, one that allows each of its types."""
        members = [self._found[repr(kind)] for kind in _members(body)]
        return members[0] if len(members) == 1 else {"anyOf": members}

    def parameters(self, place: str, kind: type[Struct]) -> Iterator[dict[str, Any]]:
        """Yield the description of each field of a struct as a parameter."""
        schema = self._structs[kind]
        for name, field in schema["properties"].items():
            text = {"description": field.pop("description")} if "description" in field else {}
            yield {"name": name, "in": place, "required": name in schema["required"], **text, "schema": field}


def _adapt_message(schema: dict[str, Any]) -> None:
    """Describe a message in a request: its type is known from the path, its channel has to be a valid one, and fields
    that have a meaning within a session are left out."""
    schema["required"].remove("type")
    schema["properties"] = {name: schema["properties"][name] for name in MESSAGE_FIELDS}
    schema["properties"]["channel"] |= CHANNEL
    retained = {"properties": {"retain": {"const": True}}, "required": ["retain"]}
    ephemeral = {"properties": {"ephemeral": {"const": True}}, "required": ["ephemeral"]}
    expecting = {"properties": {"expect": {"type": "integer"}}, "required": ["expect"]}
    schema["not"] = {"anyOf": [{"allOf": [retained, ephemeral]}, {"allOf": [expecting, {"not": retained}]}]}


def _bodies(operation: Operation) -> Iterator[Any]:
    for body in (operation.body, operation.error_body, *(answer.body for answer in operation.answers.values())):
        if body is not None:
            yield body


def _members(body: Any) -> Sequence[Any]:
    """Return the types of a union, or the one type that is no union."""
    return get_args(body) if get_origin(body) in (Union, UnionType) else (body,)


def _describe(method: str, path: str, operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method}{path}").strip("_"),
        "summary": operation.summary,
        "description": f"{operation.details} Access: {operation.access.value}.".strip(),
        "security": [] if operation.access is Access.OPEN else [{"token": []}],
        "tags": ["administrators" if operation.access is Access.ADMINISTRATOR else "clients"],
    }
    places = (("path", operation.path), ("query", operation.query), ("header", operation.headers))
    described["parameters"] = [
        parameter for place, kind in places if kind is not None for parameter in schemas.parameters(place, kind)
    ]
    if operation.body is not None:
        content = {"application/json": {"schema": schemas.of(operation.body)}}
        described["requestBody"] = {"required": operation.body_required, "content": content}
    answers = sorted(_answers(operation).items())
    described["responses"] = {str(status): _response(answer, schemas) for status, answer in answers}
    return described


def _answers(operation: Operation) -> dict[int, Answer]:
    """Return the responses of an operation, with the errors that it does not list itself."""
    errors = dict(GENERAL_ERRORS)
    if operation.access is not Access.OPEN:
        errors |= TOKEN_ERRORS
    if operation.body is not None:
        errors |= BODY_ERRORS
    return {status: Answer(text, operation.error_body) for status, text in errors.items()} | dict(operation.answers)


def _response(answer: Answer, schemas: _Schemas) -> dict[str, Any]:
    schema = {"type": "string"} if answer.body is None else schemas.of(answer.body)
    return {"description": answer.meaning, "content": {answer.media_type: {"schema": schema}}}
