"""`protocol/asyncapi.yaml` is valid AsyncAPI 3, refers to existing schemas, and contains every message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.programs import find_module
from tests.protocol import schema

ROOT = Path(__file__).parents[2]
PROTOCOL = ROOT / "protocol"
DOCUMENT: dict[str, Any] = yaml.safe_load((PROTOCOL / "asyncapi.yaml").read_text(encoding="utf-8"))


def test_document_is_valid_asyncapi() -> None:
    """Validate it by the schema that the authors of AsyncAPI publish."""
    specification = find_module("@asyncapi/specs/schemas/3.0.0-without-$id.json")
    validator = jsonschema.Draft7Validator(json.loads(specification.read_text()))
    validator.validate(DOCUMENT)
    assert not validator.is_valid({**DOCUMENT, "operations": {"x": {"action": "shout"}}})


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def resolve(reference: str) -> Any:
    place, _, pointer = reference.partition("#/")
    document = json.loads((PROTOCOL / place).read_text()) if place else DOCUMENT
    return reduce(lambda found, key: found[key], pointer.split("/"), document)


def test_references_resolve() -> None:
    found = set(references(DOCUMENT))
    assert len(found) > 40
    for reference in found:
        resolve(reference)


def test_document_contains_every_message() -> None:
    kinds = {message["payload"]["$ref"] for message in DOCUMENT["components"]["messages"].values()}
    wanted = {f"schema/{side}.json{each['$ref']}" for side in schema.SIDES for each in schema.make(side)["oneOf"]}
    assert kinds == wanted
    used = set(references(DOCUMENT["operations"])) - {"#/channels/session"}
    assert used == {f"#/channels/session/messages/{name}" for name in DOCUMENT["channels"]["session"]["messages"]}
