"""The reference of the HTTP paths for people, made from the OpenAPI document that a broker serves.

python -m tests.protocol.http_reference     writes docs/http-api.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from catbus.endpoints.http.openapi_document import BODY_ERRORS, GENERAL_ERRORS, TOKEN_ERRORS, openapi_document
from catbus.endpoints.http.routes import ROUTES

PAGE = Path(__file__).parents[2] / "docs" / "http-api.md"

_HEAD = """\
# HTTP reference

<!-- Made by `python -m tests.protocol.http_reference` from the code. Do not edit it. -->

The paths of the WebSocket port (8080 by default), as `GET /openapi.json` of a broker describes them. The
[specification](../protocol/README.md#14-http) says more about them, and about tokens, error codes and retries.

Send the token as `Authorization: Bearer TOKEN`. Ignore fields that you do not know: each release may add some.
"""
_ERRORS = """\
Errors that the tables of the operations do not repeat have the body [ErrorAnswer](#erroranswer):

| Status | Of | Meaning |
|---|---|---|"""


def make() -> str:
    """The page."""
    document = openapi_document(ROUTES)
    parts = [_HEAD, *_contents(document["paths"]), _ERRORS, *_errors()]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += _operation(method, path, operation)
    parts.append("## Objects\n")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts += _object(name, schema)
    return "\n".join(parts)


_COMMON = (
    ("all operations", GENERAL_ERRORS),
    ("those with a token", TOKEN_ERRORS),
    ("those with a body", BODY_ERRORS),
)


def _errors() -> Iterator[str]:
    for where, errors in _COMMON:
        for status, meaning in errors.items():
            yield f"| {status} | {where} | {meaning} |"
    yield ""


def _contents(paths: Mapping[str, Any]) -> Iterator[str]:
    yield "| Request | Purpose | Access |"
    yield "|---|---|---|"
    for path, methods in paths.items():
        for method, operation in methods.items():
            access = operation["description"].rpartition("Access: ")[2].rstrip(".")
            yield f"| `{method.upper()} {path}` | {operation['summary']} | {access} |"
    yield ""


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {method.upper()} {path}\n"
    yield f"{operation['summary']}. {operation['description']}\n"
    if operation["parameters"]:
        yield "| Parameter | In | Type | Default | Meaning |"
        yield "|---|---|---|---|---|"
        for each in operation["parameters"]:
            default = "required" if each["required"] else _default(each["schema"])
            meaning = each.get("description", "")
            yield f"| `{each['name']}` | {each['in']} | {_type(each['schema'])} | {default} | {meaning} |"
        yield ""
    if "requestBody" in operation:
        optional = "" if operation["requestBody"]["required"] else ", or nothing"
        yield f"The body is {_content(operation['requestBody']['content'])}{optional}.\n"
    yield "| Status | Meaning | Body |"
    yield "|---|---|---|"
    for status, answer in operation["responses"].items():
        if any(errors.get(int(status)) == answer["description"] for _, errors in _COMMON):
            continue
        yield f"| {status} | {answer['description']} | {_content(answer['content'])} |"
    yield ""


def _object(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if "description" in schema:
        yield f"{schema['description']}\n"
    if "properties" not in schema:
        yield f"One of {', '.join(f'`{each}`' for each in schema['enum'])}.\n"
        return
    yield "| Field | Type | Default | Meaning |"
    yield "|---|---|---|---|"
    for field, each in schema["properties"].items():
        default = "required" if field in schema["required"] else _default(each)
        yield f"| `{field}` | {_type(each)} | {default} | {each.get('description', '')} |"
    yield ""


def _default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default", "")
    return "none" if default in ("", None) else f"`{str(default).lower()}`"


def _content(content: Mapping[str, Any]) -> str:
    [(media, found)] = content.items()
    shown = _type(found["schema"])
    return shown if media == "application/json" else f"`{media}`" + (f", events {shown}" if shown != "string" else "")


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    match schema.get("type"):
        case None:
            return "JSON"
        case "array":
            return f"array of {_type(schema['items'])}"
        case "integer" | "number" as kind:
            bounds = [f"{word} {schema[key]}" for key, word in _BOUNDS.items() if key in schema]
            return " ".join([kind, *bounds])
        case "string":
            longest = schema.get("maxLength")
            return f"string of up to {longest} characters" if longest else "string"
        case kind:
            return str(kind)


_BOUNDS = {"minimum": "from", "maximum": "to"}


if __name__ == "__main__":
    PAGE.write_text(make(), encoding="utf-8")
