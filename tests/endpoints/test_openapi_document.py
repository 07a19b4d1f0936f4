"""`/openapi.json` and `docs/http-api.md` describe the routes of the code, and the answers of a real broker."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import reduce
from math import inf
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from catbus.endpoints.http import formats
from catbus.endpoints.http.api.consumer_routes import CONSUMER_ROUTES
from catbus.endpoints.http.openapi_document import openapi_document
from catbus.endpoints.http.operation import Access
from catbus.endpoints.http.query import parse_cursor
from catbus.endpoints.http.routes import ROUTES
from catbus.errors import PeerError
from catbus.protocol.channels import check_channel, check_pattern, is_reserved
from tests.brokers import TOKEN, request, running
from tests.protocol import http_reference

DOCUMENT = openapi_document(ROUTES)
BODIES = {"/publish": b'[{"channel":"a.b","payload":1},{"channel":"a.b","payload":2,"ephemeral":true}]'}
"""A body for each operation that needs one."""
TARGETS = {"/messages": "/messages?pattern=a"}
"""A target for each operation that needs a query."""
STATUSES = {"/ws": 426, "/events": 400, **dict.fromkeys(CONSUMER_ROUTES, 404)}
"""The status of each operation that answers a usual request with another one than 200. The log in memory has no
consumers; `tests/postgres/test_consumers_api.py` compares other answers about them."""


OPERATIONS = [(method, path) for path, methods in ROUTES.items() for method in methods]


def test_page_is_made_from_the_code() -> None:
    assert http_reference.PAGE.read_text(encoding="utf-8") == http_reference.make(), (
        "python -m tests.protocol.http_reference"
    )


def test_document_contains_every_operation_and_no_other() -> None:
    described = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == set(OPERATIONS)
    names = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_operation_describes_the_parameters_of_its_path(method: str, path: str) -> None:
    described = DOCUMENT["paths"][path][method.lower()]
    names = [each["name"] for each in described["parameters"] if each["in"] == "path"]
    assert names == re.findall(r"{(\w+)}", path)
    assert all(each["required"] for each in described["parameters"] if each["in"] == "path")
    open_to_all = ROUTES[path][method].access is Access.OPEN
    assert described["security"] == ([] if open_to_all else [{"token": []}])
    assert ("401" in described["responses"]) is not open_to_all


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_references_resolve_and_every_schema_is_used() -> None:
    used = set(references(DOCUMENT))
    for reference in used:
        reduce(lambda found, key: found[key], reference.removeprefix("#/").split("/"), DOCUMENT)
    assert used == {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def accepts(check: Callable[[str], None], text: str) -> bool:
    try:
        check(text)
    except PeerError:
        return False
    return True


def described(schema: dict[str, Any], text: str) -> bool:
    # A `$` of JSON Schema, unlike Python's, does not match before a line break at the end.
    return re.fullmatch(schema["pattern"], text) is not None and len(text) <= schema.get("maxLength", inf)


TEXTS = st.one_of(
    st.text(max_size=300),
    st.text("a.-_*", max_size=70),
    *(st.from_regex(form["pattern"]) for form in (formats.CHANNEL, formats.PATTERN, formats.CURSOR)),
)


@given(TEXTS)
@example(".".join(["a"] * 32))
@example(".".join(["a"] * 33))
@example(".".join(["a"] * 31) + ".*")
@example(".".join(["a"] * 32) + ".*")
@example("a" * 255)
@example("a" * 256)
def test_forms_in_the_document_are_those_of_the_code(text: str) -> None:
    assert described(formats.CHANNEL, text) == (accepts(check_channel, text) and not is_reserved(text))
    assert described(formats.PATTERN, text) == accepts(check_pattern, text)
    if described(formats.CURSOR, text):
        assert parse_cursor(text) is not None


def valid(path: str, method: str, status: int, content_type: str, body: bytes) -> None:
    """Assert that a response is as described."""
    described = DOCUMENT["paths"][path][method.lower()]["responses"][str(status)]["content"]
    media = content_type.partition(";")[0]
    assert media in described
    if media == "application/json":
        schema = {**described[media]["schema"], "components": DOCUMENT["components"]}
        jsonschema.Draft202012Validator(schema).validate(json.loads(body))


async def test_broker_answers_as_described() -> None:
    async with running() as (_, address):
        for method, path in OPERATIONS:
            target, access = (
                TARGETS.get(path, path).format(client_id="alice", name="c", seq=1, channel="a"),
                ROUTES[path][method].access,
            )
            wanted = STATUSES.get(path, 200)
            for token, status in ((TOKEN, wanted), ("", wanted if access is Access.OPEN else 401)):
                response = await request(address, target, token, method=method, body=BODIES.get(path, b""))
                assert response.status == status, path
                valid(path, method, status, response.headers["content-type"], response.body)


async def test_document_is_served_to_every_page() -> None:
    async with running() as (_, address):
        response = await request(address, "/openapi.json", "")
    assert response.headers["access-control-allow-origin"] == "*"
    assert json.loads(response.body) == DOCUMENT
