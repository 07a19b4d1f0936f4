"""The workflows of `.github` run targets that exist, on the Python versions that the package names."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs_of(path: Path) -> dict[str, Any]:
    jobs: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return jobs


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_step_runs_a_target_of_the_makefile(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    commands = [step["run"].split() for job in jobs_of(path).values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        assert command[0] == "make" and command[1] in targets, command


def test_every_supported_python_runs_all_tests() -> None:
    metadata = ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    supported = re.findall(r"Python :: (3\.\d+)$", metadata["metadata"]["classifiers"], re.MULTILINE)
    jobs = jobs_of(ROOT / ".github" / "workflows" / "ci.yml")
    assert len(supported) >= 4
    assert jobs["quick"]["strategy"]["matrix"]["python"] == supported
    assert jobs["test"]["strategy"]["matrix"]["python"] == supported
