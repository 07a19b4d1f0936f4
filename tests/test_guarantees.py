"""`docs/guarantees.md` names tests, and they are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.splitlines()
    if re.match(r"\| \d+\.\d+ \|", line)
]
PROMISES = [row for row in ROWS if row[2].startswith("`tests/")]


@cache
def names(path: str) -> set[str]:
    """The tests in a file, those of a class behind its name; and the classes that are made of something else."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name, body=body):
                functions = [each for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
                found |= {f"{name}::{function.name}" for function in functions}
            case ast.Assign(targets=[ast.Name(id=name)]):
                found.add(name)
    return {name for name in found if name.split("::")[-1].lower().startswith("test")}


def test_promises_are_numbered_without_a_gap() -> None:
    chapters = [int(number) for number in re.findall(r"^## (\d+)\. ", DOCUMENT, re.MULTILINE)]
    assert chapters == list(range(1, len(chapters) + 1))
    numbers = [tuple(map(int, row[0].split("."))) for row in PROMISES]
    assert numbers == [
        (chapter, number)
        for chapter in chapters
        for number in range(1, 1 + sum(other == chapter for other, _ in numbers))
    ]
    assert {chapter for chapter, _ in numbers} == set(chapters)


@pytest.mark.parametrize("row", PROMISES, ids=lambda row: row[0])
def test_every_promise_has_a_checker_that_exists(row: list[str]) -> None:
    checkers = re.findall(r"`([^`]+)`", row[2])
    assert checkers
    for checker in checkers:
        path, _, name = checker.partition("::")
        assert name in names(path), f"there is no {checker}"


def test_every_figure_is_of_a_promise_and_is_printed_by_something() -> None:
    figures = [row for row in ROWS if row not in PROMISES]
    assert figures
    for promise, _, figure, printed in figures:
        assert promise in [row[0] for row in PROMISES]
        assert re.search(r"\d", figure), figure
        command = re.fullmatch(r"`python (?:-m )?(\S+).*`", printed)
        assert command, printed
        file = command[1] if command[1].endswith(".py") else command[1].replace(".", "/") + "/__main__.py"
        assert (ROOT / file).exists(), printed
