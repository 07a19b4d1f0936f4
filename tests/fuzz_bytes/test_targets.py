"""The targets with the corpora, and with bytes by chance. `make fuzz-bytes` looks for longer, and with coverage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz_bytes.targets import CORPORA, TARGETS, seeds

SEEDS = {name: seeds(name) for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_to_reach_something_does_no_harm(name: str) -> None:
    assert SEEDS[name]
    for data in SEEDS[name]:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=50)
@given(data=st.data())
def test_bytes_by_chance_do_no_harm(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(SEEDS[name]) | st.binary(max_size=200))
    position = data.draw(st.integers(0, len(seed)))
    changed = data.draw(st.binary(max_size=8))
    TARGETS[name](seed[:position] + changed + seed[position + data.draw(st.integers(0, 8)) :])


def test_a_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPORA.rglob("*") if path.is_file()) < 400_000


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_says_what_has_to_hold_in_one_sentence(name: str) -> None:
    text = TARGETS[name].__doc__ or ""
    assert text.endswith(".")
    assert ". " not in text
