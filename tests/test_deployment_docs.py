"""`docs/deploy-vm.md`: its unit, its configuration, and the commands that adapt alerts and dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from configparser import ConfigParser
from pathlib import Path

import yaml

from catbus.config import load
from tests.test_readme import examples

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "deploy-vm.md"
(UNIT,) = examples(PAGE, "ini")
(SETTINGS,) = examples(PAGE, "toml")
ALERTS, DASHBOARD = (example for example in examples(PAGE, "sh") if "monitoring" in example)


def test_unit_is_valid_and_allows_for_a_whole_drain(tmp_path: Path) -> None:
    unit = ConfigParser(delimiters="=", interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(UNIT)
    service = unit["Service"]
    drain = load(None, {}).drain
    assert float(service["TimeoutStopSec"]) > drain.delay + drain.window + drain.deadline + 15
    assert service["ExecStart"].endswith("run --config /etc/catbus/catbus.toml")
    if analyze := shutil.which("systemd-analyze"):
        # The program that it starts is not installed here.
        file = tmp_path / "catbus.service"
        file.write_text(UNIT.replace("/opt/catbus/bin/catbus", "/bin/true").replace("User=catbus", "User=root"))
        done = subprocess.run([analyze, "verify", str(file)], capture_output=True, text=True, check=False)
        assert str(file) not in done.stderr, done.stderr


def test_settings_are_known(tmp_path: Path) -> None:
    file = tmp_path / "catbus.toml"
    file.write_text(SETTINGS)
    config = load(file, {"CATBUS_SECRET": "0123456789abcdef" * 2, "DATABASE_URL": "postgres://catbus@/catbus"})
    assert (config.run.workers, config.webtransport.bind) == (tomllib.loads(SETTINGS)["run"]["workers"], ())


def adapt(command: str, tmp_path: Path, name: str) -> str:
    subprocess.run(["sh", "-ec", command.replace(f"> {name}", f"> {tmp_path / name}")], cwd=ROOT, check=True)
    return (tmp_path / name).read_text()


def test_alerts_group_by_the_labels_of_a_machine(tmp_path: Path) -> None:
    adapted = yaml.safe_load(adapt(ALERTS, tmp_path, "catbus-alerts.yml"))
    original = yaml.safe_load((ROOT / "k8s/components/monitoring/prometheusrule.yaml").read_text())
    rules, before = adapted["groups"][0]["rules"], original["spec"]["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == [rule["alert"] for rule in before]
    assert not re.search(r"namespace|\bpod\b", json.dumps([rule["expr"] + str(rule["annotations"]) for rule in rules]))
    assert sum("by (job" in rule["expr"] for rule in rules) == sum("by (namespace" in rule["expr"] for rule in before)


def test_dashboard_chooses_by_the_labels_of_a_machine(tmp_path: Path) -> None:
    dashboard = json.loads(adapt(DASHBOARD, tmp_path, "catbus-dashboard.json"))
    text = json.dumps(dashboard)
    assert not re.search(r"namespace|\bpod\b", text)
    assert "label_values(catbus_build_info, job)" in text
    assert "{{instance}}" in text
