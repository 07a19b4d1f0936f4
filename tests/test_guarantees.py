"""`docs/guarantees.md` lists promises in tables and, folded away below each table, the tests that hold them."""

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
PROMISES = [row for row in ROWS if len(row) == 2]
NUMBERS = [row[0] for row in PROMISES]
FIGURES = [row for row in ROWS if len(row) != 2]


def folded_tests() -> list[tuple[str, list[str]]]:
    """The tests in the document's `<details>`: the number of each promise, and the lines of the list below it."""
    folded = "\n".join(re.findall(r"^<details>\n(.*?)^</details>$", DOCUMENT, re.MULTILINE | re.DOTALL))
    return [
        (number, re.findall(r"^  - `(.+)`$", lines, re.MULTILINE))
        for number, lines in re.findall(r"^- (\d+\.\d+)\n((?:  - .*\n)*)", folded, re.MULTILINE)
    ]


@cache
def names(path: str) -> set[str]:
    """The tests in a file: functions, methods as `Class::method`, and names assigned a generated test class."""
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
    numbers = [tuple(map(int, number.split("."))) for number in NUMBERS]
    assert numbers == [
        (chapter, number)
        for chapter in chapters
        for number in range(1, 1 + sum(other == chapter for other, _ in numbers))
    ]
    assert {chapter for chapter, _ in numbers} == set(chapters)


@pytest.mark.parametrize("promise", [row[1] for row in PROMISES], ids=NUMBERS)
def test_promise_is_one_sentence(promise: str) -> None:
    assert re.fullmatch(r"([^.]|\.(?=\d))+\.", re.sub(r"`[^`]*`", "", promise))


def test_every_promise_lists_its_tests() -> None:
    assert [number for number, _ in folded_tests()] == NUMBERS


@pytest.mark.parametrize(("number", "tests"), folded_tests(), ids=[number for number, _ in folded_tests()])
def test_tests_of_a_promise_exist(number: str, tests: list[str]) -> None:
    assert tests
    for test in tests:
        path, _, name = test.partition("::")
        assert name in names(path), f"{number}: there is no {test}"


def test_every_figure_belongs_to_a_promise_and_is_printed_by_a_command() -> None:
    assert FIGURES
    for promise, _, figure, printed in FIGURES:
        assert promise in NUMBERS
        assert re.search(r"\d", figure), figure
        command = re.fullmatch(r"`python (?:-m )?(\S+).*`", printed)
        assert command, printed
        file = command[1] if command[1].endswith(".py") else command[1].replace(".", "/") + "/__main__.py"
        assert (ROOT / file).exists(), printed
