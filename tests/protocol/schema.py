"""JSON Schema of the messages, made from the structs of `catbus.v1`, with descriptions from the specification's tables.

python -m tests.protocol.schema     writes protocol/schema/
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec

from catbus.protocol import wire_messages as wire
from tests.test_specification import section, table

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "protocol" / "schema"
SIDES = {
    "client": (wire.ClientMessage, "Client messages", ("Message", "Field", "Type", "Default")),
    "server": (wire.ServerMessage, "Broker messages", ("Message", "Field", "Type", "Sent")),
}


def make(side: str) -> dict[str, Any]:
    """The schema of the messages of one side (JSON Schema 2020-12). Unknown fields are allowed and ignored."""
    union, title, columns = SIDES[side]
    kinds = get_args(union)
    _, definitions = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    words = _words(title, columns)
    messages = []
    for kind in kinds:
        definition = definitions[kind.__name__]
        tag = kind.__struct_config__.tag
        definition["title"] = tag
        for name, schema in definition["properties"].items():
            if side == "server":
                _never_null(schema)
            if text := words.get((tag, name)):
                schema["description"] = text
        messages.append({"$ref": f"#/$defs/{kind.__name__}"})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:catbus.v1:{side}",
        "title": f"catbus.v1: {title[0].lower()}{title[1:]}",
        "oneOf": messages,
        "$defs": {name: _described(schema) for name, schema in sorted(definitions.items())},
    }


def _never_null(schema: dict[str, Any]) -> None:
    """Remove `null` from optional fields: a broker leaves them out instead. Only `client_id` may be null."""
    kinds = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    if len(kinds) == 1 and "default" in schema:
        del schema["anyOf"]
        if schema["default"] is None:
            del schema["default"]
        schema.update(kinds[0])


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without the docstrings, which are for programmers of the broker."""
    return {key: value for key, value in schema.items() if key != "description"}


def _words(title: str, columns: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """The descriptions of the fields in the specification, by message and field."""
    found, message = {}, ""
    for row in table(section(title), *columns):
        names = re.findall(r"`(\w+)`", row["Message"])
        message = names[0] if names else message
        for field in re.findall(r"`(\w+)`", row["Field"]):
            found[message, field] = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", row["Meaning"])
    return found


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for side in SIDES:
        (DIRECTORY / f"{side}.json").write_text(json.dumps(make(side), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
