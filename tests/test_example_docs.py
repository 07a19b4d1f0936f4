"""`docs/ai-token-stream.md` shows the code of `examples/assistant` as it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_readme import examples

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "ai-token-stream.md"
EXAMPLE = ROOT / "examples" / "assistant"


@pytest.mark.parametrize(("language", "file", "count"), [("js", "assistant.js", 2), ("python", "worker.py", 1)])
def test_page_shows_the_code_of_the_example(language: str, file: str, count: int) -> None:
    source = (EXAMPLE / file).read_text()
    shown = examples(PAGE, language)
    assert len(shown) == count
    for block in shown:
        assert block in source
