"""The workflows of `.github` run targets that exist, on the Python versions that the package names."""

from __future__ import annotations

import re
import subprocess
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


def test_releases_need_no_secret_and_a_person_agrees() -> None:
    """PyPI, npm and the registry trust the identity of the workflow."""
    path = ROOT / ".github" / "workflows" / "release.yml"
    jobs = jobs_of(path)
    assert "secrets." not in path.read_text(encoding="utf-8")
    publishing = {name for name, job in jobs.items() if "id-token" in job.get("permissions", {})}
    assert publishing == jobs.keys() - {"build"}
    for name in publishing:
        assert (jobs[name]["environment"], jobs[name]["needs"]) == ("release", "build")


def test_packages_of_another_version_are_not_built() -> None:
    command = ["make", "--silent", "packages", "VERSION=99.9", "--assume-old=.venv/installed-test"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "setup.cfg does not have the version 99.9" in done.stderr


def test_every_supported_python_runs_all_tests() -> None:
    metadata = ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    supported = re.findall(r"Python :: (3\.\d+)$", metadata["metadata"]["classifiers"], re.MULTILINE)
    jobs = jobs_of(ROOT / ".github" / "workflows" / "ci.yml")
    assert len(supported) >= 4
    assert jobs["quick"]["strategy"]["matrix"]["python"] == supported
    assert jobs["test"]["strategy"]["matrix"]["python"] == supported
