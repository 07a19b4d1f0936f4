"""The diagram of a session's states, generated from their table.

python -m tests.protocol.diagram     writes it into protocol/README.md
"""

from __future__ import annotations

import re

from tests.test_specification import ROOT, section, table

COLUMNS = ("State", "Event", "Reply", "Code", "Closing code", "Next")
PLACE = re.compile(r"(?<=^```mermaid\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)


def make() -> str:
    """The transitions in Mermaid. An arrow names the event and, at the end of a session, its closing code."""
    lines = ["stateDiagram-v2", "    [*] --> new"]
    for row in table(section("Sessions"), *COLUMNS):
        if row["Next"] in ("same", row["State"]):
            continue
        text = row["Event"].replace("`", "")
        code = "" if row["Closing code"] == "-" else f" ({row['Closing code']})"
        states = ("new", "open") if row["State"] == "any" else (row["State"],)
        lines += [f"    {state} --> {row['Next']}: {text}{code}" for state in states]
    return "\n".join([*lines, "    closed --> [*]", ""])


if __name__ == "__main__":
    path = ROOT / "protocol" / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(PLACE.sub(lambda _: make(), text, count=1), encoding="utf-8")
