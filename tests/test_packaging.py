"""What is shipped beside the code: the sample configuration, the metadata, the commands of the Makefile."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

import catbus
from catbus.cli import main_command
from catbus.config import Config, load, setting_descriptions

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "catbus.toml"
_COMMENTED = re.compile(r"^# (?=\w+ = )", re.MULTILINE)


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_sample_is_for_one_machine() -> None:
    config = load(SAMPLE, {})
    assert config.loopback
    assert config.database.url == "embedded"
    assert not config.auth.secrets


def uncommented() -> dict[str, object]:
    document = tomllib.loads(_COMMENTED.sub("", SAMPLE.read_text()))
    return {
        f"{section}.{key}" if isinstance(table, dict) else section: value
        for section, table in document.items()
        for key, value in (table.items() if isinstance(table, dict) else [("", table)])
    }


def test_the_sample_names_every_setting_and_nothing_else() -> None:
    assert set(uncommented()) == set(setting_descriptions())


def test_what_the_sample_shows_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "catbus.toml"
    path.write_text(_COMMENTED.sub("", SAMPLE.read_text()))
    load(path, {})


@pytest.mark.parametrize("section", ["limits", "retention", "drain", "logging"])
def test_what_the_sample_gives_as_defaults_are_the_defaults(section: str, tmp_path: Path) -> None:
    path = tmp_path / "catbus.toml"
    path.write_text(_COMMENTED.sub("", SAMPLE.read_text()).replace("\nwindow = 0\n", "\n"))
    assert getattr(load(path, {}), section) == getattr(Config(), section)


def test_the_metadata() -> None:
    cfg = setup_cfg()
    assert cfg["metadata"]["name"] == "catbus-broker"
    assert cfg["options"]["python_requires"] == ">=3.11"
    assert cfg["options.entry_points"]["console_scripts"].strip() == "catbus = catbus.__main__:main"
    assert re.fullmatch(r"\d+\.\d+\.\d+", cfg["metadata"]["version"])
    assert "\n### Wire\n" in (ROOT / "CHANGELOG.md").read_text()


def test_every_third_party_import_is_declared() -> None:
    declared = {re.split(r"[<>=]", line)[0].replace("-", "_") for line in requirements("install_requires")}
    imported = set()
    for path in (ROOT / "catbus").rglob("*.py"):
        if "testing" not in path.parts:
            imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    names = {"pyjwt": "jwt"}
    known = {names.get(name, name) for name in declared}
    third_party = {"aioquic", "anyio", "asyncpg", "click", "cryptography", "h11", "httpcore", "httpx", "jwt", "msgspec"}
    third_party |= {"prometheus_client", "structlog", "trio", "trio_asyncio", "trio_websocket", "wsproto"}
    assert imported & third_party <= known
    assert third_party >= known


def requirements(key: str) -> list[str]:
    return setup_cfg()["options"][key].split()


@pytest.mark.parametrize(
    "target", ["help", "run", "test", "mistakes", "lint", "types", "format", "bench", "chaos", "clean"]
)
def test_the_makefile_has_the_target(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_and_ci_run_the_same_tests() -> None:
    assert "make test\n" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()


def test_the_examples_in_the_readme_are_python() -> None:
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        compile(example, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for name in re.findall(r"\bcatbus\.(\w+)", example):
            assert hasattr(catbus, name)


def test_the_commands_in_the_readme_exist() -> None:
    used = set(re.findall(r"^(?:\.venv/bin/)?catbus (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used and used <= set(main_command.COMMANDS)


def test_help_shows_an_example_of_every_command() -> None:
    context = click.Context(main_command.catbus)
    for name in main_command.COMMANDS:
        command = main_command.catbus.get_command(context, name)
        assert command is not None
        assert "Examples:" in (command.help or "")
        assert f"catbus {name}" in (command.help or "")
