"""`docs/security.md` has every limit, with what counts it and the tests that hold it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from catbus.config import Config, LimitSettings
from catbus.observability.metric_table import METRICS

from .test_guarantees import names

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "docs" / "security.md").read_text(encoding="utf-8").partition("## Limits\n")[2].partition("\n## ")[0]
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in SECTION.splitlines()
    if (cells := [cell.strip() for cell in line.strip("|").split("|")]) and line.startswith("| `")
}


def test_every_limit_has_a_row() -> None:
    assert list(ROWS) == [*LimitSettings.__struct_fields__]


@pytest.mark.parametrize("name", LimitSettings.__struct_fields__)
def test_limit_is_counted_documented_and_tested(name: str) -> None:
    _, _, metrics, tests = ROWS[name]
    counted = re.findall(r"`(\w+)`", metrics)
    assert counted
    assert not set(counted) - METRICS.keys()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert named
    assert all(test in names(path) for path, test in named)
    text = (ROOT / "catbus.toml").read_text(encoding="utf-8").partition("[limits]")[2].partition("\n[")[0]
    assert re.search(rf"^# {name} = ", text, re.MULTILINE)
    assert getattr(Config().limits, name) > 0
